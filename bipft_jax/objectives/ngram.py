"""An n-gram model of token ids: the baseline of a language model that looks at few tokens.

Interpolated Kneser-Ney smoothing with one discount for each order (Kneser and Ney 1995, "Improved
backing-off for M-gram language modeling"; the interpolated form and the discounts are those of Chen
and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 2.7):

    p_k(w | c) = max(n(c w) - D_k, 0) / n(c .) + D_k N(c .) / n(c .) * p_{k-1}(w | shorter c)

n(c w) is the number of occurrences at the highest order, and at the lower ones the number of
different tokens before c w. n(c .) is its sum over w, N(c .) the number of w with n(c w) > 0. With
n_1 and n_2 the numbers of k-grams with n = 1 and n = 2, D_k = n_1 / (n_1 + 2 n_2). p_0 is uniform;
after a context that never occurred p_k = p_{k-1}.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class _Order(NamedTuple):
    """The k-grams of one k, as numbers in base `vocab_size`. keys: int64, ascending, with counts
    int64. contexts: their first k - 1 tokens, ascending, with sums and numbers of the counts."""

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    sums: np.ndarray
    kinds: np.ndarray
    discount: float


class NGram:
    """An n-gram model, counted on one stream of tokens."""

    def __init__(self, tokens: np.ndarray, order: int, vocab_size: int):
        """Arguments:
          tokens: ids int [N], in [0, vocab_size).
          order: n, at least 1: predicts from the n - 1 tokens before.

        Raises: ValueError for an order below 1 or one whose n-grams do not fit into 63 bits, or a
          text shorter than n.
        """
        if order < 1 or vocab_size**order >= 2**63:
            largest = next(n for n in range(62, 0, -1) if vocab_size**n < 2**63)
            raise ValueError(
                f"order is {order}: with {vocab_size:,} ids it must be from 1 to {largest}"
            )
        if len(tokens) < order:
            raise ValueError(f"a text of {len(tokens)} tokens has no {order}-gram")
        self.order, self.vocab_size = order, vocab_size
        keys, counts = np.unique(_grams(np.asarray(tokens), order, vocab_size), return_counts=True)
        orders = [_order(keys, counts, vocab_size)]
        for length in range(order - 1, 0, -1):
            keys, counts = np.unique(keys % vocab_size**length, return_counts=True)
            orders.append(_order(keys, counts, vocab_size))
        self._orders = orders[::-1]

    def log_probabilities(self, windows: np.ndarray) -> np.ndarray:
        """The natural logarithm of the probability of each token but the first of each window,
        given those before it in its window.

        windows: ids int [B, S + 1] -> float64 [B, S].
        """
        windows = np.asarray(windows, np.int64)
        length = windows.shape[1]
        probabilities = np.full(windows.shape, 1 / self.vocab_size)
        for before, level in enumerate(self._orders[:length]):
            keys = np.zeros((len(windows), length - before), np.int64)
            for place in range(before + 1):
                keys = keys * self.vocab_size + windows[:, place : length - before + place]
            sums = _looked_up(level.contexts, level.sums, keys // self.vocab_size)
            kinds = _looked_up(level.contexts, level.kinds, keys // self.vocab_size)
            counts = _looked_up(level.keys, level.counts, keys)
            lower = probabilities[:, before:]
            mass = np.maximum(counts - level.discount, 0) + level.discount * kinds * lower
            probabilities[:, before:] = np.where(sums > 0, mass / np.maximum(sums, 1), lower)
        return np.log(probabilities[:, 1:])


def _grams(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """All n-grams of a text as numbers, int64 [N - order + 1]."""
    count = len(tokens) - order + 1
    keys = np.zeros(count, np.int64)
    for place in range(order):
        keys = keys * vocab_size + tokens[place : place + count]
    return keys


def _order(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Order:
    contexts, firsts, kinds = np.unique(keys // vocab_size, return_index=True, return_counts=True)
    once, twice = np.sum(counts == 1), np.sum(counts == 2)
    # Where no k-gram occurs once, the estimate would be 0 and unseen ones impossible.
    discount = float(once / (once + 2 * twice)) if once else 0.5
    return _Order(keys, counts, contexts, np.add.reduceat(counts, firsts), kinds, discount)


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of the wanted keys; 0 for those that are not among the keys."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
