"""Dropout with a mask so cheap that the backward pass recomputes it.

A mask of `jax.random.bernoulli` costs about a hundred operations per element, more than all other
work on the element, and is kept for the backward pass. Here `jax.random` draws one word per row and
one per column; an element's bits are their sum, mixed: about fifteen operations, which the compiler
fuses into the consumer of the mask. The mask is a function of the key and the index in the *global*
array, the same on every backend and for every sharding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` and divides the others by 1 - rate.

    Draws from the "dropout" stream of random keys.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """x: float, one or more dimensions; deterministic: return x unchanged."""
        if deterministic or not self.rate:
            return x
        return dropout(x, self.make_rng("dropout"), self.rate)

    def words(self, shape: tuple[int, ...], deterministic: bool):
        """`mask_words` for an array of that shape, for a caller that applies the mask itself; None
        if dropout is off."""
        if deterministic or not self.rate:
            return None
        return mask_words(self.make_rng("dropout"), shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """x / (1 - rate) where `keep_mask` is True, else 0; keeps only the key for the backward
    pass."""
    return jnp.where(keep_mask(key, rate, x.shape), x / (1.0 - rate), jnp.zeros_like(x))


dropout.defvjp(
    lambda x, key, rate: (dropout(x, key, rate), key),
    lambda rate, key, cotangent: (dropout(cotangent, key, rate), None),
)


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool, True with probability 1 - rate (to 2^-32)."""
    rows, columns = mask_words(key, shape)
    return kept(rows[..., None] + jnp.expand_dims(columns, range(rows.ndim)), rate)


def mask_words(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """For an array of that shape: uint32 words of the rows, [*shape[:-1]], and of the columns,
    [shape[-1]]."""
    of_rows, of_columns = jax.random.split(key)
    rows = jax.random.bits(of_rows, shape[:-1], jnp.uint32)
    return rows, jax.random.bits(of_columns, shape[-1:], jnp.uint32)


def kept(word: jax.Array, rate: float) -> jax.Array:
    """Whether an element is kept, from the sum of the words of its row and its column."""
    return _mixed(word) >= jnp.uint32(round(rate * 2**32))


def _mixed(word: jax.Array) -> jax.Array:
    """Mixes a uint32 so that all its bits influence the upper ones. It uses shifts and additions
    only, because TPUs multiply 32-bit integers slowly. The shifts pass the test of correlations
    between rows and between columns, which fewer steps, and some published mixers, fail."""
    word = word + (word << 12)
    word = word ^ (word >> 17)
    word = word + (word << 5)
    word = word ^ (word >> 9)
    word = word + (word << 10)
    word = word ^ (word >> 6)
    return word + (word << 13)
