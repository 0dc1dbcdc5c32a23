"""The update, evaluation and prediction steps: pure functions of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bipft_jax.models.attention import STATISTICS
from bipft_jax.models.parameters import Params, is_scale
from bipft_jax.models.weights_once import kept_weights
from bipft_jax.objectives.losses import Batch
from bipft_jax.objectives.objective import Objective, Teacher
from bipft_jax.training.state import TrainState, require_wide
from bipft_jax.training.weight_statistics import attended_keys

OPTIMIZER_SCOPE, TEACHER_SCOPE = "optimizer", "teacher"  # in the names of operations

# Optimiser states that count updates for a schedule, of rates and of weight decay. (optax does not
# export the second. Its shape only: an array would start JAX before a process joins its job.)
_SCHEDULES = (
    optax.ScaleByScheduleState,
    type(jax.eval_shape(optax.add_decayed_weights(lambda count: 0.0).init, None)),
)


def micro_batches(batch: Batch, accumulation: int) -> Batch:
    """[B, ...] -> [accumulation, B / accumulation, ...]. A micro-batch gets every accumulation-th
    row, so that no row of a sharded batch moves to another device."""
    return {
        name: rows.reshape(-1, accumulation, *rows.shape[1:]).swapaxes(0, 1)
        for name, rows in batch.items()
    }


def accumulated_gradients(
    loss_of: Callable[[Params, Batch, jax.Array], tuple[jax.Array, Any]],
    params: Params,
    batch: Batch,
    key: jax.Array,
    accumulation: int,
):
    """Gradients and metrics of a batch, accumulated over micro-batches.

    loss_of(params, micro_batch, key) returns (loss, metrics) that add up over micro-batches. The
    gradient of a learned scale has the factor 1/sqrt(N), N the number of elements of its tensor in
    *one* micro-batch; a correction makes N that of the whole batch, so the result does not depend
    on the number of micro-batches (except for quantizers that use a minimum over the batch).

    Returns: (gradients, metrics).
    """
    gradient_of = jax.grad(loss_of, has_aux=True)
    if accumulation == 1:
        return gradient_of(params, batch, key)

    def add(total, numbered):
        index, micro = numbered
        new = gradient_of(params, micro, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, new), None

    micros = micro_batches(batch, accumulation)
    first = jax.tree.map(lambda rows: rows[0], micros)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(gradient_of, params, first, key),
    )
    (gradients, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(accumulation), micros))
    correction = accumulation**-0.5
    gradients = jax.tree_util.tree_map_with_path(
        lambda path, g: g * correction if is_scale(path[-1].key) else g, gradients
    )
    return gradients, metrics


def next_state(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradients: Params,
    metrics: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one update, and the update's metrics with `gradient_norm` and `skipped`.

    An update whose loss or gradient is not finite is skipped: `step` and the schedule's count still
    advance, so that a schedule of T updates ends after T steps; parameters and moments do not
    change; `skipped` is 1, all other metrics are 0. `OPTIMIZER_SCOPE` names the optimiser's
    instructions in the compiled program.
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

    def is_schedule(node):
        return isinstance(node, _SCHEDULES)

    def if_finite(new, old):
        return jax.tree.map(
            lambda n, o: n if is_schedule(n) else jnp.where(finite, n, o),
            new,
            old,
            is_leaf=is_schedule,
        )

    with jax.named_scope(OPTIMIZER_SCOPE):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = if_finite(optax.apply_updates(state.params, updates), state.params)
        opt_state = if_finite(opt_state, state.opt_state)
    skipped_in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
    metrics = {**metrics, "gradient_norm": norm}
    metrics = {name: jnp.where(finite, value, 0) for name, value in metrics.items()}
    metrics["skipped"] = jnp.logical_not(finite).astype(jnp.float32)
    return TrainState(state.step + 1, params, opt_state, skipped_in_row), metrics


def mean_metrics(total: dict[str, Any], count: Any) -> dict[str, Any]:
    """From sums of metrics over `count` updates: means over those that were not skipped (NaN if all
    were), and `skipped_updates`, the number that were."""
    made = count - total["skipped"]
    means = {name: value / made for name, value in total.items() if name != "skipped"}
    return {**means, "skipped_updates": total["skipped"]}


def gradients(
    objective: Objective,
    model: nn.Module,
    *,
    accumulation: int = 1,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[Params, dict[str, jax.Array]]]:
    """The function (state, teacher's parameters, seed, batch, dropout) -> (gradients, metrics), to
    be jitted with `dropout` static.

    dropout: whether the student uses dropout (a teacher has its own setting). The masks depend on
    (seed, state.step) alone, so a resumed run repeats them. metrics: the loss, its terms,
    accuracies. Raises, when traced: ValueError for parameters narrower than float32.
    """

    def gradients_of(
        state: TrainState,
        teacher_params: Params | None,
        seed: jax.Array | int,
        batch: Batch,
        dropout: bool,
    ):
        require_wide(state.params)
        counts = objective.counts(batch)
        recipe = model.config.recipe
        # Once for all micro-batches.
        kept = kept_weights(state.params, recipe.weight, recipe.groups) if accumulation > 1 else {}

        def loss_of(params, micro, key):
            student_key, teacher_key = objective.dropout_keys(key, teacher is not None)
            output, variables = model.apply(
                {"params": params, **kept},
                *objective.model_inputs(micro),
                deterministic=not dropout,
                rngs={"dropout": student_key},
                mutable=[] if teacher is None else list(teacher.looks_at),
            )
            loss, metrics = objective.loss(output, micro, counts)
            if teacher is not None:
                with jax.named_scope(TEACHER_SCOPE):
                    targets = teacher(teacher_params, micro, teacher_key)
                own = loss, metrics
                loss, metrics = teacher.loss(own, output, variables, targets, micro, counts)
            return loss, {"loss": loss, **metrics}

        key = jax.random.fold_in(jax.random.key(seed), state.step)
        return accumulated_gradients(loss_of, state.params, batch, key, accumulation)

    return gradients_of


def update(
    objective: Objective,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    **options: Any,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The function (state, teacher's parameters, seed, batch, dropout) -> (state, metrics), to be
    jitted with `dropout` static: `gradients`, then `next_state`. options: those of `gradients`."""
    gradients_of = gradients(objective, model, **options)

    def step(state: TrainState, teacher_params, seed, batch: Batch, dropout: bool):
        grads, metrics = gradients_of(state, teacher_params, seed, batch, dropout)
        return next_state(optimizer, state, grads, metrics)

    return step


def evaluation_step(
    objective: Objective, model: nn.Module, measure: Callable[..., dict[str, jax.Array]]
) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """The function (params, batch) -> metrics of one batch, dropout off, to be jitted: the results
    of `measure(output, batch, counts)`, `attended_keys`, and the counts, the weights of means over
    batches."""

    def step(params: Params, batch: Batch):
        counts = objective.counts(batch)
        output, variables = model.apply(
            {"params": params}, *objective.model_inputs(batch), mutable=[STATISTICS]
        )
        return {
            **measure(output, batch, counts),
            **attended_keys(variables),
            **counts._asdict(),
        }

    return step


def prediction_step(objective: Objective, model: nn.Module) -> Callable[[Params, Batch], jax.Array]:
    """The function (params, batch) -> logits [B, outputs], dropout off, to be jitted."""

    def step(params: Params, batch: Batch):
        return model.apply({"params": params}, *objective.model_inputs(batch)).logits

    return step
