"""What optimisers make of a gradient that comes again and again, in float64 and by their papers.

Of the parameters a matrix decays, a bias and a learned scale do not. One element of the gradient is
so small that Adam's epsilon counts, one tensor has a norm above 1.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
import optax

PARAMS = {"kernel": [2.0, -3.0], "bias": [5.0], "input_scale": [0.5]}
GRADIENT = {"kernel": [0.3, 1e-5], "bias": [0.4], "input_scale": [1.2]}
NORM = 1.3


def of_optimizer(optimizer: optax.GradientTransformation, count: int) -> list[float]:
    """What it adds to the parameters in its first updates, all numbers in one list."""
    params, gradient = (
        {name: jnp.asarray(value, jnp.float32) for name, value in tree.items()}
        for tree in (PARAMS, GRADIENT)
    )
    state, made = optimizer.init(params), []
    for _ in range(count):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        made += [updates[name] for name in PARAMS]
    return np.concatenate(made).tolist()


def of_adamw(
    rates: Sequence[float], *, weight_decay: float, clip_norm: float, eps: float = 1e-8
) -> list[float]:
    """Loshchilov and Hutter 2017 after clipping to a global norm (0: no clipping). Of a constant
    both moments, corrected for their start at 0, are the constant and its square."""

    def direction(gradient: np.ndarray, t: int) -> np.ndarray:
        gradient = gradient * (min(1.0, clip_norm / NORM) if clip_norm else 1.0)
        return gradient / (abs(gradient) + eps)

    return _made(direction, rates, rates, weight_decay)


def of_bert_adam(
    rates: Sequence[float], scale_rates: Sequence[float], *, weight_decay: float
) -> list[float]:
    """SPEC 5: tensors clipped to norm 1 each, moments that are not corrected."""

    def direction(gradient: np.ndarray, t: int) -> np.ndarray:
        gradient = gradient * min(1.0, 1.0 / (np.linalg.norm(gradient) + 1e-6))
        first, second = (1 - 0.9**t) * gradient, (1 - 0.999**t) * gradient**2
        return first / (np.sqrt(second) + 1e-6)

    return _made(direction, rates, scale_rates, weight_decay)


def _made(
    direction: Callable[[np.ndarray, int], np.ndarray],
    rates: Sequence[float],
    scale_rates: Sequence[float],
    weight_decay: float,
) -> list[float]:
    params, made = {name: np.float64(value) for name, value in PARAMS.items()}, []
    for t, (rate, scale_rate) in enumerate(zip(rates, scale_rates, strict=True), start=1):
        for name in PARAMS:
            step = direction(np.float64(GRADIENT[name]), t)
            step = step + (weight_decay * params[name] if name == "kernel" else 0.0)
            made.append(-(scale_rate if name == "input_scale" else rate) * step)
            params[name] = params[name] + made[-1]
    return np.concatenate(made).tolist()
