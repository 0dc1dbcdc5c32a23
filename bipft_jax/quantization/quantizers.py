"""The table of quantizers: every function of this project from float arrays to few-bit codes.

========================  ==========================  =======================  ====================
quantizer (paper)         q(x) = codes * scale        dq/dx, dq/dscale          scale
========================  ==========================  =======================  ====================
`MeanBinarizer`           sgn(x - mean(x)) * m        1; no gradient to m       m = mean|x|, of the
(BWN, XNOR-Net; BiT)      codes in {-1, 0, 1}                                   tensor or of a row
`ElasticSigned`           b=1: a * sgn(x)             1[Qn <= x/a <= Qp];       learned a; starts at
(BiT eq. 5-7; LSQ)        b>1: a * clip(rnd(x/a),     see `pullback`            2 mean|x| /
                          Qn, Qp)                                               sqrt(max(Qp, 1))
`ElasticUnsigned`         b=1: a * 1[x > a/2]         1[0 <= z/a <= Qp];        learned a; starts at
(BiT eq. 5-7; LSQ)        b>1: a * clip(rnd(z/a),     see `pullback`            4 mean|x| / sqrt(Qp)
                          0, Qp) + min x,
                          z = x - min x
`RowBinarizer`            sgn(x - c) * m,             t - mean of t over the   m = mean|x| and
(BiBERT sec. 3)           codes in {-1, 0, 1}         row, t = 1[|x - c| <=    c = mean(x), of a row
                                                      1]; no gradient to m
`SignBinarizer`           sgn(x)                      1[|x| <= 1] or           1
(BiBERT)                                              1[|x| < 1]
`StepBinarizer`           1[x > 0]                    1[|x| < 1]               1
(BiBERT, "bool")
========================  ==========================  =======================  ====================

`b` is the number of bits, Qn..Qp the integer range. sgn(0) = 0, rnd rounds half to even. The
gradient of a learned scale is multiplied by 1 / sqrt(N * Qp), N the number of elements of x (of the
*global* array under `jax.jit`). A learned scale at or below `SMALLEST_SCALE` acts as
`SMALLEST_SCALE`. SPEC sections 1.1 to 1.4 and 4.1 give the same in the references' terms.

A quantizer is a frozen dataclass (hashable: it can be a static argument) with these methods:
`encode` (forward); for the backward pass `residual` (the array to keep), `restore` (from it, the
codes) and `pullback` (the straight-through rule: from the cotangent g of the values and `inner`,
the sum of g * codes, to the cotangents of x and scale); `initial_scale` if its scale is learned;
`lookup` if it quantises embedding tables. `None` instead of a quantizer means "not quantised".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bipft_jax.quantization.arithmetic import widened

SMALLEST_SCALE = 1e-5
SUPPORTED_BITS = (1, 2, 4, 8)


class Encoded(NamedTuple):
    """A quantised array: value = codes * scale + offset.

    codes: int8, the shape of the array. scale: float32 (float64 for float64 input), a scalar or
    broadcastable to the codes. offset: a scalar like scale, or None for zero.
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None = None

    def value(self, dtype: Any) -> jax.Array:
        """The quantised values, codes * scale + offset."""
        scale_type = self.scale.dtype
        value = self.codes.astype(scale_type) * self.scale
        if self.offset is not None:
            value = value + self.offset
        return value.astype(dtype)


def _scale_type(x: jax.Array) -> Any:
    """The type of scales and their gradients: at least float32, whatever the type of x."""
    return widened(x.dtype)


@dataclasses.dataclass(frozen=True)
class MeanBinarizer:
    """1-bit weights around the mean of the whole tensor (SPEC 1.1).

    per_row: one scale for each index of the first axis (word embeddings) instead of one for the
    tensor; the centre stays the mean of the whole tensor.
    """

    per_row: bool = False
    learned_scale = False

    def encode(self, x: jax.Array, scale: None = None, *, whole: jax.Array | None = None):
        """codes sgn(x - mean(x)), scale mean|x|.

        whole: if x is only some rows of a tensor, that tensor, which gives the mean (and, without
          per_row, the magnitude).
        """
        wide = x.astype(_scale_type(x))
        whole = wide if whole is None else whole.astype(wide.dtype)
        axes = tuple(range(1, x.ndim)) if self.per_row else None
        magnitude = jnp.mean(
            jnp.abs(wide if self.per_row else whole), axis=axes, keepdims=self.per_row
        )
        return Encoded(jnp.sign(wide - jnp.mean(whole)).astype(jnp.int8), magnitude)

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


