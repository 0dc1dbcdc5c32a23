"""What fits: the cheapest rematerialisation, and the most sequences on a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bipft_jax.models.remat import REMAT_POLICIES
from bipft_jax.pods.compiler import CompilationError
from bipft_jax.pods.programs import compiled
from bipft_jax.pods.setting import Setting, changed, setting_of
from bipft_jax.training import sharding

_ROWS = 8  # of a micro-batch: the search's step, a TPU's sublanes


@dataclasses.dataclass(frozen=True)
class Fit:
    """remat: the first policy of `REMAT_POLICIES`, which store less and less, with which the
    config's batch fits; None if none does. rows: the most sequences on a device with it, to within
    8 of each micro-batch. bytes: of HBM that they take."""

    remat: str | None
    rows: int
    bytes: int


def fit(setting: Setting, say: Callable[[str], None]) -> Fit:
    """Compiles the update until the answer is known: once for each policy that does not fit, and a
    few times with more sequences. Memory is taken to be linear in the sequences, then checked."""
    for remat in REMAT_POLICIES:
        first = _bytes(setting, remat, setting.rows, say)
        if first is not None:
            return _most(setting, remat, first, say)
    return Fit(None, 0, 0)


def _most(setting: Setting, remat: str, first: int, say: Callable[[str], None]) -> Fit:
    step, rows, hbm = _ROWS * setting.config.accumulation, setting.rows, setting.chip.hbm
    largest, used = rows, first  # that fit
    smallest = None  # that do not
    wanted = 2 * rows
    while smallest is None or largest + step < smallest:
        size = _bytes(setting, remat, wanted, say)
        if size is None:
            smallest = wanted
        else:
            slope = (size - used) / (wanted - largest)
            largest, used = wanted, size
        if smallest is None:
            # As many as fit by the line through the last two sizes, and a step for what it misses.
            more = int((hbm - used) / slope) if slope > 0 else largest
            wanted = largest + max(step, more // step * step)
        else:
            wanted = largest + max(step, (smallest - largest) // 2 // step * step)
    return Fit(remat, largest, used)


def _bytes(setting: Setting, remat: str, rows: int, say: Callable[[str], None]) -> int | None:
    """Bytes that the update takes with so many sequences on a device; None if they do not fit."""
    config = changed(setting, remat=remat, batch_size=rows * sharding.batch_shards(setting.mesh))
    vocabulary = setting.learner.model.config.vocab_size
    other = setting_of(config, setting.topology, setting.slices, vocabulary, setting.length)
    say(f"fitting: remat {remat}, {rows} sequences on a device")
    try:
        total = compiled(other.update(), other.mesh, other.chip).memory.total
    except CompilationError as error:
        if not error.memory:
            raise
        return None
    return total if total <= setting.chip.hbm else None
