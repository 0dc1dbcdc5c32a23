"""What an instruction must do at least: bytes to and from HBM, and products on the matrix unit."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator

from bipft_jax.pods.chips import Chip
from bipft_jax.pods.hlo import (
    Instruction,
    Module,
    dimensions,
    element_type,
    elements,
    memory_bytes,
)

_RENAMING = frozenset({"bitcast", "reshape", "copy", "transpose"})  # of whole operands
_SLICING = frozenset({"slice", "dynamic-slice", "gather"})
# Bfloat16 products in which a float32 product of higher precision is computed.
_PASSES = {"high": 3, "highest": 6}


def hbm_bytes(module: Module, computation: str, instruction: Instruction) -> int:
    """Bytes that an instruction reads from and writes to HBM. Arrays in VMEM are free, and of an
    array of which only slices are read or written, only these count.

    computation: the one of the instruction.
    """
    shapes = {other.name: other.shape for other in module.computations[computation]}
    operands = [shapes[name] for name in instruction.operands]
    opcode, written = instruction.opcode, memory_bytes(instruction.shape)
    if opcode == "copy-start":  # (result, operand, context)
        return sum(map(memory_bytes, elements(instruction.shape)[:2]))
    if opcode == "async-start" and "gather" in instruction.name:  # on v6e's SparseCores
        inside = module.computations[instruction.called["calls"][0]]
        return 2 * _stored(inside[-1].shape)
    if instruction.name.startswith("async-collective-done"):
        return 0  # counted where the collective starts
    if opcode in ("fusion", "async-start"):
        inside, (taken, given) = instruction.called["calls"][0], _own(instruction)
        return _read(module, inside, operands, taken) + _written(module, inside, instruction, given)
    if opcode in _SLICING:
        return written + (_stored(instruction.shape) if memory_bytes(operands[0]) else 0)
    if opcode == "dynamic-update-slice":
        update = memory_bytes(operands[1])
        return update + (_stored(operands[1]) if written else 0)
    if opcode in ("send", "recv"):  # (array, context, token)
        return memory_bytes(elements(instruction.shape)[0])
    if opcode.endswith("-start"):  # of a collective: operands are elements of the result
        return written
    return written + sum(map(memory_bytes, operands))


def product_seconds(module: Module, instruction: Instruction, chip: Chip) -> float:
    """Seconds of an instruction's products at the chip's peak for the type of their operands. A
    kernel's declared FLOPs count as bfloat16."""
    seconds = instruction.flops / chip.peak("bf16")
    if instruction.opcode == "fusion":
        for name in instruction.called["calls"]:
            for inner in module.computations[name]:
                if inner.opcode == "fusion":
                    seconds += product_seconds(module, inner, chip)
                elif inner.opcode in ("convolution", "dot"):
                    seconds += _product(module.computations[name], inner, chip)
    return seconds


def _stored(shape: str) -> int:
    """Bytes of a shape in HBM, wherever it is: of the part of an array that is read or replaced."""
    return memory_bytes(re.sub(r"S\(\d+\)", "", shape))


def _own(instruction: Instruction) -> tuple[range, range]:
    """The numbers of a fusion's own operands and results. The others, if any, are the buffers of an
    asynchronous collective, which go through the fusions that run beside it."""

    def numbers(name: str) -> range:
        first, last = (
            re.search(rf'"{name}_original_{end}":"(\d+)"', instruction.attributes)
            for end in ("start", "end")
        )
        return range(int(first[1]) if first else 0, int(last[1]) + 1 if last else sys.maxsize)

    return numbers("operand"), numbers("output_tuple")


def _read(module: Module, computation: str, operands: list[str], own: range) -> int:
    """Bytes that a fused computation reads of its own operands; all are given by their shapes."""
    total = 0
    for inner in module.computations[computation]:
        if inner.opcode != "parameter" or int(inner.argument) not in own:
            continue
        number = int(inner.argument)
        # What v6e starts on its SparseCores names no operands.
        whole = memory_bytes(operands[number] if number < len(operands) else inner.shape)
        if whole:
            uses = [_WHOLE if use is None else use for use in _uses(module, computation, inner)]
            total += min(whole, sum(uses))
    return total


_WHOLE = math.inf


