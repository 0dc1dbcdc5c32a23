"""What must not be in a run: each check returns the reasons why it fails, none if it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from jax.sharding import Mesh

from bipft_jax.pods import hlo
from bipft_jax.pods.timeline import Timed
from bipft_jax.pods.topology import Layout
from bipft_jax.training import sharding
from bipft_jax.training.step import TEACHER_SCOPE

_FLOATS = ("f64", "f32", "f16", "bf16")


def rows(mesh: Mesh, layout: Layout, batch_size: int) -> list[str]:
    """Every host makes the rows of a global batch that its devices hold, and no others."""
    reasons = []
    for host in sorted(set(layout.hosts.tolist())):
        made = set(sharding.process_rows(mesh, batch_size, host).tolist())
        held = layout.rows_held(batch_size, host)
        if made != held:
            reasons.append(
                f"host {host} makes {len(made)} rows of a batch of {batch_size}, of which its "
                f"devices hold {len(made & held)}; they hold {len(held)} "
                "(training/sharding.py, process_rows)"
            )
    return reasons


def gathers(
    timed: Iterable[Timed], kernels: Mapping[str, tuple[int, ...]], tensor: int
) -> list[str]:
    """A binarised kernel crosses the network as codes, not as floats.

    Arguments:
      kernels: shape [layers, in, out] of each binarised kernel by its module's path.
      tensor: devices over which a kernel may stay split when the others gather it.
    """
    reasons = []
    for one in timed:
        collective = one.collective
        if collective.kind != "all-gather":
            continue
        for shape in hlo.elements(collective.shape):
            if hlo.element_type(shape) not in _FLOATS:
                continue
            for path, kernel in kernels.items():
                if _is_of(path, collective.operation) and _is_whole(shape, kernel, tensor):
                    reasons.append(
                        f"the binarised kernel {path} is gathered as {shape.partition('{')[0]}, "
                        f"not as int8 codes, {one.count} times an update ({collective.source}): "
                        "with --config.compute=simulated floats are what is multiplied"
                    )
    return reasons


def loops(timed: Iterable[Timed]) -> list[str]:
    """No loop waits for the network between slices in each of its rounds."""
    return [
        f"a loop sends {one.collective.size / 1e6:.3f} MB between slices in each of its "
        f"{one.count} rounds ({one.collective.kind}, {one.collective.source}): each costs "
        f"{1e3 * one.seconds.dcn:.2f} ms"
        for one in timed
        if one.in_loop and one.seconds.dcn
    ]


def _is_of(path: str, operation: str) -> bool:
    """Whether an operation's name has the module of that path; also if it has no name. A teacher
    has modules of the same names, whose kernels are floats."""
    names = re.findall(r"\w+", operation)  # transformations put names in parentheses
    return not operation or (path.rpartition("/")[2] in names and TEACHER_SCOPE not in names)


def _is_whole(shape: str, kernel: tuple[int, ...], tensor: int) -> bool:
    """Whether an array is one layer of a kernel, or all, split over `tensor` at most."""
    lengths = sorted(length for length in hlo.dimensions(shape) if length > 1)
    _, height, width = kernel
    for one in ((height, width), kernel):
        for split in {1, tensor}:
            halves = ((height // split, width), (height, width // split))
            for half in halves:
                if lengths == sorted(n for n in (*one[:-2], *half) if n > 1):
                    return True
    return False
