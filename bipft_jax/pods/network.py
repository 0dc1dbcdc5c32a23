"""Modelled time of a collective, from published bandwidths and assumed latencies.

Within a slice a collective of n devices moves size x (n - 1) / n bytes through every chip, twice
for a sum that all devices get, over the links of the axes that its devices span: a ring is used in
both directions, a line in one. A permutation sends the whole array over one path. Between slices,
each chip sends its share of the array, 1 / (devices of the slice), over its part of its host's
network card. The two follow one another.
"""

from __future__ import annotations

from typing import NamedTuple

from bipft_jax.pods.chips import Chip
from bipft_jax.pods.topology import Place

# Assumptions, not published; seconds.
HOP_LATENCY = 1e-6  # from a chip to the next
LAUNCH_LATENCY = 2e-6  # to begin a collective
DCN_LATENCY = 100e-6  # from slice to slice, through both hosts

# How often a collective moves the array.
_PASSES = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 0.25,  # on a ring in both directions
    "collective-permute": 1.0,
}
_PERMUTATION = "collective-permute"
KINDS = tuple(_PASSES)


class Seconds(NamedTuple):
    """Time within slices and between slices."""

    ici: float
    dcn: float


def seconds(kind: str, size: float, place: Place, chip: Chip) -> Seconds:
    """The time of one of `KINDS`; size: bytes of the whole array (`Collective.size`)."""
    inside = place.devices // place.slices
    return Seconds(
        _within(kind, size, inside, place, chip) if inside > 1 else 0.0,
        between(kind, size / inside, place.slices, chip) if place.slices > 1 else 0.0,
    )


def between(kind: str, size: float, slices: int, chip: Chip) -> float:
    """The time in which every device exchanges `size` bytes of its own with as many slices."""
    rate = chip.dcn / chip.devices
    part = 1.0 if kind == _PERMUTATION else (slices - 1) / slices
    return DCN_LATENCY + _PASSES[kind] * size * part / rate


def _within(kind: str, size: float, devices: int, place: Place, chip: Chip) -> float:
    bandwidth, hops = 0.0, 0
    for length, ring in zip(place.lengths, place.rings, strict=True):
        if length > 1:
            bandwidth += chip.link * (2 if ring else 1)
            hops += length // 2 if ring else length - 1
    if not hops:  # the two devices of one chip, which share all its links
        bandwidth = 2 * chip.axes * chip.link
    if kind == _PERMUTATION:
        moved, bandwidth = size, min(bandwidth, chip.link)
    else:
        moved = size * (devices - 1) / devices
    passes = _PASSES[kind]
    return LAUNCH_LATENCY + passes * moved / bandwidth + max(passes, 1.0) * hops * HOP_LATENCY
