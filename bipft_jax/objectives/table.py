"""The table of objectives, by their name in configs and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bipft_jax.errors import unknown_name
from bipft_jax.objectives.causal_lm import CAUSAL_LM
from bipft_jax.objectives.classification import CLASSIFICATION, classification
from bipft_jax.objectives.mlm_nsp import MLM_NSP
from bipft_jax.objectives.objective import Objective

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (MLM_NSP, CAUSAL_LM, CLASSIFICATION)
}


def objective_named(name: str) -> Objective:
    """The objective of that name. Raises: ValueError naming the nearest known ones."""
    if name not in OBJECTIVES:
        raise unknown_name("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def objective_of(described: Mapping[str, Any]) -> Objective:
    """The objective of a checkpoint, from its `config` item.

    Raises: ValueError for an objective that this version does not have.
    """
    if "objective" not in described:  # before objectives had names: 0 for pretraining heads
        return classification(described["classes"]) if described["classes"] else MLM_NSP
    record = described["objective"]
    return dataclasses.replace(objective_named(record["name"]), outputs=record["outputs"])
