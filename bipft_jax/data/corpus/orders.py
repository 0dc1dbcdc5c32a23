"""Random orders of an epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from grain.experimental import index_shuffle

# grain's index_shuffle needs no memory, but takes milliseconds per index for few indices.
_FEW = 2**14


def permutation(count: int, entropy: np.random.SeedSequence) -> Callable[[int], int]:
    """A random permutation of 0 .. count - 1, as a function of the position."""
    if count <= _FEW:
        keys = np.random.Philox(entropy).random_raw(count)
        return np.argsort(keys, kind="stable").tolist().__getitem__
    seed = int(entropy.generate_state(1)[0])
    return functools.partial(index_shuffle, max_index=count - 1, seed=seed, rounds=4)
