"""Programs as the TPU compiler writes them: the text of an optimised and scheduled HLO module.

Parses the text into instructions with their shapes, source lines and the attributes that costs are
read from.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    shape: in HLO syntax, with its layout. operands: names. called: computations by the attribute
    that names them. frame: number of the stack frame that wrote it, or None. estimated_cycles: the
    compiler's heuristic from before code generation, or None. target: of a custom call. flops:
    declared by a kernel, else 0. argument: number of a parameter, value of a constant. attributes:
    the rest of the line, for what is read seldom.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]
    op_name: str
    frame: int | None
    estimated_cycles: int | None
    target: str
    flops: int
    argument: str
    attributes: str


@dataclasses.dataclass(frozen=True)
class Module:
    """computations: instructions in order, by the computation's name. entry: name of the entry
    computation. locations: "file:line" entries of each stack frame, innermost first."""

    computations: dict[str, list[Instruction]]
    entry: str
    locations: dict[int, list[str]]


_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r":T\(([\d,]+)\)")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations)=(\{[^}]*\}|%[^\s,)]+)"
)
_SECTIONS = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
# Instructions that execute nothing.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota "
    "opt-barrier add-dependency".split()
)
# Custom calls without a schedule: annotations for the compiler, or names of memory.
_FREE_TARGETS = frozenset(
    "AllocateBuffer AssumeGatherIndicesInBound ConcatBitcast GatherScatterIndicesBitpacked "
    "Sharding ZeroCrop".split()
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


def executed(module: Module) -> Iterator[tuple[Instruction, int]]:
    """Every instruction that executes something, and how often: loops as often as they run, and all
    branches of a conditional.

    Raises: ValueError for a while loop whose trip count cannot be read.
    """
    return _executed(module, module.entry, 1)


def _executed(module: Module, computation: str, count: int) -> Iterator[tuple[Instruction, int]]:
    for instruction in module.computations[computation]:
        if instruction.opcode in CONTROL:
            times = rounds(module, instruction) if instruction.opcode == "while" else 1
            for name in bodies(instruction):
                yield from _executed(module, name, count * times)
        elif executes(instruction):
            yield instruction, count


CONTROL = ("while", "call", "conditional")


def bodies(instruction: Instruction) -> list[str]:
    """The computations that an instruction of `CONTROL` runs: a loop's body, the branches of a
    conditional."""
    called = instruction.called
    if instruction.opcode == "while":
        return list(called["body"])
    return [name for names in called.values() for name in names]


def executes(instruction: Instruction) -> bool:
    """Whether an instruction is more than a name, and not the end of an asynchronous one."""
    return not (
        instruction.opcode in _FREE
        or instruction.opcode.endswith(("-done", "-update"))
        or (instruction.opcode == "custom-call" and instruction.target in _FREE_TARGETS)
    )


def rounds(module: Module, loop: Instruction) -> int:
    """The trip count of a loop, whose condition compares a counter from 0 with a constant.

    Raises: ValueError if the condition is another.
    """
    condition = module.computations[loop.called["condition"][0]]
    constants = [int(i.argument) for i in condition if i.opcode == "constant"]
    if "compare" not in opcodes(module, condition[-1]) or len(constants) != 1:
        raise ValueError(f"cannot read how often the loop {loop.name} runs from its condition")
    return constants[0]


def opcodes(module: Module, instruction: Instruction) -> set[str]:
    """The opcode of an instruction; of a fusion, those of the instructions inside."""
    if instruction.opcode != "fusion":
        return {instruction.opcode}
    return {
        opcode
        for name in instruction.called["calls"]
        for inner in module.computations[name]
        for opcode in opcodes(module, inner)
    }


def source(module: Module, instruction: Instruction) -> str:
    """The line of bipft_jax that wrote an instruction, else the innermost one, as "file:line"
    within the package, or "?"."""
    stack = module.locations.get(instruction.frame, [])
    # Our calling line says more than the library's line.
    place = next((place for place in stack if "/bipft_jax/" in place), (stack or ["?"])[0])
    return re.sub(r".*/(bipft_jax|site-packages)/", "", place)


# What jax's transformations and control flow add to the names of modules.
_ADDED = re.compile(
    r".*\(.*|while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation"
)


def scope(instruction: Instruction) -> str:
    """The module of the model whose operation an instruction is and the pass, like
    "bert/encoder/layers/ffn_input backward", or "?". Passes are "forward", "again" (computed once
    more for the backward pass) and "backward"."""
    *names, _ = instruction.op_name.split("/")
    # Flax names a module's own methods "MODULE.METHOD", below MODULE if it is called there.
    modules = [name.partition(".")[0] for name in names if not _ADDED.fullmatch(name)]
    module = "/".join(name for name, _ in itertools.groupby(modules))
    if not module:
        return "?"
    if "rematted_computation" in names:
        return f"{module} again"
    return f"{module} {'backward' if 'transpose(' in instruction.op_name else 'forward'}"


def element_type(shape: str) -> str:
    """The HLO element type of a shape ("bf16"); of a tuple, of its first element."""
    return _SHAPE.search(shape)[1]


def dimensions(shape: str) -> list[int]:
    """The dimensions of a shape; of a tuple, of its first element."""
    return _integers(_SHAPE.search(shape)[2])


def shape_bytes(shape: str) -> int:
    """Bytes of an HLO shape without padding; for a tuple, of all its elements."""
    return sum(
        _bits(element) * math.prod(_integers(dimensions)) // 8
        for element, dimensions, _ in _SHAPE.findall(shape)
    )


def memory_bytes(shape: str) -> int:
    """Bytes that an HLO shape takes in HBM, its tiles filled up; elements in another memory (layout
    S(n)) count 0. For a tuple, of all its elements."""
    total = 0
    for element, text, layout in _SHAPE.findall(shape):
        if "S(" in layout:
            continue
        lengths = _integers(text)
        tile = _TILE.search(layout)
        order = _integers(layout.partition(":")[0])  # minor first
        if tile and order:
            for axis, least in zip(order, reversed(_integers(tile[1]))):
                lengths[axis] = -(-lengths[axis] // least) * least
        total += _bits(element) * math.prod(lengths) // 8
    return total


def _bits(element: str) -> int:
    return _BITS[element] if element in _BITS else int(re.search(r"\d+", element)[0])


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


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
        estimated_cycles=int(cycles[1]) if cycles else None,
        target=_quoted("custom_call_target", plain),
        flops=int(flops[1]) if flops else 0,
        argument=arguments if opcode in ("constant", "parameter") else "",
        attributes=attributes,
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
