"""Activations with a learned scale (BiT, LSQ)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from bipft_jax.quantization.encoded import Encoded, clipped, marked, masked, scale_type, total

SMALLEST_SCALE = 1e-5
SUPPORTED_BITS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class ElasticSigned:
    """Signed activations with a learned scalar scale (SPEC 1.2)."""

    bits: int = 1
    learned_scale = True
    has_offset = False

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
        magnitude = jnp.mean(jnp.abs(x.astype(scale_type(x))))
        return magnitude * (2.0 / math.sqrt(self.highest))

    def encode(self, x: jax.Array, scale: jax.Array) -> Encoded:
        """codes sgn(x), or clip(rnd(x/scale)) for more than one bit."""
        scale = clamped(scale, x)
        if self.bits == 1:
            return Encoded(jnp.sign(x).astype(jnp.int8), scale)
        levels = jnp.round(x.astype(scale.dtype) / scale)
        return Encoded(clipped(levels, self.lowest, self.highest).astype(jnp.int8), scale)

    def residual(self, x: jax.Array, scale: jax.Array, encoded: Encoded) -> Any:
        """One bit: int8, the code where x is inside the window and twice the code outside (x = 0,
        the only element with code 0, is inside). More bits: x itself, because the scale's gradient
        needs x/scale."""
        if self.bits > 1:
            return x
        return marked(encoded.codes, jnp.abs(x.astype(encoded.scale.dtype)) <= encoded.scale)

    def restore(self, residual: Any, scale: jax.Array) -> Encoded:
        """The codes, from `residual`."""
        if self.bits > 1:
            return self.encode(residual, scale)
        return Encoded(jnp.sign(residual), clamped(scale, scale))

    def pullback(self, residual: Any, scale: jax.Array, cotangent: jax.Array, inner):
        """dL/dx = g inside the window, else 0. dL/dscale = sum(g c) / sqrt(N Qp) with
        c = sgn(x) for one bit; Qn, Qp or rnd(x/scale) - x/scale (below, above, inside) for more."""
        if self.bits == 1:
            passed = masked(jnp.abs(residual) <= 1, cotangent)
            return passed, scale_gradient(inner, cotangent.size, self.highest, scale)
        wide = cotangent.astype(scale_type(cotangent))
        ratio = residual.astype(wide.dtype) / clamped(scale, residual)
        inside, slope = _window_and_slope(ratio, self.lowest, self.highest)
        along = total(wide, slope)
        return masked(inside, cotangent), scale_gradient(along, cotangent.size, self.highest, scale)


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

    @property
    def has_offset(self) -> bool:
        """Whether the values have an offset."""
        return self.bits > 1

    def initial_scale(self, x: jax.Array) -> jax.Array:
        """4 mean|x| / sqrt(Qp) from the first batch, of x before subtracting the minimum."""
        magnitude = jnp.mean(jnp.abs(x.astype(scale_type(x))))
        return magnitude * (4.0 / math.sqrt(self.highest))

    def encode(self, x: jax.Array, scale: jax.Array) -> Encoded:
        """codes 1[x > scale/2] for one bit (rnd(0.5) = 0), else clip(rnd((x - min)/scale), 0, Qp).
        Eight-bit codes 0..255 are stored minus 128, which the offset compensates."""
        scale = clamped(scale, x)
        wide = x.astype(scale.dtype)
        if self.bits == 1:
            return Encoded((wide > 0.5 * scale).astype(jnp.int8), scale)
        smallest = jnp.min(wide)
        levels = clipped(jnp.round((wide - smallest) / scale), 0, self.highest)
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
        wide = cotangent.astype(scale_type(cotangent))
        shifted = residual.astype(wide.dtype)
        if self.bits > 1:
            shifted = shifted - jnp.min(shifted)
        ratio = shifted / clamped(scale, residual)
        inside, slope = _window_and_slope(ratio, 0, self.highest)
        along = total(wide, slope)
        return masked(inside, cotangent), scale_gradient(along, cotangent.size, self.highest, scale)


def _check_bits(quantizer: ElasticSigned | ElasticUnsigned) -> None:
    if quantizer.bits not in SUPPORTED_BITS:
        raise ValueError(
            f"{type(quantizer).__name__}(bits={quantizer.bits}): bits must be one of "
            f"{SUPPORTED_BITS}; leave the quantizer out (None) for full precision"
        )


def clamped(scale: jax.Array, x: jax.Array) -> jax.Array:
    """The learned scale that acts on x: at least `SMALLEST_SCALE`, float32 or wider."""
    scale = scale.astype(scale_type(x))
    # A NaN scale (not initialised, or diverged) stays NaN, and makes every gradient through it NaN.
    return jnp.where(scale <= SMALLEST_SCALE, jnp.asarray(SMALLEST_SCALE, scale.dtype), scale)


def _window_and_slope(ratio: jax.Array, lowest: int, highest: int):
    inside = (ratio >= lowest) & (ratio <= highest)
    return inside, jnp.where(inside, jnp.round(ratio) - ratio, clipped(ratio, lowest, highest))


def scale_gradient(along, size: int, highest: int, scale: jax.Array) -> jax.Array:
    """along / sqrt(N Qp). along: the gradient summed over all elements; size: N."""
    return (along / math.sqrt(size * highest)).astype(scale.dtype)