@dataclasses.dataclass(frozen=True)
class ElasticSigned:
    """Signed activations with a learned scalar scale (SPEC 1.2)."""

    bits: int = 1
    learned_scale = True

    def __post_init__(self):
        _check_bits(self)

    @property
    def highest(self) -> int:
        """Qp: 1 for one bit, else 2^(bits-1) - 1."""
        return 1 if self.bits == 1 else 2 ** (self.bits - 1) - 1

    @property
    def lowest(self) -> int:
        """Qn: -1 for one bit, else -2^(bits-1)."""
        return -1 if self.bits == 1 else -(2 ** (self.bits - 1))

    def initial_scale(self, x: jax.Array) -> jax.Array:
        """2 mean|x| / sqrt(Qp) from the first batch (SPEC 1.4)."""
        magnitude = jnp.mean(jnp.abs(x.astype(_scale_type(x))))
        return magnitude * (2.0 / math.sqrt(self.highest))

    def encode(self, x: jax.Array, scale: jax.Array) -> Encoded:
        """codes sgn(x), or clip(rnd(x/scale)) for more than one bit."""
        scale = clamped(scale, x)
        if self.bits == 1:
            return Encoded(jnp.sign(x).astype(jnp.int8), scale)
        levels = jnp.round(x.astype(scale.dtype) / scale)
        return Encoded(_clip(levels, self.lowest, self.highest).astype(jnp.int8), scale)

    def residual(self, x: jax.Array, scale: jax.Array, encoded: Encoded) -> Any:
        """One bit: int8, the code where x is inside the window and twice the code outside (x = 0,
        the only element with code 0, is inside). More bits: x itself, because the scale's gradient
        needs x/scale."""
        if self.bits > 1:
            return x
        return _marked(encoded.codes, jnp.abs(x.astype(encoded.scale.dtype)) <= encoded.scale)

    def restore(self, residual: Any, scale: jax.Array) -> Encoded:
        """The codes, from `residual`."""
        if self.bits > 1:
            return self.encode(residual, scale)
        return Encoded(jnp.sign(residual), clamped(scale, scale))

    def pullback(self, residual: Any, scale: jax.Array, cotangent: jax.Array, inner):
        """dL/dx = g inside the window, else 0. dL/dscale = sum(g c) / sqrt(N Qp) with
        c = sgn(x) for one bit; Qn, Qp or rnd(x/scale) - x/scale (below, above, inside) for more."""
        if self.bits == 1:
            masked = _masked(jnp.abs(residual) <= 1, cotangent)
            return masked, scale_gradient(inner, cotangent.size, self.highest, scale)
        wide = cotangent.astype(_scale_type(cotangent))
        ratio = residual.astype(wide.dtype) / clamped(scale, residual)
        inside, slope = _window_and_slope(ratio, self.lowest, self.highest)
        along = total(wide, slope)
        return _masked(inside, cotangent), scale_gradient(
            along, cotangent.size, self.highest, scale
        )


