"""Updates and evaluation steps of pretraining and finetuning: pure functions of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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


def updated(
    optimizer: optax.GradientTransformation, gradients: Params, state: TrainState
) -> tuple[Params, optax.OptState]:
    """The parameters and the optimiser's state after one update; `OPTIMIZER_SCOPE` names its
    instructions in the compiled program."""
    with jax.named_scope(OPTIMIZER_SCOPE):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state


def pretraining_step(
    model: BertForPreTraining,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulation: int = 1,
    teacher: Teacher | None = None,
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A function (state, teacher parameters, batch) -> (state, metrics), to be jitted.

    Dropout is a function of (seed, state.step) alone, so a resumed run repeats it. Metrics: the
    loss and each of its terms, accuracies, and the gradient's global norm.
    """

    def step(state: TrainState, teacher_params: Params | None, batch: Batch):
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
                extra, terms = distillation_loss(output, *targets, counts)
                loss, metrics = loss + extra, {**metrics, **terms}
            return loss, {"loss": loss, **metrics}

        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, metrics = accumulated_gradients(loss_of, state.params, batch, key, accumulation)
        params, opt_state = updated(optimizer, gradients, state)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def evaluation_step(model: BertForPreTraining) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """A function (params, batch) -> metrics of one batch, dropout off, to be jitted; with
    `masked_tokens` and `sequences` for averaging over batches."""

    def step(params: Params, batch: Batch):
        counts = counts_of(batch)
        inputs = [batch[name] for name in INPUTS]
        output, variables = model.apply({"params": params}, *inputs, mutable=[STATISTICS])
        _, metrics = pretraining_loss(output, batch, counts)
        return {**metrics, **attended_keys(variables), **counts._asdict()}

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
    (seed, state.step) alone. Metrics: the loss, its terms if there are several, and the gradient's
    global norm.
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
        params, opt_state = updated(optimizer, gradients, state)
        metrics = {"loss": loss, **terms, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def prediction_step(model: BertForSequenceClassification) -> Callable[[Params, Batch], jax.Array]:
    """A function (params, batch) -> logits [B, classes], dropout off, to be jitted."""

    def step(params: Params, batch: Batch):
        return model.apply({"params": params}, *[batch[name] for name in SEQUENCE_INPUTS]).logits

    return step
