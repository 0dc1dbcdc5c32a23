"""Decoders with random weights, to be written to directories and read in tests."""

import functools

import jax
import numpy as np

from bipft_jax.checkpoints.source import Source
from bipft_jax.data.tokenizers import SPECIAL_PIECES, WordPieceTokenizer
from bipft_jax.models.decoder_recipes import DecoderConfig, architecture, decoder_recipe_named
from bipft_jax.objectives.causal_lm import CAUSAL_LM

_abstract_params = functools.cache(CAUSAL_LM.abstract_params)
LETTERS = WordPieceTokenizer([*SPECIAL_PIECES, *"abcdefgh"])


def decoder(recipe="bitnet_b158", *, gate="", norm="", groups=1, facts=None, **fields) -> Source:
    """A checkpoint; facts: other fields of `Source`, fields: of `DecoderConfig`."""
    sizes = dict(layers=2, hidden=16, intermediate=24, heads=4, kv_heads=2) | fields
    config = DecoderConfig(
        decoder_recipe_named(recipe, gate, norm, groups), LETTERS.vocab_size, **sizes
    )
    rng = np.random.default_rng(0)

    def random(path, leaf):
        gain = path[-1].key == "scale"
        values = rng.normal(size=leaf.shape) * (0.1 if gain else 0.05) + gain
        return values.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(random, _abstract_params(config))
    source = Source("runs/x", 7, params, architecture(config), CAUSAL_LM, LETTERS)
    return source._replace(**{"sequence_length": 64, **(facts or {})})