@dataclasses.dataclass(frozen=True)
class ElasticUnsigned:
    """Non-negative activations (attention probabilities, ReLU outputs) with a learned scalar
    scale (SPEC 1.3). For more than one bit the minimum of the whole tensor is subtracted first and
    added back, without gradient."""

    bits: int = 1
    learned_scale = True

    def __post_init__(self):
        _check_bits(self)

    @property
    def highest(self) -> int:
        """Qp = 2^bits - 1."""
        return 2**self.bits - 1

    def initial_scale(self, x: jax.Array) -> jax.Array:
        """4 mean|x| / sqrt(Qp) from the first batch, of x before subtracting the minimum."""
        magnitude = jnp.mean(jnp.abs(x.astype(_scale_type(x))))
        return magnitude * (4.0 / math.sqrt(self.highest))

    def encode(self, x: jax.Array, scale: jax.Array) -> Encoded:
        """codes 1[x > scale/2] for one bit (rnd(0.5) = 0), else clip(rnd((x - min)/scale), 0, Qp).
        Eight-bit codes 0..255 are stored minus 128, which the offset compensates."""
        scale = clamped(scale, x)
        wide = x.astype(scale.dtype)
        if self.bits == 1:
            return Encoded((wide > 0.5 * scale).astype(jnp.int8), scale)
        smallest = jnp.min(wide)
        levels = _clip(jnp.round((wide - smallest) / scale), 0, self.highest)
        shift = 128 if self.bits == 8 else 0
        return Encoded((levels - shift).astype(jnp.int8), scale, smallest + shift * scale)

    def residual(self, x: jax.Array, scale: jax.Array, encoded: Encoded) -> Any:
        """x itself: the scale's gradient needs x/scale inside the window."""
        return x

    def restore(self, residual: Any, scale: jax.Array) -> Encoded:
        """The codes, from x."""
        return self.encode(residual, scale)

    def pullback(self, residual: Any, scale: jax.Array, cotangent: jax.Array, inner):
        """dL/dx = g where 0 <= z/scale <= Qp. dL/dscale = sum(g c) / sqrt(N Qp) with c = 0 below,
        Qp above and rnd(z/scale) - z/scale inside."""
        wide = cotangent.astype(_scale_type(cotangent))
        shifted = residual.astype(wide.dtype)
        if self.bits > 1:
            shifted = shifted - jnp.min(shifted)
        ratio = shifted / clamped(scale, residual)
        inside, slope = _window_and_slope(ratio, 0, self.highest)
        along = total(wide, slope)
        return _masked(inside, cotangent), scale_gradient(
            along, cotangent.size, self.highest, scale
        )


@dataclasses.dataclass(frozen=True)
class RowBinarizer:
    """1-bit weights around the mean of each row (SPEC 4.1).

    axis: the axis along a row; every index of the other axis has a centre and a scale.
    """

    axis: int
    learned_scale = False

    def encode(self, x: jax.Array, scale: None = None) -> Encoded:
        """codes sgn(x - mean of the row), scale mean|x| of the row."""
        wide = x.astype(_scale_type(x))
        center = jnp.mean(wide, axis=self.axis, keepdims=True)
        magnitude = jnp.mean(jnp.abs(wide), axis=self.axis, keepdims=True)
        return Encoded(jnp.sign(wide - center).astype(jnp.int8), magnitude)

    def residual(self, x: jax.Array, scale: None, encoded: Encoded) -> Encoded:
        """int8 codes, doubled outside the window, and the scales."""
        wide = x.astype(_scale_type(x))
        inside = jnp.abs(wide - jnp.mean(wide, axis=self.axis, keepdims=True)) <= 1
        return encoded._replace(codes=_marked(encoded.codes, inside))

    def restore(self, residual: Encoded, scale: None) -> Encoded:
        """The codes, without the marks."""
        return residual._replace(codes=jnp.sign(residual.codes))

    def pullback(self, residual: Encoded, scale: None, cotangent: jax.Array, inner):
        """dL/dx = t - mean of t over the row (centring); t = g inside the window, else 0."""
        passed = _masked(jnp.abs(residual.codes) <= 1, cotangent)
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

    def encode(self, x: jax.Array, scale: None = None) -> Encoded:
        """codes sgn(x), scale 1."""
        return Encoded(jnp.sign(x).astype(jnp.int8), jnp.ones((), _scale_type(x)))

    def residual(self, x: jax.Array, scale: None, encoded: Encoded) -> Encoded:
        """int8 codes, doubled outside the window."""
        inside = jnp.abs(x) <= 1 if self.window_includes_ends else jnp.abs(x) < 1
        return encoded._replace(codes=_marked(encoded.codes, inside))

    def restore(self, residual: Encoded, scale: None) -> Encoded:
        """The codes, without the marks."""
        return residual._replace(codes=jnp.sign(residual.codes))

    def pullback(self, residual: Encoded, scale: None, cotangent: jax.Array, inner):
        """dL/dx = g inside the window, else 0."""
        return _masked(jnp.abs(residual.codes) <= 1, cotangent), None


