"""Where arrays live: batches are split over the devices of a `data` mesh, parameters replicated."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh `data` over the given devices (default: all, of all processes)."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays, split over `data` along axis 0, from this process's rows."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays, the same on every device."""
    return jax.device_put(tree, replicated(mesh))


def check_batch_size(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError unless a batch splits evenly into micro-batches and over devices."""
    if accumulation < 1 or batch_size % (accumulation * mesh.size):
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of accumulation {accumulation} x "
            f"{mesh.size} devices"
        )
