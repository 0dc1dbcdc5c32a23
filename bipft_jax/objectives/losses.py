"""Losses: sums over a micro-batch divided by the counts of the whole update.

The gradient of an update is therefore the sum of the gradients of its micro-batches, however the
batch is split (`training/step.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bipft_jax.models.bert import PretrainingOutput

Batch = dict[str, jax.Array]


class Counts(NamedTuple):
    """Denominators of an update of MLM + NSP: sequences, and masked tokens (at least 1)."""

    sequences: jax.Array
    masked_tokens: jax.Array


class ClassificationCounts(NamedTuple):
    """Denominators of an update of a task: rows, and the sum of their weights (at least 1)."""

    rows: jax.Array
    weight: jax.Array


def counts_of(batch: Batch) -> Counts:
    """Counts of a batch of MLM + NSP examples."""
    return Counts(
        jnp.asarray(batch["nsp_labels"].size, jnp.float32),
        jnp.maximum(jnp.sum(batch["mlm_weights"]), 1.0),
    )


def pretraining_loss(output: PretrainingOutput, batch: Batch, counts: Counts):
    """MLM + NSP cross entropy (SPEC 2.5, `real`).

    Arguments:
      output: of `BertForPreTraining` on the batch.
      batch: mlm_ids int [B, P], mlm_weights float [B, P], nsp_labels int [B].
      counts: of the whole update, of which this batch may be a micro-batch.

    Returns: (loss, metrics): scalars, losses in nats; all add up over micro-batches.
    """
    weights = batch["mlm_weights"] / counts.masked_tokens
    mlm = optax.softmax_cross_entropy_with_integer_labels(output.mlm_logits, batch["mlm_ids"])
    nsp = optax.softmax_cross_entropy_with_integer_labels(output.nsp_logits, batch["nsp_labels"])
    metrics = {
        "mlm_loss": jnp.sum(mlm * weights.astype(mlm.dtype)),
        "nsp_loss": jnp.sum(nsp) / counts.sequences.astype(nsp.dtype),
        "mlm_accuracy": jnp.sum(
            jnp.where(_are_likeliest(output.mlm_logits, batch["mlm_ids"]), weights, 0.0)
        ),
        "nsp_accuracy": jnp.sum(
            _are_likeliest(output.nsp_logits, batch["nsp_labels"]), dtype=jnp.float32
        )
        / counts.sequences,
    }
    return metrics["mlm_loss"] + metrics["nsp_loss"], metrics


def _are_likeliest(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """[..., classes] and [...] -> bool [...]: whether the id has the highest logit."""
    return jnp.argmax(logits, -1).astype(ids.dtype) == ids


def classification_counts(batch: Batch) -> ClassificationCounts:
    """Counts of a batch of a task."""
    return ClassificationCounts(
        jnp.asarray(batch["labels"].size, jnp.float32),
        jnp.maximum(jnp.sum(batch["weights"]), 1.0),
    )


def classification_loss(logits: jax.Array, batch: Batch, counts: ClassificationCounts) -> jax.Array:
    """Mean cross entropy, or mean squared error for regression (one logit).

    Arguments:
      logits: [B, classes].
      batch: labels int [B], or float [B] for regression; weights float [B], 0 on padding rows.
      counts: of the whole update, of which this batch may be a micro-batch.
    """
    if jnp.issubdtype(batch["labels"].dtype, jnp.floating):
        losses = jnp.square(logits[:, 0] - batch["labels"].astype(logits.dtype))
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    weights = batch["weights"].astype(losses.dtype)
    return jnp.sum(losses * weights) / counts.weight.astype(losses.dtype)
