"""The TPU compiler's cost estimate of a compiled program, parsed from the program's text.

Every instruction of an optimised and scheduled HLO module carries the compiler's
`estimated_cycles`. The cost of a program is their sum, with the body of a while loop times its trip
count. An instruction without an estimate (custom calls such as Pallas kernels, collectives) is
charged the time to read its operands and write its results or, if longer, the time of a kernel's
declared FLOPs at the chip's peak. This is a lower bound, and reported separately.

Asynchronous copies between memories (`copy-start`, `slice-start`, ...) have no estimate either;
they overlap with computation, and are counted in bytes, not in cycles.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from bipft_jax.pods.chips import Chip
from bipft_jax.training.step import OPTIMIZER_SCOPE

KINDS = ("matmul", "elementwise", "data movement", "optimizer")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    shape: in HLO syntax. operands: names. called: computations by the attribute that names them.
    cycles: the compiler's estimate, or None. target: of a custom call. flops: declared by a kernel,
    else 0.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]
    op_name: str
    frame: int | None
    cycles: int | None
    target: str
    flops: int
    constant: str


@dataclasses.dataclass(frozen=True)
class Module:
    """computations: instructions in order, by the computation's name. entry: name of the entry
    computation. locations: "file:line" entries of each stack frame, innermost first."""

    computations: dict[str, list[Instruction]]
    entry: str
    locations: dict[int, list[str]]


@dataclasses.dataclass(frozen=True)
class Charge:
    """One instruction's share of the cost.

    count: number of executions. cycles: total. estimated: whether the compiler estimated it.
    """

    instruction: Instruction
    kind: str
    count: int
    cycles: float
    estimated: bool


_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations)=(\{[^}]*\}|%[^\s,)]+)"
)
_SECTIONS = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_MATMULS = frozenset({"convolution", "dot"})
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota "
    "opt-barrier add-dependency".split()
)
# Custom calls that execute nothing: annotations for the compiler, or names of memory.
_FREE_TARGETS = frozenset(
    "AllocateBuffer AssumeGatherIndicesInBound ConcatBitcast GatherScatterIndicesBitpacked "
    "Sharding".split()
)
_MOVES = frozenset(
    "copy transpose reshape slice dynamic-slice dynamic-update-slice pad concatenate broadcast "
    "reverse gather scatter convert".split()
)


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`.

    Raises: ValueError if there is no entry computation.
    """
    tables: dict[str, dict[int, str]] = {name: {} for name in _SECTIONS}
    computations: dict[str, list[Instruction]] = {}
    entry, section, inside = None, None, None
    for line in text.splitlines():
        if inside is not None:
            if line.startswith("}"):
                inside = None
            elif " = " in line:
                inside.append(_instruction(line))
        elif match := _COMPUTATION.match(line):
            section, inside = None, computations.setdefault(match[2], [])
            if match[1]:
                entry = match[2]
        elif line in _SECTIONS:
            section = line
        elif section and (match := re.match(r"(\d+) (.*)$", line)):
            tables[section][int(match[1])] = match[2]
    if entry is None:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
    return Module(computations, entry, _locations(tables))


def charges(module: Module, chip: Chip) -> list[Charge]:
    """The cost of every executed instruction, times the trip counts of loops, costliest first.

    Raises: ValueError for a while loop whose trip count cannot be read.
    """
    found = list(_charges(module, module.entry, 1, chip))
    return sorted(found, key=lambda charge: charge.cycles, reverse=True)


def shape_bytes(shape: str) -> int:
    """Bytes of an HLO shape without padding; for a tuple, of all its elements."""
    total = 0
    for element, dimensions in _SHAPE.findall(shape):
        bits = _BITS.get(element) if element in _BITS else int(re.search(r"\d+", element)[0])
        total += bits * math.prod(int(d) for d in dimensions.split(",") if d)
    return total // 8


def elements(shape: str) -> list[str]:
    """The elements of a tuple's HLO shape; any other shape alone."""
    return [match[0] for match in _SHAPE.finditer(shape)]


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    shape_end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    opcode, rest = rest.split("(", 1)
    end = _closing("(" + rest) - 1
    arguments, attributes = rest[:end], rest[end + 1 :]
    configuration = attributes.find("backend_config=")
    plain = attributes if configuration < 0 else attributes[:configuration]
    cycles = re.search(r'"estimated_cycles":"(\d+)"', attributes)
    flops = re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', attributes)
    frame = re.search(r"\bstack_frame_id=(\d+)", plain)
    return Instruction(
        name=name.removeprefix("%"),
        shape=shape,
        opcode=opcode,
        operands=tuple(re.findall(r"%([^\s,)]+)", arguments)),
        called={
            attribute: tuple(re.findall(r"%([^\s,}]+)", names))
            for attribute, names in _CALLED.findall(plain)
        },
        op_name=_quoted("op_name", plain),
        frame=int(frame[1]) if frame else None,
        cycles=int(cycles[1]) if cycles else None,
        target=_quoted("custom_call_target", plain),
        flops=int(flops[1]) if flops else 0,
        constant=arguments if opcode == "constant" else "",
    )


