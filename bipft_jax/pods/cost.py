"""The cost of a compiled program on one TPU chip, from the compiler's own schedule.

An instruction costs the longest of three times, which are taken to overlap perfectly:
- its *bundles*, one a cycle, in loops as often as these run (`bundles`);
- its *products* at the matrix unit's peak for their type (`work.product_seconds`);
- its *memory* traffic: bytes to and from HBM at the chip's bandwidth (`work.hbm_bytes`).

Collectives and Pallas kernels follow the same rule; time on the network is not in it. Asynchronous
copies run beside other instructions. But a loop's body cannot end before all its bytes are moved:
what they take longer than its instructions is charged as *transfers*. A conditional costs its
longer branch. Start-up of an instruction and waits are not charged, so this is a lower bound,
though a close one for large instructions.

The compiler's `estimated_cycles` are summed beside it, with such a roofline where it gives none.
They are a heuristic from before code generation: up to 4 times too high for elementwise work and
2.4 times for int8 products, too low for transcendental functions after a product.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

from bipft_jax.pods import hlo, work
from bipft_jax.pods.bundles import Schedule
from bipft_jax.pods.chips import Chip
from bipft_jax.pods.compiler import Program
from bipft_jax.training.step import OPTIMIZER_SCOPE

KINDS = ("matmul", "elementwise", "data movement", "optimizer", "transfers")

_MATMULS = frozenset({"convolution", "dot"})
_MOVES = frozenset(
    "copy transpose reshape slice dynamic-slice dynamic-update-slice pad concatenate broadcast "
    "reverse gather scatter convert parameter constant tuple get-tuple-element bitcast iota "
    "all-gather all-to-all collective-permute send recv".split()
)
_Signature = tuple  # nested, hashable


@dataclasses.dataclass(frozen=True)
class Charge:
    """One instruction's share of the cost, of all its executions, in cycles.

    kind: of `KINDS`. source: "file:line". module: of the model and its pass (see `hlo.scope`), or
    "optimizer". count: executions. cycles: charged. bundles: issued, or None for an instruction
    without a schedule. products, memory: the other two bounds. unknown_loops: in the schedule,
    counted once. estimated_cycles: the compiler's heuristic, or a roofline.
    """

    instruction: hlo.Instruction
    kind: str
    source: str
    module: str
    count: int
    cycles: float
    bundles: float | None
    products: float
    memory: float
    unknown_loops: int
    estimated_cycles: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a program on a chip. charges: costliest first."""

    charges: tuple[Charge, ...]

    @property
    def cycles(self) -> float:
        """Cycles of one execution."""
        return sum(charge.cycles for charge in self.charges)

    def seconds(self, chip: Chip) -> float:
        """Seconds of one execution at the chip's assumed clock. For another clock of its
        `clock_range`, ask `of` again with `dataclasses.replace(chip, clock=...)`: products and
        memory take seconds that do not depend on it."""
        return self.cycles / chip.clock

    @property
    def estimated_cycles(self) -> float:
        """The sum of the compiler's heuristic."""
        return sum(charge.estimated_cycles for charge in self.charges)

    @property
    def memory(self) -> float:
        """Cycles that all traffic with HBM takes, asynchronous copies included."""
        return sum(charge.memory for charge in self.charges)

    @property
    def by_kind(self) -> dict[str, float]:
        """Cycles of each of `KINDS`."""
        return {kind: 0.0 for kind in KINDS} | self._sums(lambda charge: charge.kind)

    @property
    def by_source(self) -> dict[str, float]:
        """Cycles by source line, most first."""
        return self._sums(lambda charge: charge.source)

    @property
    def by_module(self) -> dict[str, float]:
        """Cycles by module and pass, most first."""
        return self._sums(lambda charge: charge.module)

    @property
    def unscheduled(self) -> tuple[Charge, ...]:
        """Charges of instructions without a schedule: their products or memory or, where both are
        0, the compiler's heuristic. Many are operations on scalars."""
        missing = (charge for charge in self.charges if charge.bundles is None and charge.cycles)
        return tuple(charge for charge in missing if charge.kind != "transfers")

    def _sums(self, name: Callable[[Charge], str]) -> dict[str, float]:
        totals: collections.Counter[str] = collections.Counter()
        for charge in self.charges:
            totals[name(charge)] += charge.cycles
        return dict(totals.most_common())


