"""AdamW and BertAdam, with linear warm-up and decay in one or two stages, counted in updates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bipft_jax.models.parameters import is_scale, is_stacked, path_name


def linear_schedule(
    learning_rate: float, warmup_updates: float, num_updates: int
) -> optax.Schedule:
    """lr * t / warmup while t < warmup, then lr * (T - t) / (T - warmup), at least 0; t counts from
    0 (SPEC 2.6 and 5), so with any warm-up the first update only fills Adam's moments.

    warmup_updates: need not be an integer (BertAdam's warm-up is 0.1 T).

    Raises: ValueError if the warm-up is not shorter than the run.
    """
    if not 0 <= warmup_updates < num_updates:
        raise ValueError(
            f"warmup_updates {warmup_updates} must be at least 0 and below num_updates "
            f"{num_updates}"
        )

    def schedule(t):
        # Explicitly float32: dividing integers would give JAX's default float type.
        rising = jnp.asarray(t, jnp.float32) / warmup_updates if warmup_updates else 1.0
        falling = jnp.asarray(num_updates - t, jnp.float32) / (num_updates - warmup_updates)
        return learning_rate * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)

    return schedule


def two_stage_schedule(
    learning_rate: float, second_learning_rate: float, warmup_updates: float, num_updates: int
) -> optax.Schedule:
    """The linear schedule, with another peak from half of the updates on (Ma et al. 2024; BitNet
    SPEC 6): both stages lie on straight lines to 0 at `num_updates`.

    Raises: ValueError if the warm-up is not shorter than the run.
    """
    shape = linear_schedule(1.0, warmup_updates, num_updates)
    peak = _switched(learning_rate, second_learning_rate, num_updates)
    return lambda t: peak(t) * shape(t)


def staged(
    learning_rate: float,
    second_peak: float,
    weight_decay: float,
    warmup_updates: float,
    num_updates: int,
) -> tuple[optax.Schedule, optax.Schedule | float]:
    """Learning rate and weight decay of a run: in two stages, the second with the peak
    second_peak * learning_rate, or in one if second_peak is 0.

    Raises: ValueError if the warm-up is not shorter than the run.
    """
    if not second_peak:
        return linear_schedule(learning_rate, warmup_updates, num_updates), weight_decay
    second = second_peak * learning_rate
    rate = two_stage_schedule(learning_rate, second, warmup_updates, num_updates)
    return rate, first_stage_decay(weight_decay, num_updates)


def first_stage_decay(weight_decay: float, num_updates: int) -> optax.Schedule:
    """Weight decay that ends with the first stage: it pulls latent weights to the thresholds of
    their codes, and so makes the codes flip."""
    return _switched(weight_decay, 0.0, num_updates)


def _switched(first: float, second: float, num_updates: int) -> optax.Schedule:
    def schedule(t):
        of_first = jnp.asarray(t) < num_updates // 2
        return jnp.where(of_first, jnp.float32(first), jnp.float32(second))

    return schedule


_MATRICES = ("kernel", "embedding")
_VECTORS = ("bias", "mlm_bias", "input_shift", "scale")  # and learned scales of quantizers


def _decayed(params: Any) -> Any:
    """The mask of weight decay: True for kernels and embeddings, False for biases, LayerNorms and
    scales.

    Raises: ValueError for a parameter with an unlisted name, so that none gets a default by chance.
    """

    def decayed(path: tuple[Any, ...], _: Any) -> bool:
        name = path[-1].key
        if name not in _MATRICES and name not in _VECTORS and not is_scale(name):
            raise ValueError(
                f"{path_name(path)} is in no list of training/optimizer.py: list it as decayed "
                "or not decayed"
            )
        return name in _MATRICES

    return jax.tree_util.tree_map_with_path(decayed, params)


def adamw(
    schedule: optax.Schedule | float,
    *,
    weight_decay: optax.Schedule | float,
    clip_norm: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW (decoupled decay on matrices only) after clipping by global norm; clip_norm 0 disables
    clipping, as in the reference. The decay is multiplied by the update's learning rate."""
    update = optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=_decayed)
    if clip_norm:
        update = optax.chain(optax.clip_by_global_norm(clip_norm), update)
    return _promoting(update)


def _promoting(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation under standard promotion: optax raises a float to the power of the
    integer count, which strict promotion refuses."""

    def update(*arguments):
        with jax.numpy_dtype_promotion("standard"):
            return transformation.update(*arguments)

    return optax.GradientTransformation(transformation.init, update)


def bert_adam(
    schedule: optax.Schedule | float,
    *,
    scale_schedule: optax.Schedule | float,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """The Adam of BiT and BiBERT (SPEC 5): per-tensor clipping, no bias correction, and decoupled
    decay on matrices, scheduled with the learning rate.

    schedule, scale_schedule: learning rates of the parameters and of the learned scales.
    """

    def with_rate(rate):
        return optax.chain(
            _clip_each_tensor(clip_norm),
            _adam_without_bias_correction(b1, b2, eps),
            optax.add_decayed_weights(weight_decay, _decayed),
            optax.scale_by_learning_rate(rate),
        )

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "scale" if is_scale(path[-1].key) else "other", params
        )

    return optax.partition(
        {"scale": with_rate(scale_schedule), "other": with_rate(schedule)}, label
    )


def _clip_each_tensor(max_norm: float) -> optax.GradientTransformation:
    """g * min(1, max_norm / (|g| + 1e-6)); every layer of a stacked array has its own norm."""

    def clip(path, g):
        own = range(1, g.ndim) if is_stacked(path_name(path)) else range(g.ndim)
        norm = jnp.sqrt(jnp.sum(jnp.square(g), axis=tuple(own), keepdims=True))
        return g * jnp.minimum(1.0, max_norm / (norm + 1e-6))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


class _Moments(NamedTuple):
    mu: Any
    nu: Any


def _adam_without_bias_correction(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps), without the bias correction of optax's own Adam."""

    def init(params):
        return _Moments(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return scaled, _Moments(mu, nu)

    return optax.GradientTransformation(init, update)
