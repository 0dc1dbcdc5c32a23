"""Packed models with random weights: for times, which do not depend on what a model has learned."""

from __future__ import annotations

import numpy as np
from bipft_runtime.architecture import Architecture
from bipft_runtime.file import PackedModel, Task

# Means of what is not centred at 0, by the last part of a tensor's name. Half of probs_scale is
# the threshold of a probability.
_MEANS = {
    **{"scale": 1.0, "weight_scale": 0.04, "input_scale": 0.8, "probs_scale": 0.06},
    **{"query_scale": 0.4, "key_scale": 0.4, "value_scale": 0.4},
}


def random_packed(architecture: Architecture, seed: int = 0) -> PackedModel:
    """A model with random bits and biases, and scales of a trained model's size. Its tokenizer
    knows single letters."""
    rng = np.random.default_rng(seed)

    def values(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        if dtype == "uint8":
            return rng.integers(0, 256, shape, np.uint8)
        last = name.rpartition(".")[2]
        mean = 0.05 if name == "words.scale" else _MEANS.get(last, 0.0)
        spread = 0.2 * mean if mean else 0.05
        sampled = rng.uniform(mean - spread, mean + spread, shape)
        return np.asarray(sampled, dtype)

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    unused = [f"[unused{i}]" for i in range(architecture.vocab_size - len(pieces))]
    return PackedModel(
        architecture=architecture,
        tensors={name: values(name, *row) for name, row in architecture.tensors().items()},
        tokenizer={"kind": "wordpiece", "vocabulary": [*pieces, *unused]},
        task=Task("", (), 1, architecture.max_positions),
        source={"random": seed},
    )
