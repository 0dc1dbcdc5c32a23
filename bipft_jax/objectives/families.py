"""Keys of a pretraining config that only encoders, or only decoders, have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

# Dotted keys, and their values without effect.
OF_ENCODERS: dict[str, Any] = {
    "estimator_rank": -1,
    "lora_rank": 0,
    "full_precision_weights": False,
    "fused_attention": False,
    "dropout": 0.0,
}
OF_DECODERS: dict[str, Any] = {
    "decoder.gate": "",
    "decoder.norm": "",
    "decoder.groups": 1,
    "decoder.tied": True,
    "decoder.rope_theta": 0.0,
    "decoder.norm_epsilon": 1e-5,
    "decoder.separate_documents": False,
}


def refuse_keys(config: ml_collections.ConfigDict, model: str, others: Mapping[str, Any]) -> None:
    """Raises ValueError if a key of other models is set; model: such as "a decoder"."""
    values = flatten_dict(config.to_dict(), sep=".")
    for key, neutral in others.items():
        if values[key] != neutral:
            raise ValueError(
                f"{key} is {values[key]!r}, but recipe {config.recipe} is {model}, which has no "
                f"such thing: leave it at {neutral!r}"
            )
