"""Feed-forward codes that follow the model's float32 GELU, not the exact one.

The code of a feed-forward channel is the sign of gelu(y) + shift, and y follows from an integer,
the dot product of codes. The runtime decides in float64 which integers give +1. The model's GELU is
float32 and wrong by up to 1e-7 where erf is near -1, so that of the millions of pairs of a channel
and an integer some have another sign there. A text meets such pairs often, and one code that
differs changes everything after it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erfc

from bipft_jax.models.activations import gelu


def settled_shifts(
    scales: np.ndarray, biases: np.ndarray, shifts: np.ndarray, inputs: int
) -> np.ndarray:
    """The shifts of the second feed-forward linear's input, moved by a few units of the last place
    where that gives the exact signs of gelu(dot * scale + bias) + shift the model's own (of a
    channel with several such signs, one).

    scales: float64 [layers, channels], of input and weights together. biases, shifts: float32
      [layers, channels]. inputs: of the first feed-forward linear; dots are -inputs to inputs.

    Returns: float32 [layers, channels].
    """
    dots = np.arange(-inputs, inputs + 1)[:, None]
    settled = shifts.copy()
    for scale, bias, shift in zip(scales[:, None], biases[:, None], settled[:, None]):
        exact = _exact_gelu(dots * scale + bias)
        signs = np.asarray(_signs(*map(np.float32, (dots, scale, bias, shift))))
        for dot, channel in np.argwhere(np.sign(exact + shift) != signs):
            shift[0, channel] = _nearest(-exact[dot, channel], signs[dot, channel])
    return settled


def _exact_gelu(y: np.ndarray) -> np.ndarray:
    return 0.5 * y * erfc(-y * np.sqrt(0.5))


@jax.jit
def _signs(dots: jax.Array, scale: jax.Array, bias: jax.Array, shift: jax.Array) -> Any:
    return jnp.sign(gelu(dots * scale + bias) + shift)


def _nearest(border: float, side: float) -> np.float32:
    """The float32 number nearest to the border on a side of it, 1 or -1, or at it, 0."""
    number = np.float32(border)
    while side and (number - border) * side <= 0:
        number = np.nextafter(number, np.float32(np.inf * side))
    return number
