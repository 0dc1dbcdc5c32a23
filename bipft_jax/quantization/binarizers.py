"""Binarizers without a learned scale: weights around their mean (BWN, XNOR-Net, BiBERT), and the
signs and steps of BiBERT's activations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bipft_jax.quantization.encoded import (
    Encoded,
    marked,
    masked,
    mean_of_groups,
    quantize,
    scale_type,
)


@dataclasses.dataclass(frozen=True)
class MeanBinarizer:
    """1-bit weights around the mean of the whole tensor (SPEC 1.1; BitNet b1: BitNet SPEC 1.1).

    per_row: one scale for each index of the first axis (word embeddings) instead of one for the
      tensor; the centre stays the mean of the whole tensor.
    group_axis: every index of this axis is a group with a centre and a scale of its own (BitNet
      SPEC 1.3); None: no groups.
    """

    per_row: bool = False
    group_axis: int | None = None
    learned_scale = False
    has_offset = False

    def encode(self, x: jax.Array, scale: None = None, *, whole: jax.Array | None = None):
        """codes sgn(x - mean(x)), scale mean|x|.

        whole: if x is only some rows of a tensor, that tensor, which gives the mean (and, without
          per_row, the magnitude).
        """
        wide = x.astype(scale_type(x))
        whole = wide if whole is None else whole.astype(wide.dtype)
        if self.per_row:
            magnitude = jnp.mean(jnp.abs(wide), axis=tuple(range(1, x.ndim)), keepdims=True)
        else:
            magnitude = mean_of_groups(jnp.abs(whole), self.group_axis)
        center = mean_of_groups(whole, self.group_axis)
        return Encoded(jnp.sign(wide - center).astype(jnp.int8), magnitude)

    def residual(self, x: jax.Array, scale: None, encoded: Encoded) -> Any:
        """Keeps the int8 codes and the scale."""
        return encoded

    def restore(self, residual: Any, scale: None) -> Encoded:
        """The residual, which is already encoded."""
        return residual

    def pullback(self, residual: Any, scale: None, cotangent: jax.Array, inner):
        """Identity: no window, and no gradient through the centre or the scale."""
        return cotangent, None

    def lookup(self, rows: jax.Array, table: jax.Array) -> jax.Array:
        """Some rows of a table, binarised like the whole table (SPEC 1.6)."""
        return binarize_rows(rows, table, self)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def binarize_rows(rows: jax.Array, table: jax.Array, quantizer: MeanBinarizer) -> jax.Array:
    """Rows of an embedding table, binarised like the whole table (SPEC 1.6), without binarising the
    other rows.

    Arguments:
      rows: float [n, features], some rows of the table.
      table: float [vocab, features].

    Returns: [n, features]; gradient: the identity for rows, none for the table.
    """
    return quantizer.encode(rows, whole=table).value(rows.dtype)


binarize_rows.defvjp(
    lambda rows, table, quantizer: (binarize_rows(rows, table, quantizer), None),
    lambda quantizer, kept, cotangent: (cotangent, None),
)


@dataclasses.dataclass(frozen=True)
class RowBinarizer:
    """1-bit weights around the mean of each row (SPEC 4.1).

    axis: the axis along a row; every index of the other axis has a centre and a scale.
    """

    axis: int
    learned_scale = False
    has_offset = False

    def encode(self, x: jax.Array, scale: None = None) -> Encoded:
        """codes sgn(x - mean of the row), scale mean|x| of the row."""
        wide = x.astype(scale_type(x))
        center = jnp.mean(wide, axis=self.axis, keepdims=True)
        magnitude = jnp.mean(jnp.abs(wide), axis=self.axis, keepdims=True)
        return Encoded(jnp.sign(wide - center).astype(jnp.int8), magnitude)

    def residual(self, x: jax.Array, scale: None, encoded: Encoded) -> Encoded:
        """int8 codes, doubled outside the window, and the scales."""
        wide = x.astype(scale_type(x))
        inside = jnp.abs(wide - jnp.mean(wide, axis=self.axis, keepdims=True)) <= 1
        return encoded._replace(codes=marked(encoded.codes, inside))

    def restore(self, residual: Encoded, scale: None) -> Encoded:
        """The codes, without the marks."""
        return residual._replace(codes=jnp.sign(residual.codes))

    def pullback(self, residual: Encoded, scale: None, cotangent: jax.Array, inner):
        """dL/dx = t - mean of t over the row (centring); t = g inside the window, else 0."""
        passed = masked(jnp.abs(residual.codes) <= 1, cotangent)
        return passed - jnp.mean(passed, axis=self.axis, keepdims=True), None

    def lookup(self, rows: jax.Array, table: jax.Array) -> jax.Array:
        """Some rows (axis 1) of a table, binarised like the whole table."""
        return quantize(rows, None, self)


@dataclasses.dataclass(frozen=True)
class SignBinarizer:
    """sgn(x) without a scale (SPEC 4.1).

    window_includes_ends: whether the gradient passes at |x| = 1: True for BiBERT's linears, False
    for its attention.
    """

    window_includes_ends: bool
    learned_scale = False
    has_offset = False

    def encode(self, x: jax.Array, scale: None = None) -> Encoded:
        """codes sgn(x), scale 1."""
        return Encoded(jnp.sign(x).astype(jnp.int8), jnp.ones((), scale_type(x)))

    def residual(self, x: jax.Array, scale: None, encoded: Encoded) -> Encoded:
        """int8 codes, doubled outside the window."""
        inside = jnp.abs(x) <= 1 if self.window_includes_ends else jnp.abs(x) < 1
        return encoded._replace(codes=marked(encoded.codes, inside))

    def restore(self, residual: Encoded, scale: None) -> Encoded:
        """The codes, without the marks."""
        return residual._replace(codes=jnp.sign(residual.codes))

    def pullback(self, residual: Encoded, scale: None, cotangent: jax.Array, inner):
        """dL/dx = g inside the window, else 0."""
        return masked(jnp.abs(residual.codes) <= 1, cotangent), None


@dataclasses.dataclass(frozen=True)
class StepBinarizer:
    """1 where x > 0, else 0 (SPEC 4.1: BiBERT's bool of attention scores; at 0 the paper has 1)."""

    learned_scale = False
    has_offset = False

    def encode(self, x: jax.Array, scale: None = None) -> Encoded:
        """codes 1[x > 0], scale 1."""
        return Encoded((x > 0).astype(jnp.int8), jnp.ones((), scale_type(x)))

    def residual(self, x: jax.Array, scale: None, encoded: Encoded) -> Encoded:
        """int8 codes, plus 2 outside the window."""
        outside = (jnp.abs(x) >= 1).astype(jnp.int8)
        return encoded._replace(codes=encoded.codes + 2 * outside)

    def restore(self, residual: Encoded, scale: None) -> Encoded:
        """The codes, without the marks."""
        return residual._replace(codes=residual.codes % 2)

    def pullback(self, residual: Encoded, scale: None, cotangent: jax.Array, inner):
        """dL/dx = g where -1 < x < 1, else 0."""
        return masked(residual.codes < 2, cotangent), None