def _closing(text: str) -> int:
    """The index of the parenthesis that closes the first one of the text."""
    depth = 0
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return place
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _quoted(attribute: str, text: str) -> str:
    match = re.search(rf'\b{attribute}="([^"]*)"', text)
    return match[1] if match else ""


def _locations(tables: dict[str, dict[int, str]]) -> dict[int, list[str]]:
    """Source lines of each stack frame and its callers."""

    def number(name: str, text: str) -> int:
        match = re.search(rf"\b{name}=(\d+)", text)
        return int(match[1]) if match else 0

    def place(frame: int) -> str:
        where = tables["FileLocations"][number("file_location_id", tables["StackFrames"][frame])]
        file = tables["FileNames"][number("file_name_id", where)].strip('"')
        return f"{file}:{number('line', where)}"

    found = {}
    for frame in tables["StackFrames"]:
        stack, at = [], frame
        while at in tables["StackFrames"]:
            stack.append(place(at))
            parent = number("parent_frame_id", tables["StackFrames"][at])
            if parent == at:
                break
            at = parent
        found[frame] = stack
    return found


def _charges(module: Module, computation: str, count: int, chip: Chip) -> Iterator[Charge]:
    instructions = module.computations[computation]
    shapes = {instruction.name: instruction.shape for instruction in instructions}
    for instruction in instructions:
        opcode, called = instruction.opcode, instruction.called
        if opcode in _FREE or opcode.endswith("-done") or opcode.endswith("-update"):
            continue
        if opcode == "while":
            rounds = _rounds(module, instruction)
            yield from _charges(module, called["body"][0], count * rounds, chip)
        elif opcode == "call":
            yield from _charges(module, called["to_apply"][0], count, chip)
        elif opcode == "conditional":
            branches = [
                list(_charges(module, name, count, chip))
                for names in called.values()
                for name in names
            ]
            yield from max(branches, key=lambda branch: sum(c.cycles for c in branch))
        elif instruction.cycles is not None:
            kind = _kind(module, instruction)
            yield Charge(instruction, kind, count, count * instruction.cycles, estimated=True)
        elif opcode in ("copy-start", "slice-start", "async-start"):
            # Overlaps with computation.
            yield Charge(instruction, "data movement", count, 0, estimated=True)
        elif not (opcode == "custom-call" and instruction.target in _FREE_TARGETS):
            size = shape_bytes(instruction.shape)
            size += sum(shape_bytes(shapes[name]) for name in instruction.operands)
            seconds = max(size / chip.bandwidth, instruction.flops / chip.peak("bf16"))
            cycles = count * math.ceil(seconds * chip.clock)
            yield Charge(instruction, _kind(module, instruction), count, cycles, estimated=False)


def _rounds(module: Module, loop: Instruction) -> int:
    """The trip count of a loop, whose condition compares a counter from 0 with a constant."""
    condition = module.computations[loop.called["condition"][0]]
    constants = [int(i.constant) for i in condition if i.opcode == "constant"]
    if "compare" not in _opcodes(module, condition[-1]) or len(constants) != 1:
        raise ValueError(f"cannot read how often the loop {loop.name} runs from its condition")
    return constants[0]


def _kind(module: Module, instruction: Instruction) -> str:
    if OPTIMIZER_SCOPE in instruction.op_name.split("/"):
        return "optimizer"
    opcodes = _opcodes(module, instruction)
    if opcodes & _MATMULS or instruction.flops:
        return "matmul"
    return "data movement" if opcodes <= _MOVES | _FREE else "elementwise"


def _opcodes(module: Module, instruction: Instruction) -> set[str]:
    if instruction.opcode != "fusion":
        return {instruction.opcode}
    return {
        opcode
        for name in instruction.called["calls"]
        for inner in module.computations[name]
        for opcode in _opcodes(module, inner)
    }


def by_kind(found: list[Charge]) -> dict[str, float]:
    """Cycles of each of `KINDS`."""
    totals = collections.Counter({kind: 0.0 for kind in KINDS})
    for charge in found:
        totals[charge.kind] += charge.cycles
    return dict(totals)
