"""Small random packed models of all recipes that the runtime has."""

import dataclasses

import numpy as np

from bipft_jax.benchmarks.random_packed import random_packed
from bipft_jax.interop.pack import architecture_of
from bipft_jax.models.recipes import bert_config, recipe_named

RECIPES = [("bipft_a", -1), ("bipft_b", 1), ("bipft_b", 3), ("bit_w1a1", -1), ("bibert", -1)]
# hidden, heads, intermediate: heads of 24 cross words, of 64 are words, of 72 are more than one.
SIZES = [(72, 3, 200), (128, 2, 512), (72, 1, 80)]
VOCABULARY, POSITIONS = 64, 160


def random_model(recipe, rank=-1, sizes=SIZES[0], seed=0):
    """A bare encoder of two layers."""
    hidden, heads, intermediate = sizes
    small = bert_config(recipe_named(recipe, rank), "tiny", VOCABULARY, dropout=0.0)
    architecture = dataclasses.replace(
        architecture_of(small, 0, POSITIONS),
        **{"hidden": hidden, "heads": heads, "intermediate": intermediate},
    )
    model = random_packed(architecture, seed)
    # The feed-forward layer's inputs reach both sides of GELU's minimum.
    model.tensors["layers.ffn_input.weight_scale"] *= 10
    return model


def with_zeros(model):
    """The model without biases and shifts, so that sums are often 0, and with 200 weights of code
    0 in every matrix."""
    rng = np.random.default_rng(3)
    tensors = {name: tensor.copy() for name, tensor in model.tensors.items()}
    for name, tensor in model.tensors.items():
        if name.endswith((".input_shift", ".bias")) and "norm" not in name:
            tensors[name] = np.zeros_like(tensor)
        if name.endswith(".bits"):
            indices = np.sort(rng.choice(8 * tensor.size, 200, replace=False)).astype(np.int32)
            flat = np.unpackbits(tensor, axis=-1, bitorder="little").reshape(-1)
            flat[indices] = 0
            tensors[name] = np.packbits(flat, bitorder="little").reshape(tensor.shape)
            tensors[name.removesuffix(".bits") + ".zeros"] = indices
    return dataclasses.replace(model, tensors=tensors)
