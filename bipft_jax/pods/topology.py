"""Where the devices of a mesh lie: axes of the torus, slices, hosts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from bipft_jax.pods.chips import Chip


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the devices of a group lie that communicate.

    devices: their number. slices: how many slices they are in. lengths: chips of the group along
    each axis of the torus, in one slice. rings: for each axis, whether the links between these
    chips make a ring.
    """

    devices: int
    slices: int
    lengths: tuple[int, ...]
    rings: tuple[bool, ...]

    @property
    def network(self) -> str:
        """The network that the group uses: "ICI" within a slice, "DCN" between slices."""
        return "DCN" if self.slices > 1 else "ICI"

    def __str__(self) -> str:
        within = "x".join(str(length) for length in self.lengths if length > 1) or "1"
        return within if self.slices == 1 else f"{self.slices} slices of {within}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices of a mesh in the order of their partition numbers in a compiled program.

    axes: the mesh's axes and their sizes. coordinates: in the torus, int [devices, 3]. slices,
    hosts: numbers, int [devices]. ring: as in `Chip`.
    """

    axes: Mapping[str, int]
    coordinates: np.ndarray
    slices: np.ndarray
    hosts: np.ndarray
    ring: int

    @classmethod
    def of(cls, mesh: Mesh, chip: Chip) -> Layout:
        """The layout of a mesh of TPU devices, which need not be there."""
        devices = list(mesh.devices.flat)
        return cls(
            dict(mesh.shape),
            np.array([device.coords for device in devices]),
            np.array([getattr(device, "slice_index", 0) or 0 for device in devices]),
            np.array([device.process_index for device in devices]),
            chip.ring,
        )

    @property
    def devices(self) -> int:
        """Number of devices, of all slices."""
        return len(self.slices)

    @property
    def num_slices(self) -> int:
        """Number of slices."""
        return len(set(self.slices.tolist()))

    def place(self, group: Sequence[int]) -> Place:
        """The place of the devices with these partition numbers."""
        slices = self.slices[list(group)]
        inside = self.coordinates[list(group)][slices == slices[0]]
        lengths = [len(set(axis.tolist())) for axis in inside.T]
        extents = self.coordinates.max(axis=0) + 1
        rings = [
            length == extent and length > 1 and length % self.ring == 0
            for length, extent in zip(lengths, extents.tolist(), strict=True)
        ]
        return Place(len(group), len(set(slices.tolist())), tuple(lengths), tuple(rings))

    def spanned(self, group: Sequence[int]) -> frozenset[str]:
        """The axes of the mesh along which the devices of a group differ."""
        indices = np.unravel_index(list(group), tuple(self.axes.values()))
        return frozenset(
            name for name, along in zip(self.axes, indices, strict=True) if len(set(along)) > 1
        )

    def along(self, axes: Iterable[str]) -> list[int]:
        """The partition numbers of device 0 and of those that differ only along these axes."""
        numbers = np.arange(self.devices).reshape(tuple(self.axes.values()))
        wanted = set(axes)
        return numbers[tuple(slice(None) if a in wanted else 0 for a in self.axes)].ravel().tolist()

    def rows_held(self, batch_size: int, host: int) -> set[int]:
        """The rows of a global batch that the devices of a host hold: they are split over `data`
        and `fsdp`, in the order of the mesh."""
        shards = self.axes["data"] * self.axes["fsdp"]
        numbers = np.flatnonzero(self.hosts == host) // math.prod(
            size for name, size in self.axes.items() if name not in ("data", "fsdp")
        )
        rows = batch_size // shards
        return {rows * int(n) + row for n in set(numbers.tolist()) for row in range(rows)}
