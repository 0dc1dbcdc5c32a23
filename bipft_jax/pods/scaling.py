"""Weak and strong scaling of an update, from the program compiled for one size of slice.

What a collective moves does not depend on the number of devices along `data`, only who takes part.
So the collectives of the compiled program are timed between the devices of other slices, along the
same axes of the mesh. For several slices this is optimistic: libtpu then cuts the sums into more
and smaller ones, some of them in the loop over the layers. Strong scaling assumes that computation
is the optimiser's, which every device does whole, and the rest, which is proportional to its rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from bipft_jax.pods import network, timeline
from bipft_jax.pods.chips import Chip
from bipft_jax.pods.collectives import Collective
from bipft_jax.pods.compiler import tpu
from bipft_jax.pods.cost import Cost
from bipft_jax.pods.network import Seconds
from bipft_jax.pods.programs import Compiled
from bipft_jax.pods.setting import Setting
from bipft_jax.pods.timeline import Step
from bipft_jax.pods.topology import Layout
from bipft_jax.training import sharding

SIZES = (4, 16, 64, 256, 512, 1024, 4096)  # chips


@dataclasses.dataclass(frozen=True)
class Rung:
    """An update on so many chips.

    weak: with the rows a device that were compiled; strong: with the compiled batch, or None if
    that does not divide. weak_efficiency: tokens a second and device, as a fraction of those of one
    device alone; strong_efficiency: the same with the batch's rows on one device, by the assumption
    of the module.
    """

    chips: int
    topology: str
    slices: int
    weak: Step
    weak_efficiency: float
    strong: Step | None
    strong_efficiency: float | None


def compute_seconds(cost: Cost, chip: Chip, rows: float = 1.0) -> dict[str, float]:
    """Seconds of one run of each instruction. rows: factor of all but the optimiser's."""
    seconds: dict[str, float] = {}
    for charge in cost.charges:
        name, factor = charge.instruction.name, 1.0 if charge.kind == "optimizer" else rows
        taken = factor * charge.cycles / charge.count / chip.clock
        seconds[name] = seconds.get(name, 0.0) + taken
    return seconds


def step_of(compiled: Compiled, setting: Setting) -> Step:
    """The update as it was compiled, on its own slices."""
    layout, chip = setting.layout, setting.chip

    def seconds(collective: Collective) -> Seconds:
        if collective.between_slices:
            size, slices = collective.size, layout.num_slices
            return Seconds(0.0, network.between(collective.kind, size, slices, chip))
        place = layout.place(collective.group)
        return network.seconds(collective.kind, collective.size, place, chip)

    partitions = layout.devices // layout.num_slices
    compute = compute_seconds(compiled.cost, chip)
    return timeline.step_of(compiled.module, compute, partitions, seconds)


def curve(compiled: Compiled, setting: Setting, alone: Compiled) -> list[Rung]:
    """Rungs from one chip to 4,096.

    Arguments:
      compiled, setting: the update, on one slice.
      alone: the update of the same rows for one device.
    """
    chip, keys = setting.chip, setting.config.mesh
    one, fixed = alone.cost.seconds(chip), alone.cost.by_kind["optimizer"] / chip.clock
    # The whole batch on one device.
    together = fixed + (one - fixed) * sharding.batch_shards(setting.mesh)
    rungs = []
    for topology, slices in filter(None, (slice_of(chip, chips) for chips in SIZES)):
        devices = tpu(topology, slices)[1]
        if (len(devices) // slices) % (keys.fsdp * keys.tensor):
            continue
        mesh = sharding.make_mesh(keys.fsdp, keys.tensor, devices)
        layout = Layout.of(mesh, chip)
        weak = _moved(compiled, setting, layout, 1.0)
        strong = efficiency = None
        if setting.config.batch_size % sharding.batch_shards(mesh) == 0:
            strong = _moved(compiled, setting, layout, setting.layout.devices / len(devices))
            efficiency = together / (strong.seconds * len(devices))
        chips, weakly = len(devices) // chip.devices, one / keys.tensor / weak.seconds
        rungs.append(Rung(chips, topology, slices, weak, weakly, strong, efficiency))
    return rungs


def slice_of(chip: Chip, chips: int) -> tuple[str, int] | None:
    """The topology nearest to a cube (or square) with so many chips, and the number of slices of it
    if one does not suffice; None if there is none."""
    largest = min(chips, chip.most_chips)
    powers = [2**n for n in range(largest.bit_length())]
    shapes = [
        shape
        for shape in _products(powers, chip.axes)
        if math.prod(shape) == largest and chip.has_slice(shape)
    ]
    if not shapes or chips % largest:
        return None
    return f"{chip.name}:{'x'.join(map(str, min(shapes, key=max)))}", chips // largest


def _products(lengths: list[int], axes: int) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [()]
    for _ in range(axes):
        shapes = [(*shape, length) for shape in shapes for length in lengths]
    return shapes


def _moved(compiled: Compiled, setting: Setting, layout: Layout, rows: float) -> Step:
    """The update on another layout of the same kind of mesh, with `rows` times the rows."""
    chip, own = setting.chip, setting.layout
    known: dict[tuple[int, ...], Mapping] = {}

    def seconds(collective: Collective) -> Seconds:
        kind, size = collective.kind, collective.size
        if kind == "collective-permute":  # between neighbours, as before
            return network.seconds(kind, size, own.place(collective.group), chip)
        if collective.group not in known:
            known[collective.group] = own.spanned(collective.group)
        axes = known[collective.group]
        if axes == {"tensor"}:  # activations
            size *= rows
        return network.seconds(kind, size, layout.place(layout.along(axes)), chip)

    compute = compute_seconds(compiled.cost, chip, rows)
    return timeline.step_of(compiled.module, compute, own.devices, seconds)