def of(program: Program, chip: Chip) -> Cost:
    """The cost of a compiled program on one chip.

    Raises: ValueError for a while loop whose trip count cannot be read.
    """
    reader = _Reader(program, chip)
    charges = reader.charges(program.module.entry, 1)
    return Cost(tuple(sorted(charges, key=lambda charge: charge.cycles, reverse=True)))


class _Reader:
    """Charges the instructions of one program."""

    def __init__(self, program: Program, chip: Chip):
        self._module, self._chip = program.module, chip
        self._schedules = dict(program.schedules)
        # The compiler writes one schedule for instructions that do the same.
        same: dict[_Signature, Schedule] = {}
        named: list[tuple[str, _Signature]] = []
        for computation in self._module.computations.values():
            shapes = {instruction.name: instruction.shape for instruction in computation}
            for instruction in filter(hlo.executes, computation):
                signature = self._signature(instruction, shapes)
                named.append((instruction.name, signature))
                if instruction.name in self._schedules:
                    same[signature] = self._schedules[instruction.name]
        for name, signature in named:
            if signature in same:
                self._schedules.setdefault(name, same[signature])

    def _signature(self, instruction: hlo.Instruction, shapes: dict[str, str]) -> _Signature:
        """What instructions have in common that do the same with arrays of the same form."""
        inside = []
        for name in instruction.called.get("calls", ()):
            computation = self._module.computations[name]
            inner = {other.name: other.shape for other in computation}
            inside += [self._signature(other, inner) for other in computation]
        return (
            instruction.opcode,
            instruction.shape,
            tuple(shapes[name] for name in instruction.operands),
            tuple(inside),
        )

    def charges(self, computation: str, count: int) -> list[Charge]:
        """Those of a computation that is executed `count` times, with all that it runs."""
        own, inner = [], []
        for instruction in self._module.computations[computation]:
            if instruction.opcode == "while":
                rounds = hlo.rounds(self._module, instruction)
                inner += self.charges(hlo.bodies(instruction)[0], count * rounds)
            elif instruction.opcode in hlo.CONTROL:
                branches = [self.charges(name, count) for name in hlo.bodies(instruction)]
                inner += max(branches, key=lambda branch: sum(c.cycles for c in branch))
            elif hlo.executes(instruction):
                own.append(self._charge(computation, instruction, count))
        return own + self._transfers(own) + inner

    def _charge(self, computation: str, instruction: hlo.Instruction, count: int) -> Charge:
        chip = self._chip
        products = work.product_seconds(self._module, instruction, chip) * chip.clock
        traffic = work.hbm_bytes(self._module, computation, instruction)
        memory = traffic / chip.bandwidth * chip.clock
        schedule = self._schedules.get(instruction.name)
        asynchronous = _asynchronous(instruction)
        estimated = 0.0 if asynchronous else instruction.estimated_cycles
        if estimated is None:
            estimated = max(products, memory)
        if asynchronous:
            cycles = 0.0
        elif schedule is not None:
            cycles = max(schedule.cycles, products, memory)
        else:
            cycles = max(products, memory) or estimated
        kind = self._kind(instruction)
        return Charge(
            instruction,
            kind,
            hlo.source(self._module, instruction),
            kind if kind == "optimizer" else hlo.scope(instruction),
            count,
            cycles=count * cycles,
            bundles=None if schedule is None else count * schedule.cycles,
            products=count * products,
            memory=count * memory,
            unknown_loops=0 if schedule is None else schedule.unknown_loops,
            estimated_cycles=count * estimated,
        )

    def _transfers(self, charges: list[Charge]) -> list[Charge]:
        """What asynchronous copies take longer than the instructions of their computation, in the
        name of the largest of them."""
        late = sum(charge.memory - charge.cycles for charge in charges)
        copies = [c for c in charges if _asynchronous(c.instruction) and c.memory]
        if late <= 0 or not copies:
            return []
        largest = max(copies, key=lambda copy: copy.memory)
        charge = dataclasses.replace(largest, kind="transfers", cycles=late, memory=0.0)
        return [charge]

    def _kind(self, instruction: hlo.Instruction) -> str:
        if OPTIMIZER_SCOPE in instruction.op_name.split("/"):
            return "optimizer"
        opcodes = hlo.opcodes(self._module, instruction)
        if opcodes & _MATMULS or instruction.flops:
            return "matmul"
        if _asynchronous(instruction) or opcodes <= _MOVES:
            return "data movement"
        return "elementwise"


def _asynchronous(instruction: hlo.Instruction) -> bool:
    """Whether an instruction begins a copy or a transfer that runs beside others."""
    return instruction.opcode.endswith("-start") or instruction.opcode in ("send", "recv")
