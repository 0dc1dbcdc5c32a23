"""AdamW with linear warm-up and linear decay, counted in updates."""

from __future__ import annotations

from typing import Any

import jax
import optax


def linear_schedule(learning_rate: float, warmup_updates: int, num_updates: int) -> optax.Schedule:
    """lr * t / warmup while t < warmup, then lr * (T - t) / (T - warmup); t counts from 0 (SPEC
    2.6), so with any warm-up the first update only fills Adam's moments.

    Raises: ValueError if the warm-up is not shorter than the run.
    """
    if not 0 <= warmup_updates < num_updates:
        raise ValueError(
            f"warmup_updates {warmup_updates} must be at least 0 and below num_updates "
            f"{num_updates}"
        )
    decay = optax.linear_schedule(learning_rate, 0.0, num_updates - warmup_updates)
    if not warmup_updates:
        return decay
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_updates)
    return optax.join_schedules([warmup, decay], [warmup_updates])


def _decayed(params: Any) -> Any:
    """Weight decay acts on matrices: kernels and embeddings, not biases, LayerNorms or scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


def adamw(
    schedule: optax.Schedule | float,
    *,
    weight_decay: float,
    clip_norm: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW (decoupled decay on matrices only), after clipping to a global norm; clip_norm 0: no
    clipping, as in the reference."""
    update = optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=_decayed)
    if not clip_norm:
        return update
    return optax.chain(optax.clip_by_global_norm(clip_norm), update)
