"""Names, transposes and stacks, worked out by hand; round trips; what is refused."""

import jax
import numpy as np
import pytest

from bipft_jax.interop.torch_weights import from_state_dict, slots, to_state_dict
from bipft_jax.models.parameters import named_leaves
from bipft_jax.models.recipes import RECIPES, BertConfig, recipe_named
from tests.objectives import abstract_params, objective


def config(recipe) -> BertConfig:
    return BertConfig(recipe, vocab_size=11, layers=2, hidden=8, heads=2, intermediate=12)


def random_params(model_config, classes):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        abstract_params(model_config, classes),
    )


@pytest.mark.parametrize("recipe", [*RECIPES.values(), recipe_named("bipft_a", lora_rank=3)])
@pytest.mark.parametrize("classes", [0, 3])
def test_what_goes_out_comes_back(recipe, classes):
    params = random_params(config(recipe), classes)
    state = to_state_dict(params, config(recipe), objective(classes))
    assert sum(array.size for array in state.values()) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    back, left_over = from_state_dict(state, config(recipe), objective(classes))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert not left_over


def test_names_are_those_of_hugging_face_and_of_the_reference():
    model_config = config(RECIPES["bipft_b"])
    params = random_params(model_config, 0)
    state = to_state_dict(params, model_config, objective(0))
    flat = named_leaves(params)
    layer = "bert/encoder/layers"
    for name, array in {
        "bert.embeddings.word_embeddings.weight": flat["bert/words/embedding"],
        "bert.embeddings.LayerNorm.weight": flat["bert/norm/scale"],
        "bert.encoder.layer.1.intermediate.dense.weight": flat[f"{layer}/ffn_input/kernel"][1].T,
        "bert.encoder.layer.0.output.LayerNorm.bias": flat[f"{layer}/ffn_norm/bias"][0],
        "bert.encoder.layer.1.attention.self.query.move.bias": flat[
            f"{layer}/attention/query/input_shift"
        ][1],
        "bert.encoder.layer.1.attention.self.clip_attn": flat[f"{layer}/attention/probs_scale"][1],
        # q_p is the estimator that meets both k_p and k_m (SPEC 2.2).
        "bert.encoder.layer.0.attention.self.q_p.weight": flat[
            f"{layer}/attention/query_residual_estimator/kernel"
        ][0].T,
        "bert.pooler.dense.input_clip_val": flat["bert/pooler/input_scale"],
        "cls.predictions.bias": flat["mlm_bias"],
        "cls.seq_relationship.weight": flat["nsp/kernel"].T,
    }.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)
        assert state[name].flags.c_contiguous
    assert "classifier.weight" in slots(model_config, objective(2))


def test_an_old_encoder_without_prefix_and_what_the_references_never_use():
    model_config = config(RECIPES["fp"])
    params = random_params(model_config, 2)
    state = to_state_dict(params, model_config, objective(2))
    head = {name for name in state if name.startswith("classifier")}
    old = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in state.items()
        if name not in head
    }
    old["embeddings.position_ids"] = np.arange(8)[None]
    old["encoder.layer.0.attention.self.query.sa.weight"] = np.zeros(8)
    found, left_over = from_state_dict(old, model_config, objective(2), optional=head.__contains__)
    assert "classifier" not in found and not left_over
    jax.tree.map(np.testing.assert_array_equal, found["bert"], params["bert"])


def test_everything_that_does_not_fit_is_listed_at_once():
    model_config = config(RECIPES["fp"])
    state = to_state_dict(random_params(model_config, 0), model_config, objective(0))
    del state["bert.encoder.layer.1.output.dense.bias"]
    state["bert.encoder.layer.2.output.dense.bias"] = np.zeros(8)
    state["bert.encoder.layer.0.intermediate.dense.weight"] = np.zeros((8, 12))
    with pytest.raises(ValueError, match="bert.bin does not fit this model") as error:
        from_state_dict(state, model_config, objective(0), source="bert.bin")
    for sentence in (
        "layer.1.output.dense.bias is missing",
        "layer.2.output.dense.bias is unexpected",
        "layer.0.intermediate.dense.weight has shape (8, 12), this model's has (12, 8)",
    ):
        assert sentence in str(error.value)