def _uses(module: Module, computation: str, value: Instruction) -> Iterator[float | None]:
    """For each use of a value inside a computation the bytes that are read of it, `_WHOLE` for all,
    or None where it is the result."""
    instructions = module.computations[computation]
    if instructions[-1] is value:
        yield None
    for user in instructions:
        for place, operand in enumerate(user.operands):
            if operand != value.name:
                continue
            if user.opcode in _SLICING and place == 0:
                yield _stored(user.shape)
            elif user.opcode == "dynamic-update-slice" and place == 0:
                yield 0
            elif user.opcode in _RENAMING or user.opcode == "tuple":
                yield from _uses(module, computation, user)
            elif user.opcode == "fusion":
                inside = user.called["calls"][0]
                for use in _uses(module, inside, _parameter(module, inside, place)):
                    if use is None:
                        yield from _uses(module, computation, user)
                    else:
                        yield use
            else:
                yield _WHOLE


def _parameter(module: Module, computation: str, number: int) -> Instruction:
    return next(
        inner
        for inner in module.computations[computation]
        if inner.opcode == "parameter" and int(inner.argument) == number
    )


def _written(module: Module, computation: str, instruction: Instruction, own: range) -> int:
    """Bytes that a fusion, or what an asynchronous instruction starts, writes of its results."""
    by_name = {inner.name: inner for inner in module.computations[computation]}
    root = module.computations[computation][-1]
    if instruction.opcode == "async-start":
        return memory_bytes(root.shape)
    results = elements(instruction.shape)
    roots = [root] * len(results)  # a reduction or sort of several arrays has several results
    if root.opcode == "tuple":
        roots = [by_name[name] for name in root.operands]
    total = 0
    for number, (inner, shape) in enumerate(zip(roots, results, strict=True)):
        if number not in own:
            continue
        while inner.opcode in _RENAMING and inner.operands[0] in by_name:
            inner = by_name[inner.operands[0]]
        if inner.opcode == "dynamic-update-slice" and memory_bytes(shape):
            total += _stored(by_name[inner.operands[1]].shape)
        else:
            total += memory_bytes(shape)
    return total


def _product(instructions: list[Instruction], product: Instruction, chip: Chip) -> float:
    shapes = {inner.name: inner.shape for inner in instructions}
    left, right = (shapes[name] for name in product.operands)
    types = {element_type(left), element_type(right)}
    precision = re.search(r"operand_precision=\{(\w+)", product.attributes)
    passes = _PASSES.get(precision[1], 1) if precision and types == {"f32"} else 1
    peak = chip.peak(types.pop() if len(types) == 1 else "bf16")
    return passes * operations(left, right, product) / peak


def operations(left: str, right: str, product: Instruction) -> int:
    """Multiplications and additions of a product: 2 x those pairs of elements that meet. Batched
    products are convolutions with dilated windows, in which most positions meet nothing.

    left, right: shapes of the operands.
    """
    if product.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)[1]
        lengths = dimensions(left)
        depth = math.prod(lengths[int(axis)] for axis in contracted.split(",") if axis)
        return 2 * math.prod(dimensions(product.shape)) * depth
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
    image, kernel, result = (
        dict(zip(label, dimensions(shape)))
        for label, shape in zip(labels.groups(), (left, right, product.shape), strict=True)
    )
    total = 2 * result["b"] * result["f"] * kernel["i"]
    for axis, window in enumerate(_windows(product.attributes, len(image) - 2)):
        place = str(axis)
        total *= _meetings(image[place], result[place], kernel[place], **window)
    return total


def _windows(attributes: str, axes: int) -> list[dict[str, int]]:
    """Stride, padding and dilation of a convolution along each spatial axis."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in text[1].split()) if text else {}

    def along(name: str, default: str) -> list[str]:
        return given[name].split("x") if name in given else [default] * axes

    return [
        {"stride": int(stride), "before": int(pad.split("_")[0]), "spread": int(spread)}
        for stride, pad, spread in zip(
            along("stride", "1"), along("pad", "0_0"), along("lhs_dilate", "1"), strict=True
        )
    ]


def _meetings(image: int, result: int, kernel: int, stride: int, before: int, spread: int) -> int:
    """Pairs (place of the result, place of the kernel) that meet an element of the image, whose
    elements are `spread` apart."""
    places = (at * stride - before + tap for at in range(result) for tap in range(kernel))
    return sum(0 <= place <= (image - 1) * spread and place % spread == 0 for place in places)
