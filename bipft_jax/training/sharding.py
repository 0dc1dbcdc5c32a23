"""The device mesh, and the rules that map logical axes to it.

====================  ==============================================================================
mesh axis             what it splits
====================  ==============================================================================
`data`                the batch
`fsdp`                the batch, and the weights of linears (with their optimiser state) along the
                      hidden axis: a weight is gathered for its use, its gradient scattered
`tensor`              heads, the feed-forward's inner axis, the vocabulary
====================  ==============================================================================

Everything else (biases, norms, scales, estimators) is replicated. Programs are written for global
arrays: on any mesh, a mean over a weight or a batch is the global mean.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bipft_jax.models.axes import BATCH, HEADS, HIDDEN, INTERMEDIATE, VOCABULARY, weight_axes
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.parameters import is_stacked, path_name
from bipft_jax.models.recipes import BertConfig

MESH_AXES = ("data", "fsdp", "tensor")

# An array uses a mesh axis once, and earlier rules win: activations [batch, ..., hidden] have
# `fsdp` on their batch axis, so their hidden axis is not split.
RULES = (
    (BATCH, ("data", "fsdp")),
    (HIDDEN, "fsdp"),
    (HEADS, "tensor"),
    (INTERMEDIATE, "tensor"),
    (VOCABULARY, "tensor"),
)


def make_mesh(fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh [data, fsdp, tensor] over the devices (default: all devices of all processes); the
    size of `data` is the number of devices / (fsdp x tensor).

    Several TPU slices are laid along `data`, so that only the sum of gradients crosses the slower
    network between slices. Within a slice a mesh axis gets whole axes of the torus if possible,
    else parts of axes.

    Raises: ValueError if fsdp x tensor does not divide the number of devices (with several slices:
      of devices per slice).
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    in_slice = len(devices) // slices
    if fsdp < 1 or tensor < 1 or in_slice % (fsdp * tensor):
        fitting = [str(n) for n in range(1, in_slice + 1) if in_slice % n == 0]
        raise ValueError(
            f"fsdp {fsdp} x tensor {tensor} does not divide {in_slice} devices"
            + (f" of each of {slices} slices" if slices > 1 else "")
            + f": their product must be one of {', '.join(fitting)}"
        )
    shape = (in_slice // (fsdp * tensor), fsdp, tensor)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            shape, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@contextlib.contextmanager
def on(mesh: Mesh) -> Iterator[None]:
    """A context in which programs are traced with this mesh and `RULES`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows are split over `data` and `fsdp`."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes((BATCH,), RULES))


def placements(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for each leaf of a tree of parameters, gradients or a train state.

    The end of a leaf's path decides, so the optimiser state of a weight is sharded like the weight.
    An axis whose size the mesh axis does not divide is not split.

    Raises: ValueError for a kernel or table that `models/axes.py` does not list.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        axes = weight_axes(name)
        if axes is None:
            return replicated(mesh)
        if is_stacked(name):
            axes = (None, *axes)
        spec = nn.logical_to_mesh_axes(axes, RULES)
        fitting = [
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fitting))

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(mesh: Mesh, tree: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with the shardings of `placements`, from a tree of arrays or of
    `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        placements(mesh, tree),
    )


def put(mesh: Mesh, tree: Any) -> Any:
    """Global arrays with the shardings of `placements`; every process passes the whole arrays."""

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, placements(mesh, tree))


def batch_shards(mesh: Mesh) -> int:
    """The number of parts into which the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@functools.lru_cache  # `put_batch` calls it at every update; a mesh may have thousands of devices
def process_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
    """The rows of a global batch that the devices of a process hold: int [rows], ascending,
    read-only.

    They are not contiguous: a host of a TPU slice is a block of the torus, so along `data` devices
    of other hosts lie between its own.

    process: its index; None for this process.
    """
    process = jax.process_index() if process is None else process
    held = [
        np.arange(batch_size)[index[0]]
        for device, index in batch_sharding(mesh).devices_indices_map((batch_size,)).items()
        if device.process_index == process
    ]
    rows = np.unique(np.concatenate(held))  # along `tensor` several devices hold the same rows
    rows.flags.writeable = False
    return rows


def put_batch(
    mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Global arrays of a batch, from the rows that this process has.

    batch_size: of the global batch, if `batch` holds this process's `process_rows`; None if `batch`
      is the whole batch.
    """
    sharding = batch_sharding(mesh)
    rows = None if batch_size is None else process_rows(mesh, batch_size)

    def array(here: np.ndarray) -> jax.Array:
        size = len(here) if rows is None else batch_size

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = start if rows is None else np.searchsorted(rows, start)
            return here[first : first + stop - start]

        return jax.make_array_from_callback((size, *here.shape[1:]), sharding, shard)

    # This transfer is intended, though JAX counts it as implicit.
    with jax.transfer_guard_host_to_device("allow"):
        return {name: array(here) for name, here in batch.items()}


def abstract_batch(
    mesh: Mesh, example: dict[str, jax.ShapeDtypeStruct], batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a global batch, from those of one example."""
    place = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *one.shape), one.dtype, sharding=place)
        for name, one in example.items()
    }


def check_batch_size(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError unless a batch splits evenly into micro-batches and over the mesh."""
    shards = batch_shards(mesh)
    if accumulation < 1 or batch_size % (accumulation * shards):
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of accumulation {accumulation} x {shards} "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
        )


def check_model(config: BertConfig | DecoderConfig, mesh: Mesh) -> None:
    """Raises ValueError unless the model's axes split evenly over the mesh."""
    for axis, name, size in config.split_sizes:
        if size % mesh.shape[axis]:
            raise ValueError(f"{axis} {mesh.shape[axis]} does not divide the model's {name} {size}")
