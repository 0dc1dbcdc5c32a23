"""Logical axes of weights and activations, which `training/sharding.py` maps to a device mesh.

Models name axes independently of any mesh. Outside a mesh and its rules, names have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
from flax import linen as nn

from bipft_jax.quantization.binary_dot import Placement

BATCH = "batch"
HIDDEN = "hidden"
HEADS = "heads"  # all heads' channels together
INTERMEDIATE = "intermediate"
VOCABULARY = "vocabulary"

# Axes of kernels [in, out], by the name of their module.
KERNELS: dict[str, tuple[str | None, str | None]] = {
    "query": (HIDDEN, HEADS),
    "key": (HIDDEN, HEADS),
    "value": (HIDDEN, HEADS),
    "attention_output": (HEADS, HIDDEN),
    "ffn_input": (HIDDEN, INTERMEDIATE),
    "ffn_gate": (HIDDEN, INTERMEDIATE),
    "ffn_output": (INTERMEDIATE, HIDDEN),
    "pooler": (HIDDEN, None),
    "mlm_dense": (HIDDEN, None),
    "head": (None, VOCABULARY),  # of a decoder whose head is not its embedding
}
# Axes of embedding tables [rows, hidden]. `hidden` is not split: the decoder would gather the whole
# table, in float, at every update.
EMBEDDINGS: dict[str, tuple[str | None, str | None]] = {"words": (VOCABULARY, None)}
# Kernels and tables small enough to replicate: heads, BiPFT's estimators (rank 1 or little more),
# low-rank products.
SMALL = (
    *("nsp", "classifier", "positions", "segments"),
    *("query_estimator", "key_estimator"),
    *("query_residual_estimator", "key_residual_estimator", "value_residual_estimator"),
    *("down", "up"),
)


def weight_axes(path: str) -> tuple[str | None, str | None] | None:
    """The axes of a weight, or of its optimiser state, by its "/"-joined path; None for replicated
    leaves: small weights, and all that are no kernel or table.

    Raises: ValueError for a kernel or table in none of the lists, so that a forgotten name does not
      replicate a large weight.
    """
    *_, module, leaf = ("", *path.split("/"))
    if leaf not in ("kernel", "embedding") or module in SMALL:
        return None
    table = KERNELS if leaf == "kernel" else EMBEDDINGS
    if module not in table:
        raise ValueError(
            f"{path} is in no list of models/axes.py: name its axes there, or call it small"
        )
    return table[module]


def constrained(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, with a sharding constraint by its logical axes."""
    return nn.with_logical_constraint(x, axes)


def on_each_device(
    function: Callable[..., tuple[jax.Array, ...]],
    in_axes: Sequence[Sequence[str | None]],
    out_axes: Sequence[Sequence[str | None]],
) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of global arrays that applies `function` to every device's part (`shard_map`).
    in_axes, out_axes: logical axes of the operands and results. Outside a mesh: `function`."""
    if not _on_mesh():
        return function
    return jax.shard_map(
        function,
        in_specs=tuple(map(nn.logical_to_mesh_axes, in_axes)),
        out_specs=tuple(map(nn.logical_to_mesh_axes, out_axes)),
        check_vma=False,  # kernels do not declare the mesh axes over which their results vary
    )


def shards(axis: str) -> int:
    """The number of parts into which an axis is split; 1 outside a mesh."""
    if not _on_mesh():
        return 1
    (names,) = nn.logical_to_mesh_axes((axis,))
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def kernel_axes(name: str | None) -> tuple[str | None, str | None]:
    """The axes of a module's kernel; none for a layer without a name, used on its own."""
    return KERNELS.get(name, (None, None))


def splits_inputs(name: str | None) -> bool:
    """Whether `tensor` splits the inputs of a linear ("row parallel") instead of its outputs."""
    return kernel_axes(name)[0] in (HEADS, INTERMEDIATE)


def kernel_placement(name: str | None, groups: int = 1) -> Placement | None:
    """The shardings of a kernel: as stored, and as used, gathered along `HIDDEN`. None outside a
    mesh.

    groups: if not 1, the kernel has its axis that `tensor` splits as two axes, [groups, rest].
    """
    if not _on_mesh():
        return None
    axes = list(kernel_axes(name))
    if groups > 1:
        axes.insert(1 if splits_inputs(name) else 2, None)
    return Placement(
        stored=nn.logical_to_mesh_axes(axes),
        used=nn.logical_to_mesh_axes([None if axis == HIDDEN else axis for axis in axes]),
    )


def _on_mesh() -> bool:
    return bool(nn.get_logical_axis_rules()) and not jax.sharding.get_abstract_mesh().empty
