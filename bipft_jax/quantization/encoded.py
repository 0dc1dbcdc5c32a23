"""Quantised arrays, `quantize`, and the helpers of the table's rows (`quantizers.py`)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bipft_jax.quantization.arithmetic import widened


class Encoded(NamedTuple):
    """A quantised array: value = codes * scale + offset.

    codes: int8, the shape of the array. scale: float32 (float64 for float64 input), a scalar or
    broadcastable to the codes. offset: of the scale's shape, or None for zero.
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None = None

    def value(self, dtype: Any) -> jax.Array:
        """The quantised values, codes * scale + offset."""
        value = self.codes.astype(self.scale.dtype) * self.scale
        if self.offset is not None:
            value = value + self.offset
        return value.astype(dtype)


def scale_type(x: jax.Array) -> Any:
    """The type of scales and their gradients: at least float32, whatever the type of x."""
    return widened(x.dtype)


def mean_of_groups(x: jax.Array, group_axis: int | None) -> jax.Array:
    """The mean over all axes but `group_axis`, which stay as axes of size 1; a scalar for None."""
    if group_axis is None:
        return jnp.mean(x)
    others = tuple(axis for axis in range(x.ndim) if axis != group_axis)
    return jnp.mean(x, axis=others, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantize(x: jax.Array, scale: jax.Array | None, quantizer: Any) -> jax.Array:
    """The quantised values of x (fake quantisation) with the quantizer's straight-through gradient.

    Arguments:
      x: float array.
      scale: the learned scalar scale, float32; None for a quantizer that learns none.
      quantizer: a row of the table in `quantizers.py`.

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


def clipped(levels: jax.Array, lowest: int, highest: int) -> jax.Array:
    """levels, a float array, limited to a range of codes."""
    return jnp.clip(levels, jnp.asarray(lowest, levels.dtype), jnp.asarray(highest, levels.dtype))


def marked(codes: jax.Array, inside: jax.Array) -> jax.Array:
    """Codes -1, 0, 1 and the mask of the window in one int8 per element: the code is doubled
    outside the window (an element with code 0 is always inside)."""
    return jnp.where(inside, codes, codes + codes)


def masked(inside: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The cotangent inside the window, 0 outside."""
    return jnp.where(inside, cotangent, jnp.zeros_like(cotangent))


def total(x: jax.Array, codes: jax.Array) -> jax.Array:
    """sum(x * codes), float32 or wider."""
    wide = scale_type(x)
    return jnp.sum(x.astype(wide) * codes.astype(wide))
