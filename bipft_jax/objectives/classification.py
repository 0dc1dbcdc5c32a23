"""Sequence classification, and scores, which are the same with one output (SPEC 2.7)."""

from __future__ import annotations

import dataclasses

from bipft_jax.models.bert import SEQUENCE_INPUTS, BertForSequenceClassification
from bipft_jax.objectives.losses import classification_counts, classification_loss
from bipft_jax.objectives.objective import Objective

CLASSIFICATION = Objective(
    name="classification",
    build=BertForSequenceClassification,
    inputs=SEQUENCE_INPUTS,
    counts=classification_counts,
    loss=lambda output, batch, counts: (classification_loss(output.logits, batch, counts), {}),
    always_splits=False,  # as runs have been trained: the same masks when one goes on
)


def classification(outputs: int) -> Objective:
    """Of so many classes, or, with 1, of scores."""
    return dataclasses.replace(CLASSIFICATION, outputs=outputs)
