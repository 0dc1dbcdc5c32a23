"""Norms that keep their input and one or two numbers per token for the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from bipft_jax.quantization.arithmetic import widened

# Checkpoint names of the kept arrays, for policies of `jax.checkpoint`.
NORM_INPUT = "norm_input"
NORM_STATISTICS = "norm_statistics"


class LayerNorm(nn.Module):
    """BERT's LayerNorm over the last axis: biased variance of the centred values.

    Parameters: scale and bias, float32 [features]. Statistics are float32 or wider.
    """

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., features] -> the same shape, in `dtype`."""
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        return normalize(x.astype(self.dtype), scale, bias, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, in x's dtype.

    Keeps x in its own dtype for the backward pass; autodiff would keep three float32 arrays of its
    size.
    """
    return _forward(x, scale, bias, epsilon)[0]


def _forward(x, scale, bias, epsilon):
    x = checkpoint_name(x, NORM_INPUT)
    wide = x.astype(widened(x.dtype))
    mean = checkpoint_name(jnp.mean(wide, axis=-1, keepdims=True), NORM_STATISTICS)
    variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    factor = checkpoint_name(jax.lax.rsqrt(variance + epsilon), NORM_STATISTICS)
    row, shift = (row_for(x, parameter).astype(wide.dtype) for parameter in (scale, bias))
    y = (wide - mean) * factor * row + shift
    return y.astype(x.dtype), (x, mean, factor, scale)


def _backward(epsilon, kept, cotangent):
    x, mean, factor, scale = kept
    wide = cotangent.astype(mean.dtype)
    normalized = (x.astype(mean.dtype) - mean) * factor
    leading = tuple(range(x.ndim - 1))
    scaled = wide * row_for(x, scale).astype(wide.dtype)
    along = jnp.mean(scaled * normalized, axis=-1, keepdims=True)
    x_bar = factor * (scaled - jnp.mean(scaled, axis=-1, keepdims=True) - normalized * along)
    scale_bar = jnp.sum(wide * normalized, axis=leading).astype(scale.dtype)
    return x_bar.astype(x.dtype), scale_bar, jnp.sum(wide, axis=leading).astype(scale.dtype)


def row_for(x: jax.Array, row: jax.Array) -> jax.Array:
    """[features] -> [1, ..., 1, features], with as many axes as x."""
    return jnp.expand_dims(row, range(x.ndim - row.ndim))


normalize.defvjp(_forward, _backward)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis (Zhang & Sennrich 2019,
    arXiv:1910.07467; BitNet SPEC 5).

    groups: the features are split into so many groups of neighbours, each with a mean of its own
    (BitNet SPEC 1.4). Parameter: scale, float32 [features]. Means are float32 or wider.
    """

    epsilon: float
    dtype: Any
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., features] -> the same shape, in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        x = x.astype(self.dtype)
        if self.groups == 1:
            return rms_normalize(x, scale, self.epsilon)
        split = x.reshape(*x.shape[:-1], self.groups, -1)
        return rms_normalize(split, scale.reshape(self.groups, -1), self.epsilon).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_normalize(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in x's dtype.

    scale: of the shape of x's last axis or axes. Keeps x in its own dtype for the backward pass.
    """
    return _rms_forward(x, scale, epsilon)[0]


def _rms_forward(x, scale, epsilon):
    x = checkpoint_name(x, NORM_INPUT)
    wide = x.astype(widened(x.dtype))
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    factor = checkpoint_name(jax.lax.rsqrt(square + epsilon), NORM_STATISTICS)
    y = wide * factor * row_for(x, scale).astype(wide.dtype)
    return y.astype(x.dtype), (x, factor, scale)


def _rms_backward(epsilon, kept, cotangent):
    x, factor, scale = kept
    wide = cotangent.astype(factor.dtype)
    normalized = x.astype(factor.dtype) * factor
    scaled = wide * row_for(x, scale).astype(factor.dtype)
    along = jnp.mean(scaled * normalized, axis=-1, keepdims=True)
    x_bar = factor * (scaled - normalized * along)
    scale_bar = jnp.sum(wide * normalized, axis=range(x.ndim - scale.ndim))
    return x_bar.astype(x.dtype), scale_bar.astype(scale.dtype)


rms_normalize.defvjp(_rms_forward, _rms_backward)