@dataclasses.dataclass(frozen=True)
class StepBinarizer:
    """1 where x > 0, else 0 (SPEC 4.1: BiBERT's bool of attention scores; at 0 the paper has 1)."""

    learned_scale = False

    def encode(self, x: jax.Array, scale: None = None) -> Encoded:
        """codes 1[x > 0], scale 1."""
        return Encoded((x > 0).astype(jnp.int8), jnp.ones((), _scale_type(x)))

    def residual(self, x: jax.Array, scale: None, encoded: Encoded) -> Encoded:
        """int8 codes, plus 2 outside the window."""
        outside = (jnp.abs(x) >= 1).astype(jnp.int8)
        return encoded._replace(codes=encoded.codes + 2 * outside)

    def restore(self, residual: Encoded, scale: None) -> Encoded:
        """The codes, without the marks."""
        return residual._replace(codes=residual.codes % 2)

    def pullback(self, residual: Encoded, scale: None, cotangent: jax.Array, inner):
        """dL/dx = g where -1 < x < 1, else 0."""
        return _masked(residual.codes < 2, cotangent), None


Quantizer = (
    MeanBinarizer | ElasticSigned | ElasticUnsigned | RowBinarizer | SignBinarizer | StepBinarizer
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantize(x: jax.Array, scale: jax.Array | None, quantizer: Quantizer) -> jax.Array:
    """The quantised values of x (fake quantisation) with the quantizer's straight-through gradient.

    Arguments:
      x: float array.
      scale: the learned scalar scale, float32; None for a quantizer that learns none.
      quantizer: a row of the table above.

    Returns: codes * scale + offset, shape and dtype of x.
    """
    return quantizer.encode(x, scale).value(x.dtype)


def _quantize_forward(x, scale, quantizer):
    encoded = quantizer.encode(x, scale)
    return encoded.value(x.dtype), (quantizer.residual(x, scale, encoded), scale)


def _quantize_backward(quantizer, kept, cotangent):
    residual, scale = kept
    inner = total(cotangent, quantizer.restore(residual, scale).codes)
    return quantizer.pullback(residual, scale, cotangent, inner)


quantize.defvjp(_quantize_forward, _quantize_backward)


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


def _check_bits(quantizer: ElasticSigned | ElasticUnsigned) -> None:
    if quantizer.bits not in SUPPORTED_BITS:
        raise ValueError(
            f"{type(quantizer).__name__}(bits={quantizer.bits}): bits must be one of "
            f"{SUPPORTED_BITS}; leave the quantizer out (None) for full precision"
        )


def clamped(scale: jax.Array, x: jax.Array) -> jax.Array:
    """The learned scale that acts on x: at least `SMALLEST_SCALE`, float32 or wider."""
    scale = scale.astype(_scale_type(x))
    # A NaN scale (not initialised, or diverged) stays NaN, and makes every gradient through it NaN.
    return jnp.where(scale <= SMALLEST_SCALE, jnp.asarray(SMALLEST_SCALE, scale.dtype), scale)


def _clip(levels: jax.Array, lowest: int, highest: int) -> jax.Array:
    return jnp.clip(levels, jnp.asarray(lowest, levels.dtype), jnp.asarray(highest, levels.dtype))


def _window_and_slope(ratio: jax.Array, lowest: int, highest: int):
    inside = (ratio >= lowest) & (ratio <= highest)
    return inside, jnp.where(inside, jnp.round(ratio) - ratio, _clip(ratio, lowest, highest))


def _marked(codes: jax.Array, inside: jax.Array) -> jax.Array:
    """Codes -1, 0, 1 and the mask of the window in one int8 per element: the code is doubled
    outside the window (an element with code 0 is always inside)."""
    return jnp.where(inside, codes, codes + codes)


def _masked(inside: jax.Array, cotangent: jax.Array) -> jax.Array:
    return jnp.where(inside, cotangent, jnp.zeros_like(cotangent))


def scale_gradient(along, size: int, highest: int, scale: jax.Array) -> jax.Array:
    """along / sqrt(N Qp). along: the gradient summed over all elements; size: N."""
    return (along / math.sqrt(size * highest)).astype(scale.dtype)


def total(x: jax.Array, codes: jax.Array) -> jax.Array:
    """sum(x * codes), float32 or wider."""
    wide = _scale_type(x)
    return jnp.sum(x.astype(wide) * codes.astype(wide))
