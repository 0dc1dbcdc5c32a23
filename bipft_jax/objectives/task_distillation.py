"""Distillation during finetuning: a student imitates a teacher finetuned on the same task.

`DISTILLATIONS` holds the losses of BiT and BiBERT (SPEC 3 and 4.3). BiT's means add up over
micro-batches of equal size; BiBERT's norms, taken over the whole batch, do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bipft_jax.models.bert import (
    SEQUENCE_INPUTS,
    BertForSequenceClassification,
    ClassificationOutput,
)
from bipft_jax.objectives.losses import Batch, ClassificationCounts

_PROJECTIONS = ("query", "key", "value")
_LOOKS_AT = ("intermediates",)


class Behaviour(NamedTuple):
    """The outputs of a model, student or teacher, that a distillation compares.

    logits: [B, classes]. hidden_states: [layers + 1, B, S, H], the embedding output first.
    relations: by projection ("query", "key", "value"), x x^T / sqrt(d) of the heads x [B, S, d]
    before quantisation: [layers, B, h, S, S].
    """

    logits: jax.Array
    hidden_states: jax.Array
    relations: dict[str, jax.Array]


Distillation = Callable[[Behaviour, Behaviour, jax.Array], dict[str, jax.Array]]


def behaviour(
    model: BertForSequenceClassification, params: Any, batch: Batch, dropout_key: jax.Array | None
) -> Behaviour:
    """The `Behaviour` of a model on a batch; dropout_key None turns dropout off."""
    output, variables = model.apply(
        {"params": params},
        *[batch[name] for name in SEQUENCE_INPUTS],
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        mutable=_LOOKS_AT,
    )
    return _behaviour(output, variables, model.config.heads)


def _behaviour(output: ClassificationOutput, variables: Mapping[str, Any], heads: int) -> Behaviour:
    attention = variables["intermediates"]["bert"]["encoder"]["layers"]["attention"]
    relations = {name: relation(attention[f"{name}_projection"][0], heads) for name in _PROJECTIONS}
    return Behaviour(output.logits, output.hidden_states.astype(jnp.float32), relations)


def relation(x: jax.Array, heads: int) -> jax.Array:
    """x x^T / sqrt(d) of every head: float [..., S, H] -> float32 [..., h, S, S]."""
    x = x.reshape(*x.shape[:-1], heads, -1).astype(jnp.float32)
    return jnp.einsum("...shd,...thd->...hst", x, x) / jnp.sqrt(jnp.float32(x.shape[-1]))


def bit_distillation(student: Behaviour, teacher: Behaviour, labels: jax.Array):
    """BiT's loss (SPEC 3): soft cross entropy, averaged over sequences *and* classes, and the *sum*
    over hidden states of their mean squared error. Labels are unused. With one logit (regression)
    the soft cross entropy is identically 0, as in the reference (quirk 19).

    Returns: the terms, whose sum is the loss.
    """
    return {
        "soft_loss": _soft_cross_entropy(student.logits, teacher.logits),
        "hidden_loss": _sum_of_squared_errors(student.hidden_states, teacher.hidden_states),
    }


def bit_distillation_of_scores(student: Behaviour, teacher: Behaviour, labels: jax.Array):
    """BiT's loss with the mean squared error to the teacher's score in place of the soft cross
    entropy, so that pooler and classifier also learn regression (quirk 19).

    Returns: the terms, whose sum is the loss.
    """
    return {
        "score_loss": _mean_squared_error(student.logits, teacher.logits),
        "hidden_loss": _sum_of_squared_errors(student.hidden_states, teacher.hidden_states),
    }


def direction_matching(student: Behaviour, teacher: Behaviour, labels: jax.Array):
    """BiBERT's loss (SPEC 4.3): directions of hidden states and of the relations of query, key and
    value; soft cross entropy plus half the cross entropy of the labels, or for regression the
    squared error to the teacher's score.

    Returns: the terms, whose sum is the loss.
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        task = _mean_squared_error(student.logits, teacher.logits)
    else:
        hard = optax.softmax_cross_entropy_with_integer_labels(student.logits, labels)
        task = _soft_cross_entropy(student.logits, teacher.logits) + 0.5 * jnp.mean(hard)
    terms = {
        "task_loss": task,
        "hidden_loss": sum_of_distances(student.hidden_states, teacher.hidden_states),
    }
    for name in _PROJECTIONS:
        ours, theirs = student.relations[name], teacher.relations[name]
        every = theirs.shape[0] // ours.shape[0]  # student layer i learns from layer i n + n - 1
        terms[f"{name}_loss"] = sum_of_distances(
            *(jnp.where(x <= -100, 0.0, x) for x in (ours, theirs[every - 1 :: every]))
        )
    return terms


def sum_of_distances(xs: jax.Array, ys: jax.Array) -> jax.Array:
    """The sum over the leading axis of || x/||x|| - y/||y|| ||, with norms over all other axes,
    batch included. If x and y have the same direction the gradient is 0, as in torch."""

    def direction(x):
        axes = tuple(range(1, x.ndim))
        return x / jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

    squared = jnp.square(direction(xs) - direction(ys))
    total = jnp.sum(squared, axis=tuple(range(1, xs.ndim)))
    positive = total > 0
    return jnp.sum(jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1.0)), 0.0))


def _soft_cross_entropy(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    return -jnp.mean(jax.nn.softmax(theirs) * jax.nn.log_softmax(ours))


def _mean_squared_error(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(ours - theirs))


def _sum_of_squared_errors(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """Summed over the leading axis, averaged over all others."""
    return jnp.sum(jnp.mean(jnp.square(ours - theirs), axis=tuple(range(1, ours.ndim))))


DISTILLATIONS: dict[str, Distillation] = {
    "bit": bit_distillation,
    "direction_matching": direction_matching,
}


@dataclasses.dataclass(frozen=True)
class TaskTeacher:
    """A frozen finetuned model and the distillation from it.

    dropout: whether its dropout is active, as in BiT's GLUE runs (BiBERT's teacher has none).
    """

    model: BertForSequenceClassification
    distillation: Distillation
    dropout: bool

    looks_at = _LOOKS_AT

    def __call__(self, params: Any, batch: Batch, key: jax.Array) -> Behaviour:
        """The teacher's behaviour on a batch, without gradient."""
        dropout_key = key if self.dropout else None
        return jax.lax.stop_gradient(behaviour(self.model, params, batch, dropout_key))

    def loss(
        self,
        own,
        output: ClassificationOutput,
        variables: Mapping[str, Any],
        targets: Behaviour,
        batch: Batch,
        counts: ClassificationCounts,
    ):
        """Replaces the objective's loss by the distillation's. Its terms are means over the rows of
        a batch, so a micro-batch contributes its share."""
        ours = _behaviour(output, variables, self.model.config.heads)
        share = batch["labels"].size / counts.rows
        terms = self.distillation(ours, targets, batch["labels"])
        terms = {name: term * share for name, term in terms.items()}
        return sum(terms.values()), terms
