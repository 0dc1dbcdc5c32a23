"""The time of a step: computation by the compiler's schedule, with the modelled collectives beside.

The schedule is walked in order. Computation advances the clock. A collective starts when the clock
has come to it and the network (within slices, and between them) is free; a synchronous one, and the
end of an asynchronous one, wait until it has finished. A loop's rounds are alike, and nothing of
one round runs beside the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bipft_jax.pods import collectives, hlo
from bipft_jax.pods.collectives import Collective
from bipft_jax.pods.network import DCN_LATENCY, Seconds


@dataclasses.dataclass(frozen=True)
class Timed:
    """A collective in a step.

    count: how often it runs. in_loop: whether in a loop. seconds: of one run. beside: seconds of
    computation between its start and its end; 0 for a synchronous one. hidden: the part of its own
    time that this hides.
    """

    collective: Collective
    count: int
    in_loop: bool
    seconds: Seconds
    beside: float
    hidden: float


@dataclasses.dataclass(frozen=True)
class Step:
    """The time of a step, seconds: `compute`, and `exposed`, in which it waits for collectives."""

    compute: float
    exposed: float
    collectives: tuple[Timed, ...]

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.exposed

    @property
    def communication(self) -> Seconds:
        """Of all collectives, whether hidden or not."""
        return Seconds(
            sum(timed.count * timed.seconds.ici for timed in self.collectives),
            sum(timed.count * timed.seconds.dcn for timed in self.collectives),
        )


def step_of(
    module: hlo.Module,
    compute: Mapping[str, float],
    partitions: int,
    seconds: Callable[[Collective], Seconds],
) -> Step:
    """Walks a scheduled program.

    Arguments:
      compute: seconds of computation of one run of an instruction, by its name; none if absent. A
        collective's own instruction takes no other time than `seconds`.
      partitions: of the program, in one slice.
      seconds: the modelled time of a collective.

    Raises: ValueError for a loop whose trip count cannot be read.
    """
    walker = _Walker(module, compute, partitions, seconds)
    computed, exposed, timed = walker.walk(module.entry, 1, False)
    return Step(computed, exposed, tuple(timed))


class _Walked(NamedTuple):
    """Seconds of one run of a computation, and its collectives."""

    compute: float
    exposed: float
    timed: list[Timed]


@dataclasses.dataclass(frozen=True)
class _Walker:
    module: hlo.Module
    compute: Mapping[str, float]
    partitions: int
    seconds: Callable[[Collective], Seconds]

    def walk(self, name: str, count: int, in_loop: bool) -> _Walked:
        """One run of a computation, of `count` in a step."""
        compute = exposed = 0.0
        ici_free = dcn_free = 0.0  # when each network is free
        timed: list[Timed] = []
        running: dict[str, Collective] = {}
        begun: dict[str, tuple[float, float]] = {}  # computation before, and the end

        def finish(name: str) -> None:
            nonlocal exposed
            collective, (before, end) = running.pop(name), begun.pop(name)
            taken, beside = self.seconds(collective), compute - before
            waited = max(0.0, end - compute - exposed)
            hidden = min(beside, max(0.0, sum(taken) - waited))
            timed.append(Timed(collective, count, in_loop, taken, beside, hidden))
            exposed += waited

        inside = {one.name: one for one in self.module.computations[name]}
        for instruction in inside.values():
            if executed := self._executed(instruction, count, in_loop):
                compute, exposed = compute + executed.compute, exposed + executed.exposed
                timed += executed.timed
            elif collective := collectives.started(self.module, instruction, self.partitions):
                if collective.source == collectives.UNKNOWN:
                    source = collectives.origin(self.module, instruction, inside)
                    collective = dataclasses.replace(collective, source=source)
                taken = self.seconds(collective)
                end = compute + exposed
                if taken.ici:
                    end = ici_free = max(end, ici_free) + taken.ici
                if taken.dcn:  # while one is under way, the next can begin
                    end = max(end, dcn_free) + taken.dcn
                    dcn_free = end - DCN_LATENCY
                running[instruction.name], begun[instruction.name] = collective, (compute, end)
                if not collective.asynchronous:
                    finish(instruction.name)
            else:
                if ended := collectives.ends(self.module, instruction, running):
                    finish(ended)
                compute += self.compute.get(instruction.name, 0.0)
        for unfinished in list(running):
            finish(unfinished)
        return _Walked(compute, exposed, timed)

    def _executed(self, instruction: hlo.Instruction, count: int, in_loop: bool) -> _Walked | None:
        """All rounds of a loop, the longest branch of a conditional, or a call; None for others."""
        if instruction.opcode not in hlo.CONTROL:
            return None
        bodies = hlo.bodies(instruction)
        if instruction.opcode == "while":
            rounds = hlo.rounds(self.module, instruction)
            compute, exposed, timed = self.walk(bodies[0], count * rounds, True)
            return _Walked(compute * rounds, exposed * rounds, timed)
        walked = [self.walk(name, count, in_loop) for name in bodies]
        return max(walked, key=lambda branch: branch.compute + branch.exposed)
