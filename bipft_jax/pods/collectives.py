"""The collectives of a compiled TPU program: what they move, and between which devices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from bipft_jax.pods import hlo
from bipft_jax.pods.network import KINDS

# TPU programs hide some collectives in fusions. The first name marks a fusion that starts a gather
# which others continue and the second ends; the third a computation that is a reduce-scatter.
_STARTS, _ENDS, _SCATTERS = "async-collective-start", "async-collective-done", "all-reduce-scatter"
# Between slices libtpu exchanges shares of an array through the hosts.
_BETWEEN_SLICES = "_xla_megascale_transfer_type"

UNKNOWN = "?"  # a source line
_FAR = 100  # instructions, of those that are searched for a source line

_GROUPS = re.compile(
    r"replica_groups=(?P<groups>mesh\[[^\]]*\](?:, device_ids=\([^{]*\))? ?\{[^}]*\}|"
    r"\{\{[\d,{}]*\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    instruction: the one of the schedule that performs or starts it. kind: one of `network.KINDS`.
    size: bytes of the whole array on one device; of a transfer between slices, of a device's share.
    shape: of the array, in HLO syntax. group: partitions that communicate, the first of `groups`
    such groups. between_slices: a transfer through the hosts. channel: its number, "" for none.
    asynchronous: whether another instruction ends it. source: file and line. operation: the name of
    the operation in the traced program.
    """

    instruction: str
    kind: str
    size: int
    shape: str
    group: tuple[int, ...]
    groups: int
    between_slices: bool
    channel: str
    asynchronous: bool
    source: str
    operation: str


def replica_groups(attributes: str, partitions: int) -> list[list[int]]:
    """The groups of a collective, from the attributes of its instruction: a list of partition
    numbers each, in any of the forms that XLA writes. Without groups all partitions are one; a
    permutation's groups are its pairs of source and target.

    Raises: ValueError for groups of another form.
    """
    if match := _GROUPS.search(attributes):
        text = match["groups"]
        if text.startswith("mesh"):
            return _of_mesh(text)
        if text.startswith("{{"):
            return [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", text)]
        if text.startswith("["):
            return _of_iota(text)
    elif match := _PAIRS.search(attributes):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", match[1])]
    elif "replica_groups=" in attributes:
        raise ValueError(f"cannot read these groups of partitions: {attributes[:200]}")
    return [list(range(partitions))]


def _of_iota(text: str) -> list[list[int]]:
    """[groups,size]<=[dimensions]T(permutation): the numbers 0, 1, ... reshaped, transposed and
    reshaped again."""
    shape, dimensions, *order = (
        [int(n) for n in part.split(",")] for part in re.findall(r"[\[(]([\d,]+)[\])]", text)
    )
    numbers = np.arange(math.prod(dimensions)).reshape(dimensions)
    return numbers.transpose(order[0] if order else None).reshape(shape).tolist()


def _of_mesh(text: str) -> list[list[int]]:
    """mesh['a'=4,'b'=8] {'a','b':(2)4}: a group spans the axes named last; ":(2)4" takes of an axis
    the part of size 4 that has a part of size 2 before it. With device_ids=([8,4]T(1,0)) the mesh
    has the partitions in that order, else 0, 1, ..."""
    axes, _, used = text.partition("]")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if "device_ids=" in used:
        listed, _, used = used.partition("{")
        order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", listed)
        if order is None:
            raise ValueError(f"cannot read these groups of partitions: {text[:200]}")
        numbers = np.array(_of_iota(f"[1,{numbers.size}]<={order[1]}")[0])
    parts = {
        name: (int(before), int(size)) if size else (1, sizes[name])
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)
    }
    shape: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        if name in parts:
            inside.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    numbers = numbers.reshape(shape).transpose(outside + inside)
    return numbers.reshape(-1, math.prod(shape[axis] for axis in inside)).tolist()


