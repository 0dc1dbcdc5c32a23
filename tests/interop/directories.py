"""Directories of Hugging Face to be read in tests: small models with random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import safetensors.numpy

from bipft_jax.checkpoints.source import Source
from bipft_jax.data.tokenizers import SPECIAL_PIECES, WordPieceTokenizer
from bipft_jax.interop.hugging_face import write_directory
from bipft_jax.interop.torch_weights import to_state_dict
from bipft_jax.models.parameters import named_leaves
from bipft_jax.models.recipes import RECIPES, BertConfig, architecture
from tests.objectives import abstract_params, objective

WORDS = WordPieceTokenizer([*SPECIAL_PIECES, "cat", "dog", "##s", "é", "a", "the"])
HEADS = {"mlm_bias", "nsp/kernel", "nsp/bias"} | {
    f"{module}/{leaf}"
    for module, leaves in (("mlm_dense", ("kernel", "bias")), ("mlm_norm", ("scale", "bias")))
    for leaf in leaves
}


def config(recipe, tokenizer=WORDS) -> BertConfig:
    return BertConfig(
        recipe, tokenizer.vocab_size, layers=2, hidden=8, heads=2, intermediate=12, max_positions=16
    )


def model(recipe="fp", classes=0, tokenizer=WORDS, **facts) -> Source:
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    described = config(recipe, tokenizer)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        abstract_params(described, classes),
    )
    return Source(
        "runs/x", 7, params, architecture(described), objective(classes), tokenizer, **facts
    )


def state_of(source):
    return to_state_dict(source.params, source.config(), source.objective, source.missing)


def write(directory, source, state=None, **changes):
    """A directory as others write it: nothing in it says what this library would say."""
    write_directory(source, directory)
    described = json.loads((directory / "config.json").read_text())
    del described["bipft_jax"]
    described |= {"model_type": "bert", **changes}
    (directory / "config.json").write_text(json.dumps(described))
    state = state_of(source) if state is None else state
    safetensors.flax.save_file(
        {name: jnp.asarray(array) for name, array in state.items()},
        directory / "model.safetensors",
    )


def assert_same_bits(found, expected):
    found, expected = named_leaves(found), named_leaves(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == np.float32
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path
