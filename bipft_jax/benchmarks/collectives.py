"""Counts the bytes that an update moves between the chips of a TPU slice, in its compiled program.

    python -m bipft_jax.benchmarks.collectives --topology v5e:2x4 --fsdp 8 --size base \
        --batch 512 --recipes fp,bipft_a,bipft_b

The update is compiled for all chips of the topology, on any machine. The count is the size, on one
chip, of the array that is gathered (all-gather), summed (all-reduce, reduce-scatter) or sent
(all-to-all, collective-permute), times the trip counts of loops. A ring moves about this many bytes
for a gather or a scatter, twice as many for an all-reduce.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bipft_jax.benchmarks.workload import (
    Workload,
    add_compute_argument,
    add_workload_arguments,
    workload_of,
)
from bipft_jax.paths import require_local
from bipft_jax.pods import hlo
from bipft_jax.pods.collectives import started
from bipft_jax.pods.compiler import compiled_for_tpu, tpu
from bipft_jax.pods.network import KINDS
from bipft_jax.training import sharding

Row = dict[str, Any]


def lowered_update(
    workload: Workload, recipe: str, compute: str, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, Any]:
    """The lowered update of a recipe for all devices of a mesh, and the abstract state."""
    config = workload.config(recipe, compute)
    sharding.check_model(config, mesh)
    sharding.check_batch_size(workload.batch, 1, mesh)
    state = sharding.placed(mesh, workload.abstract_state(config))
    rows = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows)
        for name, array in workload.arrays(recipe).items()
    }
    places = sharding.placements(mesh, state)
    with sharding.on(mesh):
        update = jax.jit(
            workload.update(config),
            in_shardings=(places, None, rows),
            out_shardings=(places, sharding.replicated(mesh)),
            donate_argnums=0,
        )
        return update.lower(state, None, batch), state


def collective_bytes(module: hlo.Module, partitions: int) -> dict[str, int]:
    """Bytes of each of `KINDS`. partitions: of the program."""
    totals = dict.fromkeys(KINDS, 0)
    for instruction, count in hlo.executed(module):
        if collective := started(module, instruction, partitions):
            totals[collective.kind] += count * collective.size
    return totals


def row(
    workload: Workload, recipe: str, compute: str, topology: str, fsdp: int, tensor: int
) -> Row:
    """Compiles one recipe's update and counts its bytes.

    Returns: `bytes` by kind, `gathered_bytes_per_parameter` (all-gather bytes divided by the
      parameters that `fsdp` splits), `temp_bytes` of one chip.
    """
    _, devices = tpu(topology)
    mesh = sharding.make_mesh(fsdp, tensor, devices)
    lowered, state = lowered_update(workload, recipe, compute, mesh)
    program = compiled_for_tpu(lowered)
    counted = collective_bytes(program.module, mesh.size)
    split = sum(leaf.size for leaf in jax.tree.leaves(state.params) if "fsdp" in leaf.sharding.spec)
    return {
        "recipe": recipe,
        "compute": compute,
        "topology": topology,
        "mesh": dict(mesh.shape),
        "bytes": counted,
        "gathered_bytes_per_parameter": counted["all-gather"] / split * tensor,
        "temp_bytes": program.compiled.memory_analysis().temp_size_in_bytes,
    }


def report(rows: Sequence[Row]) -> str:
    """The rows as aligned text, in million bytes per update and chip."""
    kinds = " ".join(f"{kind:>18}" for kind in KINDS)
    lines = [f"{'recipe':<11} {'compute':<10} {kinds} {'gathered a weight':>18}"]
    for row in rows:
        counts = " ".join(f"{row['bytes'][kind] / 1e6:>18,.1f}" for kind in KINDS)
        weight = f"{row['gathered_bytes_per_parameter']:.2f} bytes"
        lines.append(f"{row['recipe']:<11} {row['compute']:<10} {counts} {weight:>18}")
    return "\n".join(lines)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.benchmarks.collectives",
        description="Compiles the pretraining update of several recipes for all chips of a TPU "
        "slice, on any machine, and prints how many bytes move between them.",
    )
    parser.add_argument("--topology", default="v5e:2x4", help="default %(default)s, 8 chips")
    parser.add_argument("--fsdp", type=int, default=8, help="chips that share weights and batch")
    parser.add_argument("--tensor", type=int, default=1, help="chips that share heads and channels")
    add_workload_arguments(parser, batch=512, dtype="bfloat16", remat="lean")
    add_compute_argument(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with a message for wrong arguments."""
    given = _parse_arguments(arguments)
    workload = workload_of(given)
    where, rows = (given.topology, given.fsdp, given.tensor), []
    try:
        require_local(vars(given))
        for recipe, compute in workload.variants(given.recipes, given.compute):
            print(f"compiling {recipe}, {compute}, for {given.topology}", flush=True)
            rows.append(row(workload, recipe, compute, *where))
        if given.json is not None:
            given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    mesh = " x ".join(f"{axis} {size}" for axis, size in rows[0]["mesh"].items())
    print(
        f"\n{given.topology} as {mesh}, jax {jax.__version__}, libtpu "
        f"{importlib.metadata.version('libtpu')}; {given.size}, {given.batch} x {given.length}, "
        f"{given.dtype}, remat {given.remat}; million bytes an update, as one chip has them"
    )
    print(report(rows))


if __name__ == "__main__":
    main()
