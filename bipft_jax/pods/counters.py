"""Values of the scalar counters of a scheduled loop, and with them which branches it takes.

A loop over windows of its operands fetches the first and writes the last in rounds of their own,
and finishes a result only in the last round of a sum: most of its body is behind branches. The dump
names scalars once each (`%s22_s3 = sadd.s32 1, %s21_s2`), so their values in each round follow from
those before.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

_NAME = r"[sp]\d+_[sp]\d+"
# A condition may come first: (%p), or (%p, %other) with the value that it leaves otherwise.
_DEFINITION = re.compile(
    rf"%({_NAME}) = ([a-z][\w.]*) (?:\((!?)%({_NAME})(?:, %({_NAME}))?\), )?([^;{{}}]*)"
)
_STORE = re.compile(rf"sst \[smem:\[#(\w+_spill)\]\] %({_NAME})")
_SLOT = re.compile(r"\[smem:\[#(\w+_spill)\]\]")
_OPERAND = re.compile(rf"%({_NAME})|(?<![\w%])(\d+)\b")
_COMMENT = re.compile(r"/\*.*?\*/|/\*.*$")

_WORD = 2**32


def _signed(value: int) -> int:
    return value - _WORD if value >= _WORD // 2 else value


_OPERATIONS: dict[str, Callable[..., int]] = {
    "smov.u32": lambda a: a,
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "smulhi.u32": lambda a, b: a * b >> 32,
    "sshll.u32": lambda a, b: a << b,
    "sshrl.u32": lambda a, b: a >> b,
    "sshra.s32": lambda a, b: _signed(a) >> b,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "pand": lambda a, b: a & b,
    "pnand": lambda a, b: 1 - (a & b),
    "por": lambda a, b: a | b,
    "pnor": lambda a, b: 1 - (a | b),
    "pxor": lambda a, b: a ^ b,
    "pneg": lambda a: 1 - a,
    "pmov": lambda a: a,
    "scalar_select": lambda condition, a, b: a if condition else b,
}
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _compare = getattr(operator, _name)
    _OPERATIONS[f"scmp.{_name}.u32.totalorder"] = lambda a, b, f=_compare: int(f(a, b))
    _OPERATIONS[f"scmp.{_name}.s32.totalorder"] = lambda a, b, f=_compare: int(
        f(_signed(a), _signed(b))
    )


class Counters:
    """The scalars of one instruction's schedule, in the rounds of one loop.

    bundles: texts. begin, end: first bundle of the loop and the one after its last, those that are
    issued after its branch back included.
    """

    def __init__(self, bundles: list[str], begin: int, end: int):
        self._begin = begin
        self._defined: dict[str, tuple[int, re.Match[str]]] = {}
        self._stores: dict[str, list[tuple[int, str]]] = {}
        self._known: dict[tuple[str, int], int | None] = {}
        for row, text in enumerate(bundles[:end]):
            text = _COMMENT.sub("", text)
            for definition in _DEFINITION.finditer(text):
                self._defined.setdefault(definition[1], (row, definition))
            for slot, name in _STORE.findall(text):
                self._stores.setdefault(slot, []).append((row, name))

    def value(self, name: str, turn: int) -> int | None:
        """The value of a scalar in a round (from 0), or None if it cannot be followed. Ask for
        rounds in order: each value follows from that of the round before."""
        if (name, turn) not in self._known:
            self._known[name, turn] = None  # of what depends on itself in one round
            self._known[name, turn] = self._computed(name, turn)
        return self._known[name, turn]

    def _computed(self, name: str, turn: int) -> int | None:
        if name not in self._defined:
            return None
        row, definition = self._defined[name]
        _, operation, negated, condition, otherwise, text = definition.groups()
        if operation == "sld":
            return self._loaded(row, text, turn)
        operands = [(operand, int(number or 0)) for operand, number in _OPERAND.findall(text)]
        if operation in ("sphi", "pphi"):
            if row != self._begin or len(operands) != 2:
                return None
            return self.value(operands[1][0], turn - 1) if turn else self._operand(operands[0], 0)
        if condition:
            holds, other = self.value(condition, turn), self.value(otherwise or "", turn)
            if holds is None:
                return None
            if bool(holds) == bool(negated):
                return other
        values = [self._operand(operand, turn) for operand in operands]
        if operation not in _OPERATIONS or None in values:
            return None
        try:
            return _OPERATIONS[operation](*values) % _WORD
        except TypeError:  # a form with other operands than this knows
            return None

    def _operand(self, operand: tuple[str, int], turn: int) -> int | None:
        name, number = operand
        return self.value(name, turn) if name else number % _WORD

    def _loaded(self, row: int, text: str, turn: int) -> int | None:
        """What a register that was spilled to memory holds: the store before in this round, else
        the last of the round before, else that before the loop."""
        slot = _SLOT.search(text)
        stores = self._stores.get(slot[1], []) if slot else []
        inside = [(at, name) for at, name in stores if at >= self._begin]
        before = [name for at, name in inside if at < row]
        if before:
            return self.value(before[-1], turn)
        if inside and turn:
            return self.value(inside[-1][1], turn - 1)
        outside = [name for at, name in stores if at < self._begin]
        return self.value(outside[-1], 0) if outside else None
