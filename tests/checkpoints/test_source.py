"""What a run takes over from another run's checkpoint, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bipft_jax.checkpoints.source import Source, warm_started
from bipft_jax.models.architectures import architecture, config_of
from bipft_jax.models.decoder_recipes import DecoderConfig, decoder_recipe_named
from bipft_jax.models.parameters import is_scale
from bipft_jax.models.recipes import RECIPES, BertConfig, recipe_named
from bipft_jax.objectives.causal_lm import CAUSAL_LM
from tests.objectives import abstract_params, objective


def config(recipe, switches=None, **overrides):
    sizes = dict(vocab_size=11, layers=2, hidden=8, heads=2, intermediate=16, max_positions=8)
    return BertConfig(recipe_named(recipe, **(switches or {})), **{**sizes, **overrides})


def filled(config, classes, value):
    return jax.tree.map(
        lambda leaf: np.full(leaf.shape, value, leaf.dtype), abstract_params(config, classes)
    )


def source(recipe="fp", classes=0, **overrides):
    theirs = config(recipe, **overrides)
    return Source(
        "runs/fp", 7, filled(theirs, classes, 1.0), architecture(theirs), objective(classes), None
    )


def new_paths(params):
    return {"/".join(path) for path, value in flatten_dict(params).items() if (value == 0).all()}


def test_a_binary_student_takes_over_all_that_full_precision_bert_has():
    student = config("bipft_b")
    params = warm_started(filled(student, 0, 0.0), student, objective(0), source())
    created = new_paths(params)
    kinds = ("_scale", "input_shift", "_estimator/kernel", "_estimator/bias")
    assert all(path.endswith(kinds) or "pooler_norm" in path for path in created)
    assert sum(path.endswith("_scale") for path in created) == 11
    assert sum("_estimator/kernel" in path for path in created) == 5
    assert {"mlm_bias", "nsp/kernel", "bert/words/embedding"}.isdisjoint(created)


def test_a_classifier_drops_the_heads_and_inherits_the_scales():
    student = config("bipft_b")
    params = warm_started(filled(student, 3, 0.0), student, objective(3), source("bipft_b"))
    assert new_paths(params) == {"classifier/kernel", "classifier/bias"}
    assert "nsp" not in params and "mlm_bias" not in params


@pytest.mark.parametrize(
    "lost", ["bert/pooler/kernel", "mlm_bias", "bert/encoder/layers/ffn_norm/scale"]
)
def test_a_checkpoint_that_lost_a_parameter_is_refused(lost):
    student, broken = config("bipft_b"), source()
    flat = flatten_dict(broken.params, sep="/")
    del flat[lost]
    broken = broken._replace(params=unflatten_dict(flat, sep="/"))
    with pytest.raises(ValueError, match=lost):
        warm_started(filled(student, 0, 0.0), student, objective(0), broken)


def test_a_binary_checkpoint_without_a_scale_is_refused():
    """Only what the source's recipe never had may be created."""
    student, broken = config("bipft_b"), source("bipft_b")
    flat = flatten_dict(broken.params)
    lost = next(path for path in flat if is_scale(path))
    del flat[lost]
    broken = broken._replace(params=unflatten_dict(flat))
    with pytest.raises(ValueError, match="/".join(lost)):
        warm_started(filled(student, 0, 0.0), student, objective(0), broken)


def test_another_size_is_named_by_its_dimensions():
    with pytest.raises(ValueError, match="hidden is 8 in the checkpoint and 16 in the config; in"):
        student = config("fp", hidden=16, intermediate=32)
        warm_started(filled(student, 0, 0.0), student, objective(0), source())


@pytest.mark.parametrize(
    "recipe, theirs, ours",
    [
        ("bipft_b", dict(lora_rank=2), {}),
        ("bipft_b", dict(estimator_rank=4), {}),
        ("bipft_b", dict(full_precision_weights=True), {}),
        ("bipft_b", {}, dict(full_precision_weights=True)),
        ("fp", dict(lora_rank=2), {}),
    ],
)
@pytest.mark.parametrize("classes", [0, 2])
def test_switches_that_would_drop_or_binarise_what_was_trained_are_refused(
    recipe, theirs, ours, classes
):
    student = config("bipft_b", ours)
    (name,) = theirs | ours
    with pytest.raises(ValueError, match=f"runs/fp was trained with {name} .* --config.{name}="):
        begun = source(recipe, switches=theirs)
        warm_started(filled(student, classes, 0.0), student, objective(classes), begun)


@pytest.mark.parametrize(
    "recipe",
    [
        *RECIPES.values(),
        recipe_named("bipft_b", estimator_rank=4),
        recipe_named("bipft_b", estimator_rank=0),
        recipe_named("bipft_a", lora_rank=4, full_precision_weights=True),
    ],
)
def test_an_architecture_survives_being_written_down(recipe):
    written = BertConfig(recipe, 11, 2, 8, 2, 16, dropout=0.0)
    described = json.loads(json.dumps(architecture(written)))
    assert config_of(described, dropout=0.0) == written
    assert config_of(described).dropout == 0.1


def decoder(**block):
    sizes = dict(vocab_size=11, layers=2, hidden=8, heads=2, kv_heads=2, intermediate=16)
    return DecoderConfig(decoder_recipe_named("bitnet_b158", **block), **sizes)


def test_a_decoder_starts_from_its_twin_with_the_same_block_and_from_no_encoder():
    written = decoder(gate="silu", norm="linear", groups=2)
    described = json.loads(json.dumps(architecture(written)))
    assert config_of(described) == written
    twin = dataclasses.replace(
        written, recipe=decoder_recipe_named("bitnet_fp", "silu", "linear", 2)
    )
    ones = jax.tree.map(lambda x: np.ones(x.shape), CAUSAL_LM.abstract_params(twin))
    begun = Source("runs/twin", 7, ones, architecture(twin), CAUSAL_LM, None)
    zeros = jax.tree.map(np.zeros_like, ones)
    assert not new_paths(warm_started(zeros, written, CAUSAL_LM, begun))
    with pytest.raises(ValueError, match="groups is 2 in the checkpoint and 1 in the config"):
        warm_started(zeros, decoder(gate="silu", norm="linear"), CAUSAL_LM, begun)
    with pytest.raises(ValueError, match="it is an encoder, and recipe bitnet_b158 is a decoder"):
        warm_started(zeros, written, CAUSAL_LM, source())


def test_scales_of_a_new_binary_model_are_marked_missing():
    from bipft_jax.models.bert import BertForSequenceClassification

    ids = jnp.ones((1, 4), jnp.int32)
    model = BertForSequenceClassification(config("bipft_a"), 2)
    params = model.init(jax.random.key(0), ids, ids, ids)["params"]
    for path, value in flatten_dict(params).items():
        assert np.isnan(value).all() == is_scale(path)
