"""Rehearsals of a run: `train` does all that it does, but its large programs are only traced.

What the keys of a config make of a run is seen so in a second or two: in the program of its update,
in what the program is called with, in what is logged and what is written. Programs of a random key
or of token ids are not computed. Parameters that are drawn from a key come out as 1 + its seed
everywhere, which shows whose they are; other results are ones, an update's metrics zeros, and its
state is the one that it was called with, a step further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from bipft_jax.models.parameters import named_leaves
from bipft_jax.training.state import TrainState
from bipft_jax.training.telemetry import read_metrics

MOST_UPDATES = 50


@dataclasses.dataclass
class Update:
    """One update. program: what was traced; arguments: what it was called with, the state first."""

    program: jax.stages.Traced
    arguments: tuple[Any, ...]

    @property
    def params(self) -> dict[str, jax.Array]:
        """By name, before the update."""
        return named_leaves(self.arguments[0].params)

    @property
    def batch(self) -> dict[str, jax.Array]:
        return next(x for x in self.arguments if _is_batch(x))

    @property
    def teacher(self) -> dict[str, jax.Array]:
        """The teacher's parameters by name; empty without a teacher."""
        others = [x for x in self.arguments[1:] if isinstance(x, dict) and not _is_batch(x)]
        return named_leaves(others[0]) if others else {}

    @property
    def metrics(self) -> set[str]:
        return set(self.program.out_info[1])

    @property
    def seeds(self) -> list[int]:
        """Of the random numbers that the program draws: its own, or a number it is called with."""
        own = [x for e in self.equations("random_seed") for x in e.invars if hasattr(x, "val")]
        called_with = [x for x in self.arguments if isinstance(x, jax.Array) and x.ndim == 0]
        return [int(x.val) for x in own] + [int(x) for x in called_with]

    def equations(self, primitive: str = "") -> list[Any]:
        """Those of the program, inside of loops and branches too; of one primitive, if named."""
        every = _equations(self.program.jaxpr.jaxpr)
        return [e for e in every if primitive in ("", e.primitive.name)]

    @property
    def draws(self) -> int:
        """In how many places the program draws random numbers."""
        return len(self.equations("random_bits"))


@dataclasses.dataclass(eq=False, repr=False)
class Rehearsal:
    """What was seen of a run.

    skipping: whether all its updates were skipped. evaluated: all batches that were evaluated on.
    traces: after how many updates a trace of the profiler began and ended. workers: processes that
    were to make batches. whole: whether it came to its end.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    skipping: bool
    updates: list[Update] = dataclasses.field(default_factory=list)
    evaluated: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    traces: list[int] = dataclasses.field(default_factory=list)
    workers: int = 0
    whole: bool = False

    @property
    def first(self) -> Update:
        return self.updates[0]

    def logged(self, name: str, directory: str = "") -> dict[int, float]:
        """The values of one name in metrics.jsonl by update."""
        path = self.workdir / directory / "metrics.jsonl"
        points = read_metrics(path) if path.exists() else []
        return {point["step"]: point[name] for point in points if name in point}


class _Enough(Exception):
    """Ends a rehearsal of which only the first update is wanted."""


@dataclasses.dataclass
class _Rehearsed:
    """Stands for a jitted function of the library."""

    function: Any
    seen: Rehearsal
    only_first: bool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with jax.transfer_guard("allow"):  # the library's own transfers are not at stake here
            return self._called(*arguments, **options)

    def _called(self, *arguments: Any, **options: Any) -> Any:
        key = next((x for x in arguments if _is_key(x)), None)
        batches = [x for x in arguments if _is_batch(x)]
        if key is None and not batches and not any(map(_are_ids, arguments)):
            return self.function(*arguments, **options)
        program = self.function.trace(*arguments, **options)
        result = program.out_info
        if isinstance(arguments[0], TrainState):
            if isinstance(result[0], TrainState):
                return self._updated(program, arguments)
        else:
            self.seen.evaluated += jax.device_get(batches)
        value = 1 if key is None else 1 + int(jax.random.key_data(key)[-1])
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), result)

    def _updated(self, program: jax.stages.Traced, arguments: tuple[Any, ...]) -> Any:
        self.seen.updates.append(Update(program, arguments))
        assert len(self.seen.updates) <= MOST_UPDATES, "the run does not end where it should"
        if self.only_first:
            raise _Enough
        state, skipped = arguments[0], jnp.int32(self.seen.skipping)
        in_row = skipped * (state.skipped_in_row + 1)
        state = state.replace(step=state.step + 1, skipped_in_row=in_row)
        metrics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), program.out_info[1])
        return state, {**metrics, "skipped": skipped.astype(jnp.float32)}


def rehearse(
    train: Callable[[ml_collections.ConfigDict, str], Any],
    config: ml_collections.ConfigDict,
    workdir: Path,
    *,
    skipping: bool = False,
    only_first: bool = False,
) -> Rehearsal:
    """Runs `train(config, workdir)`.

    skipping: every update reports that it was skipped, which should end the run. only_first: the
    run ends with its first update.
    """
    seen, jit = Rehearsal(config, workdir, skipping), jax.jit

    def rehearsed(function: Any, **options: Any) -> Any:
        program = jit(function, **options)
        whose = getattr(function, "func", function)  # of functools.partial
        if not getattr(whose, "__module__", "").startswith("bipft_jax"):
            return program
        return _Rehearsed(program, seen, only_first)

    def prefetched(dataset: Any, options: grain.MultiprocessingOptions, *_: Any) -> Any:
        seen.workers = options.num_workers
        return dataset

    def note(*_: Any) -> None:
        seen.traces.append(len(seen.updates))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", rehearsed)
        patch.setattr(grain.IterDataset, "mp_prefetch", prefetched)
        patch.setattr(jax.profiler, "start_trace", note)
        patch.setattr(jax.profiler, "stop_trace", note)
        try:
            train(config, str(workdir))
            seen.whole = True
        except _Enough:
            pass
        except FloatingPointError:
            if not skipping:
                raise
    return seen


def _is_batch(x: Any) -> bool:
    return isinstance(x, dict) and "input_ids" in x


def _are_ids(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and x.ndim > 1 and x.dtype == np.int32


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
