"""Activation functions, by their names in recipes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bipft_jax.quantization.arithmetic import widened

# The checkpoint name of the kept input, for policies of `jax.checkpoint`.
ACTIVATION_INPUT = "activation_input"


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x), Phi the normal distribution function (erf form; Hendrycks & Gimpel 2016,
    arXiv:1606.08415). Keeps only x for the backward pass; autodiff would keep four arrays."""
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
    """Uses erf, as the references do. `jax.nn.gelu` uses erfc, which is accurate even where the
    result is almost 0, and costs a TPU more than the matrix product before it."""
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


def _gelu_forward(x):
    x = checkpoint_name(x, ACTIVATION_INPUT)
    return gelu(x), x


gelu.defvjp(_gelu_forward, _gelu_backward)


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0)."""
    return jax.nn.relu(checkpoint_name(x, ACTIVATION_INPUT))


def relu_squared(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (So et al. 2021, arXiv:2109.08668)."""
    return jnp.square(relu(x))


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x)."""
    return jax.nn.silu(checkpoint_name(x, ACTIVATION_INPUT))


ACTIVATIONS = {"gelu": gelu, "relu": relu, "relu2": relu_squared, "silu": silu}
