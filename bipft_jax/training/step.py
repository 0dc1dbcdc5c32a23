"""Updates and evaluation steps of pretraining and finetuning: pure functions of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bipft_jax.models.attention import STATISTICS
from bipft_jax.models.bert import BertForPreTraining, BertForSequenceClassification
from bipft_jax.training.distillation import Teacher, distillation_loss
from bipft_jax.training.losses import Batch, classification_loss, counts_of, pretraining_loss
from bipft_jax.training.state import Params, TrainState, is_scale
from bipft_jax.training.task_distillation import TaskTeacher, behaviour
from bipft_jax.training.weight_statistics import attended_keys

SEQUENCE_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
INPUTS = (*SEQUENCE_INPUTS, "mlm_positions")
OPTIMIZER_SCOPE = "optimizer"


def micro_batches(batch: Batch, accumulation: int) -> Batch:
    """[B, ...] -> [accumulation, B / accumulation, ...], every accumulation-th row to one
    micro-batch, so that a batch split over devices stays where it is."""
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
    """Gradient and metrics of a batch, computed in micro-batches one after another.

    loss_of(params, micro_batch, key) returns (loss, metrics) that add up over micro-batches. The
    gradient of a learned scale carries 1/sqrt(N) with N the elements of its tensor in *one*
    micro-batch; it is corrected to the N of the whole batch, so the number of micro-batches does
    not matter (quantizers that use a minimum over the batch excepted).

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

    Where the loss or the gradient is not finite, the update is skipped: `step` and the schedule's
    count go on, so that a schedule of T updates ends after T steps; parameters and moments stay;
    all metrics are 0 but `skipped`, which is 1. `OPTIMIZER_SCOPE` names the optimiser's
    instructions in the compiled program.
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

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
    """Means over the updates that were made, of sums over `count` steps, and `skipped_updates`, how
    many were not; NaN if none was made."""
    made = count - total["skipped"]
    means = {name: value / made for name, value in total.items() if name != "skipped"}
    return {**means, "skipped_updates": total["skipped"]}


def pretraining_gradients(
    model: BertForPreTraining,
    *,
    seed: int,
    accumulation: int = 1,
    teacher: Teacher | None = None,
) -> Callable[[TrainState, Params | None, Batch], tuple[Params, dict[str, jax.Array]]]:
    """A function (state, teacher parameters, batch) -> (gradients, metrics), to be jitted.

    Dropout is a function of (seed, state.step) alone, so a resumed run repeats it. Metrics: the
    loss and each of its terms, and accuracies.
    """

    def gradients_of(state: TrainState, teacher_params: Params | None, batch: Batch):
        counts = counts_of(batch)

        def loss_of(params, micro, key):
            student_key, teacher_key = jax.random.split(key)
            inputs = [micro[name] for name in INPUTS]
            output = model.apply(
                {"params": params}, *inputs, deterministic=False, rngs={"dropout": student_key}
            )
            loss, metrics = pretraining_loss(output, micro, counts)
            if teacher is not None:
                targets = teacher(teacher_params, micro, teacher_key)
                extra, terms = distillation_loss(
                    output, targets, micro, counts, teacher.mlm_weight
                )
                loss, metrics = loss + extra, {**metrics, **terms}
            return loss, {"loss": loss, **metrics}

        key = jax.random.fold_in(jax.random.key(seed), state.step)
        return accumulated_gradients(loss_of, state.params, batch, key, accumulation)

    return gradients_of


def pretraining_step(
    model: BertForPreTraining,
    optimizer: optax.GradientTransformation,
    **options: Any,
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A function (state, teacher parameters, batch) -> (state, metrics), to be jitted: `next_state`
    by `pretraining_gradients`, which takes the options."""
    gradients_of = pretraining_gradients(model, **options)

    def step(state: TrainState, teacher_params: Params | None, batch: Batch):
        return next_state(optimizer, state, *gradients_of(state, teacher_params, batch))

    return step


def evaluation_step(
    model: BertForPreTraining, log_frequencies: np.ndarray
) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """A function (params, batch) -> metrics of one batch, dropout off, to be jitted; with
    `masked_tokens` and `sequences` for averaging over batches.

    log_frequencies: float32 [vocab], of the training text. `unigram_loss` and `unigram_accuracy`
      are what always predicting by them scores on the masked tokens.
    """

    commonest = int(np.argmax(log_frequencies))

    def step(params: Params, batch: Batch):
        counts = counts_of(batch)
        inputs = [batch[name] for name in INPUTS]
        output, variables = model.apply({"params": params}, *inputs, mutable=[STATISTICS])
        _, metrics = pretraining_loss(output, batch, counts)
        ids, weights = batch["mlm_ids"], batch["mlm_weights"] / counts.masked_tokens
        unigram = {
            "unigram_loss": -jnp.sum(jnp.asarray(log_frequencies)[ids] * weights),
            "unigram_accuracy": jnp.sum(jnp.where(ids == commonest, weights, 0.0)),
        }
        return {**metrics, **unigram, **attended_keys(variables), **counts._asdict()}

    return step


def finetuning_step(
    model: BertForSequenceClassification,
    optimizer: optax.GradientTransformation,
    teacher: TaskTeacher | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A function (state, teacher parameters, seed, batch, dropout) -> (state, metrics), to be
    jitted with static dropout, that minimises the task's loss, or with a teacher its
    distillation's.

    dropout: whether the student has any (`TaskTeacher` says it of the teacher); it is a function of
    (seed, state.step) alone. Metrics: the loss, its terms if there are several, and those of
    `next_state`.
    """

    def step(
        state: TrainState,
        teacher_params: Params | None,
        seed: jax.Array,
        batch: Batch,
        dropout: bool,
    ):
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def task_loss(params):
            inputs = [batch[name] for name in SEQUENCE_INPUTS]
            output = model.apply(
                {"params": params}, *inputs, deterministic=not dropout, rngs={"dropout": key}
            )
            return classification_loss(output.logits, batch), {}

        def distillation_loss_of(params):
            student_key, teacher_key = jax.random.split(key)
            ours = behaviour(model, params, batch, student_key if dropout else None)
            theirs = teacher(teacher_params, batch, teacher_key)
            terms = teacher.distillation(ours, theirs, batch["labels"])
            return sum(terms.values()), terms

        loss_of = task_loss if teacher is None else distillation_loss_of
        (loss, terms), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        return next_state(optimizer, state, gradients, {"loss": loss, **terms})

    return step


def prediction_step(model: BertForSequenceClassification) -> Callable[[Params, Batch], jax.Array]:
    """A function (params, batch) -> logits [B, classes], dropout off, to be jitted."""

    def step(params: Params, batch: Batch):
        return model.apply({"params": params}, *[batch[name] for name in SEQUENCE_INPUTS]).logits

    return step