def started(module: hlo.Module, instruction: hlo.Instruction, partitions: int) -> Collective | None:
    """The collective that an instruction performs or starts; None for other instructions, also for
    those that continue or end one. partitions: of the program, in one slice."""
    opcode = instruction.opcode
    if opcode == "send" and _BETWEEN_SLICES in instruction.attributes:
        return _between_slices(module, instruction)
    if (kind := opcode.removesuffix("-start")) in KINDS:
        asynchronous = opcode.endswith("-start")
        return _collective(module, instruction, instruction, kind, asynchronous, partitions)
    scatters = any(name.startswith(_SCATTERS) for name in instruction.called.get("calls", ()))
    starts = opcode == "async-start" or instruction.name.startswith(_STARTS)
    if not scatters and not starts:
        return None
    for inner in _inside(module, instruction):
        if (kind := inner.opcode.removesuffix("-start")) in KINDS:
            kind = "reduce-scatter" if scatters else kind
            return _collective(module, instruction, inner, kind, starts, partitions)
    return None


def ends(module: hlo.Module, instruction: hlo.Instruction, running: dict[str, Collective]) -> str:
    """Which of the `running` collectives, by the name of their instruction, an instruction waits
    for; "" for none."""
    done = instruction.opcode.endswith("-done")
    if done and instruction.operands and instruction.operands[0] in running:
        return instruction.operands[0]
    if instruction.name.startswith(_ENDS):
        channels = {channel_of(inner.attributes) for inner in _inside(module, instruction)} - {""}
        for name, collective in running.items():
            if collective.channel in channels:
                return name
    return ""


def origin(
    module: hlo.Module, instruction: hlo.Instruction, inside: Mapping[str, hlo.Instruction]
) -> str:
    """The source line of an instruction that has none: of the nearest before it, from which it gets
    its operands, that has one; "?" if none has. inside: its computation, by name."""
    nearest, seen = [instruction], set()
    for one in nearest:
        if (source := hlo.source(module, one)) != UNKNOWN:
            return source
        seen.add(one.name)
        nearest += [inside[name] for name in one.operands if name in inside and name not in seen]
        if len(seen) > _FAR:
            break
    return UNKNOWN


def channel_of(attributes: str) -> str:
    """The number of an instruction's channel; "" for none."""
    match = re.search(r"\bchannel_id=(\d+)", attributes)
    return match[1] if match else ""


def _inside(module: hlo.Module, instruction: hlo.Instruction) -> list[hlo.Instruction]:
    names = [name for names in instruction.called.values() for name in names]
    return [inner for name in names for inner in module.computations.get(name, [])]


def _collective(
    module: hlo.Module,
    outer: hlo.Instruction,
    inner: hlo.Instruction,
    kind: str,
    asynchronous: bool,
    partitions: int,
) -> Collective:
    groups = replica_groups(inner.attributes, partitions)
    return Collective(
        instruction=outer.name,
        kind=kind,
        size=_size(module, inner, len(groups[0])),
        shape=inner.shape,
        group=tuple(groups[0]),
        groups=len(groups),
        between_slices=False,
        channel=channel_of(inner.attributes),
        asynchronous=asynchronous,
        source=hlo.source(module, inner if inner.frame else outer),
        operation=inner.op_name or outer.op_name,
    )


def _between_slices(module: hlo.Module, instruction: hlo.Instruction) -> Collective:
    """libtpu writes the slices as _xla_megascale_target="{1,2}x{0:3}": slices, then partitions."""
    attributes = instruction.attributes
    kind = re.search(rf'{_BETWEEN_SLICES}="(\w+)"', attributes)[1].lower().replace("_", "-")
    element = hlo.elements(instruction.shape)[0]
    return Collective(
        instruction=instruction.name,
        kind=kind if kind in KINDS else "collective-permute",
        size=hlo.shape_bytes(element),
        shape=element,
        group=(),
        groups=1,
        between_slices=True,
        channel=channel_of(attributes),
        asynchronous=True,
        source=hlo.source(module, instruction),
        operation=instruction.op_name,
    )


def _size(module: hlo.Module, instruction: hlo.Instruction, devices: int) -> int:
    """Bytes of the whole array that an instruction moves; devices: of a group."""
    if instruction.opcode == "reduce-scatter":
        shapes = {i.name: i.shape for inside in module.computations.values() for i in inside}
        return sum(hlo.shape_bytes(shapes[name]) for name in instruction.operands)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        # A tuple of the operands, as many results, and some counters.
        count = len(instruction.operands)
        return sum(map(hlo.shape_bytes, hlo.elements(instruction.shape)[count : 2 * count]))
    if instruction.opcode.startswith("all-to-all"):  # each device has one part of it
        return hlo.shape_bytes(instruction.shape) * devices
    return hlo.shape_bytes(instruction.shape)
