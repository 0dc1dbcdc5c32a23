"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864; BitNet SPEC 5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bipft_jax.quantization.arithmetic import widened


def rotation(positions: jax.Array, width: int, theta: float, dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the angles position * theta^(-2i / width), i = 0 .. width/2 - 1.

    Arguments:
      positions: int [B, S].
      dtype: of the activations; the angles are float32 or wider.

    Returns: two arrays [B, S, width / 2].
    """
    wide = widened(dtype)
    # On the host in float64: a float32 power is off by several units in the last place.
    frequencies = np.power(float(theta), -np.arange(0, width, 2) / width).astype(wide)
    angles = positions.astype(wide)[..., None] * jnp.asarray(frequencies)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel i of the first half of a head with channel i of the second half.

    Arguments:
      x: [B, S, heads, width]. cos, sin: of `rotation`.

    Returns: the shape and dtype of x.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
