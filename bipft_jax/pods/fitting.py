"""What fits: the cheapest rematerialisation, and the most sequences on a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bipft_jax.models.remat import REMAT_POLICIES
from bipft_jax.pods.compiler import CompilationError
from bipft_jax.pods.programs import compiled
from bipft_jax.pods.setting import Setting, changed, setting_of
from bipft_jax.training import sharding

_ROWS = 8  # of a micro-batch: a TPU's sublanes
_TRIES = 6  # programs compiled in search of the most rows
_CLOSE = 1 / 16  # of the rows: the search ends when no more can be won


@dataclasses.dataclass(frozen=True)
class Fit:
    """remat: the first policy of `REMAT_POLICIES`, which store less and less, with which the
    config's batch fits; None if none does. rows: the most sequences on a device that fit with it,
    of those that were tried. bytes: of HBM that they take."""

    remat: str | None
    rows: int
    bytes: int


def fit(setting: Setting, say: Callable[[str], None]) -> Fit:
    """Compiles the update with each policy until one fits, then with more and more sequences."""
    for remat in REMAT_POLICIES:
        size = _bytes(setting, remat, setting.rows, say)
        if size is not None:
            return _most(setting, remat, size, say)
    return Fit(None, 0, 0)


def _most(setting: Setting, remat: str, size: int, say: Callable[[str], None]) -> Fit:
    """Tries as many rows as fit by the line through the last two sizes, and halves what is between
    the most that fit and the least that do not. size: of the config's rows."""
    step, rows = _ROWS * setting.config.accumulation, setting.rows
    too_many, wanted = None, 2.0 * rows
    for _ in range(_TRIES):
        tried = max(int(wanted) // step * step, rows + step)
        if too_many is not None and tried >= too_many:
            break
        larger = _bytes(setting, remat, tried, say)
        if larger is None:
            too_many = tried
            wanted = (rows + too_many) / 2
        else:
            slope = (larger - size) / (tried - rows)
            rows, size = tried, larger
            wanted = rows + (setting.chip.hbm - size) / slope if slope > 0 else 2.0 * rows
            if too_many is not None:
                wanted = min(wanted, (rows + too_many) / 2)
        if wanted - rows < _CLOSE * rows:
            break
    return Fit(remat, rows, size)


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
