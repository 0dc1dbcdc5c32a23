"""Activation functions by the names that recipes use."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bipft_jax.quantization.arithmetic import widened

# The name of what is kept, for policies of `jax.checkpoint`.
ACTIVATION_INPUT = "activation_input"


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x), Phi the normal distribution function (erf form; Hendrycks & Gimpel 2016,
    arXiv:1606.08415). Keeps x alone for the backward pass, where autodiff keeps four arrays."""
    wide = _wide(x)
    return (wide * _normal_distribution(wide)).astype(x.dtype)


def _gelu_backward(x, cotangent):
    wide = _wide(x)
    density = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    slope = _normal_distribution(wide) + wide * density
    return ((_wide(cotangent) * slope).astype(x.dtype),)


def _wide(x):
    return x.astype(widened(x.dtype))


def _normal_distribution(x):
    """By erf, as the references have it. `jax.nn.gelu` has erfc, whose relative error is small even
    where the result is next to nothing, and which costs a TPU more than the product before it."""
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


def _gelu_forward(x):
    x = checkpoint_name(x, ACTIVATION_INPUT)
    return gelu(x), x


gelu.defvjp(_gelu_forward, _gelu_backward)


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0)."""
    return jax.nn.relu(checkpoint_name(x, ACTIVATION_INPUT))


ACTIVATIONS = {"gelu": gelu, "relu": relu}
