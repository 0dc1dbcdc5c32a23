"""Sequence classification; regression is the case of one output (SPEC 2.7)."""

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
    always_splits_key=False,  # keeps the dropout masks of existing runs, which may resume
)


def classification(outputs: int) -> Objective:
    """The objective for so many classes; 1 for regression."""
    return dataclasses.replace(CLASSIFICATION, outputs=outputs)
