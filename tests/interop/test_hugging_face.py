"""Directories that were written come back, those of others are understood or refused by name."""

import json
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from bipft_jax.checkpoints.source import Source, warm_started
from bipft_jax.data.tokenizers import SPECIAL_PIECES, WordPieceTokenizer, train_sentencepiece
from bipft_jax.fill_mask import fill_mask
from bipft_jax.interop.hugging_face import read_directory, transformers_class, write_directory
from bipft_jax.interop.torch_weights import from_state_dict, to_state_dict, usual_names
from bipft_jax.models.bert import BertForPreTraining
from bipft_jax.models.parameters import is_scale, named_leaves
from bipft_jax.models.recipes import RECIPES, BertConfig, architecture, recipe_named
from bipft_jax.objectives.distillation import make_teacher
from tests.data.test_tokenizers import hugging_face_json
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


@pytest.mark.parametrize(
    "recipe, classes",
    [
        ("fp", 0),
        ("fp", 3),
        (recipe_named("bipft_b", estimator_rank=2), 0),
        (recipe_named("bipft_a", lora_rank=3, full_precision_weights=True), 2),
        ("bit_w1a2", 1),
        ("bibert", 0),
    ],
)
def test_what_is_written_comes_back_with_the_same_bits(tmp_path, recipe, classes):
    source = model(recipe, classes)
    flat = flatten_dict(source.params)
    for path in filter(is_scale, flat):
        flat[path] = np.ones_like(flat[path])  # ours, and so a value like any other
    source = source._replace(params=unflatten_dict(flat))
    write_directory(source, tmp_path / "out")
    found, ignored = read_directory(tmp_path / "out")
    assert_same_bits(found.params, source.params)
    assert (found.architecture, found.objective) == (source.architecture, objective(classes))
    assert found.tokenizer.fingerprint == WORDS.fingerprint
    assert (found.missing, ignored) == ((), [])


def test_a_sentencepiece_model_goes_along(tmp_path):
    tokenizer = train_sentencepiece(["the cat sat on a mat", "the dogs ran to a man"], 22)
    write_directory(model("bipft_a", tokenizer=tokenizer), tmp_path / "out")
    found, _ = read_directory(tmp_path / "out")
    assert found.tokenizer.fingerprint == tokenizer.fingerprint
    (tmp_path / "out" / "second.model").write_bytes(b"")
    with pytest.raises(ValueError, match="out has no vocab.txt and 2 SentencePiece .model files"):
        read_directory(tmp_path / "out")


def test_only_full_precision_says_that_it_is_a_bert(tmp_path):
    for recipe, model_type, loader in (
        ("fp", "bert", "BertForSequenceClassification"),
        ("bipft_b", "bipft_jax", None),
        (recipe_named("fp", lora_rank=2), "bipft_jax", None),
    ):
        source = model(recipe, 3, run={"program": "finetune", "task": "mnli"})
        directory = tmp_path / f"{model_type}-{source.architecture['lora_rank']}"
        write_directory(source, directory)
        described = json.loads((directory / "config.json").read_text())
        assert described["model_type"] == model_type
        assert described.get("architectures") == (loader and [loader])
        assert described["id2label"] == {"0": "entailment", "1": "neutral", "2": "contradiction"}
        assert described["problem_type"] == "single_label_classification"
        assert transformers_class(source) == loader
    with safetensors.safe_open(tmp_path / "bert-0" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_encoder_without_heads_starts_a_binary_model_that_gets_exactly_those_new(tmp_path):
    source = model()
    encoder = {
        name.removeprefix("bert."): array.astype(jnp.bfloat16)
        for name, array in state_of(source).items()
        if name.startswith("bert.")
    }
    position_ids = {"embeddings.position_ids": np.arange(16)[None]}
    write(tmp_path / "out", source, encoder | position_ids)
    found, ignored = read_directory(tmp_path / "out")
    assert set(found.missing) == HEADS and transformers_class(found) == "BertModel"
    assert ignored == ["bert.embeddings.position_ids"]
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), source.params["bert"]
    )
    assert_same_bits(found.params, {"bert": rounded})

    student = config(RECIPES["bipft_b"])
    fresh = jax.tree.map(
        lambda leaf: np.full(leaf.shape, np.float32(99)), abstract_params(student, 0)
    )
    params = named_leaves(warm_started(fresh, student, objective(0), found))
    created = {path for path, leaf in params.items() if (leaf == 99).all()}
    of_binary_models = set(named_leaves(fresh)) - set(named_leaves(source.params))
    assert created == HEADS | of_binary_models

    write_directory(found, tmp_path / "again")
    again, _ = read_directory(tmp_path / "again")
    assert_same_bits(again.params, found.params)
    assert again.missing == found.missing

    del found.params["bert"]["norm"]["scale"]  # not one that was missing when it was read
    with pytest.raises(ValueError, match="bert/norm/scale is missing"):
        warm_started(fresh, student, objective(0), found)
    with pytest.raises(ValueError, match="without a masked-word head"):
        fill_mask(again, "the [MASK]")


def test_a_masked_language_model_without_pooler_teaches_and_fills_masks(tmp_path):
    source = model()
    state = {
        name: array
        for name, array in state_of(source).items()
        if not name.startswith(("bert.pooler.", "cls.seq_relationship."))
    }
    write(tmp_path / "out", source, state)
    found, _ = read_directory(tmp_path / "out")
    assert transformers_class(found) == "BertForMaskedLM"
    assert fill_mask(found, "the [MASK] s") == fill_mask(source, "the [MASK] s")

    teacher, params = make_teacher(found.config(), found.params, found.config(), dropout=False)
    ids = jnp.asarray([[2, 5, 7, 3, 0]])
    batch = {"input_ids": ids, "token_type_ids": 0 * ids, "attention_mask": jnp.sign(ids)}
    targets = jax.jit(teacher)(params, batch, jax.random.key(0))
    expected = jax.jit(BertForPreTraining(source.config()).apply)(
        {"params": source.params}, *batch.values(), jnp.zeros((1, 1), int)
    )
    np.testing.assert_allclose(targets.hidden_states, expected.hidden_states, atol=1e-6)
    assert targets.nsp_logits is None and targets.mlm_logits is None


def test_masks_are_filled_with_finite_probabilities_or_not_at_all():
    source = model()
    for top in (0, -1, 7):  # of 11 pieces five are special
        with pytest.raises(ValueError, match=f"top is {top}: it must be from 1 to the 6 ordinary"):
            fill_mask(source, "the [MASK]", top)
    assert len(fill_mask(source, "the [MASK]", 6)[0]) == 6
    source.params["mlm_bias"][7] = np.nan
    with pytest.raises(ValueError, match=r"runs/x \(step 7\): logits are NaN or infinite"):
        fill_mask(source, "the [MASK]")


def test_a_state_dict_of_the_reference_needs_a_recipe_and_tells_its_ranks(tmp_path):
    source = model(recipe_named("bipft_b", estimator_rank=3, lora_rank=2))
    layer = "bert.encoder.layer.{}.attention.self."
    state = state_of(source) | {
        layer.format(0) + "clip_key": np.float32(1.0),
        layer.format(0) + "query.sa.weight": np.zeros(8, np.float32),
        "cls.predictions.decoder.weight": state_of(source)[
            "bert.embeddings.word_embeddings.weight"
        ],
    }
    write(tmp_path / "out", source, state, hidden_act="relu")
    for named in (None, "fp"):
        with pytest.raises(ValueError, match=r"input_clip_val.* name its recipe \(--recipe\)"):
            read_directory(tmp_path / "out", named)
    found, ignored = read_directory(tmp_path / "out", "bipft_b")
    assert found.architecture == source.architecture
    assert set(ignored) == {
        layer.format(0) + "query.sa.weight",
        "cls.predictions.decoder.weight",
    }
    key_scale = found.params["bert"]["encoder"]["layers"]["attention"]["key_scale"]
    ours = source.params["bert"]["encoder"]["layers"]["attention"]["key_scale"]
    np.testing.assert_array_equal(key_scale, [np.nan, ours[1]])
    assert sum(np.isnan(leaf).sum() for leaf in jax.tree.leaves(found.params)) == 1
    with pytest.raises(ValueError, match="q_p.*is unexpected.*and [0-9]+ more$"):
        read_directory(tmp_path / "out", "bipft_a")


def test_a_recipe_that_contradicts_the_directory_is_refused(tmp_path):
    write_directory(model("bipft_b"), tmp_path / "out")
    with pytest.raises(ValueError, match="says that the recipe is bipft_b, not bipft_a"):
        read_directory(tmp_path / "out", "bipft_a")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("hidden_act", "gelu_new", "hidden_act is 'gelu_new'"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("is_decoder", True, "is_decoder is True"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False"),
        ("model_type", "roberta", "model_type is 'roberta', .* only 'bert' or 'bipft_jax'"),
        ("vocab_size", 12, "vocab_size is 12, but the vocabulary has 11 pieces"),
        ("vocab_size", 10, "vocab_size is 10, but the vocabulary has 11 pieces"),
        ("type_vocab_size", 1, "type_vocab_size is 1, .* from 2"),  # pairs have two
        ("quantization_config", {"bits": 8}, "quantization_config is {'bits': 8}"),
    ],
)
def test_another_kind_of_bert_is_refused_by_key_and_value(tmp_path, key, value, message):
    write(tmp_path / "out", model(), **{key: value})
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read_directory(tmp_path / "out")


def test_a_cased_tokenizer_is_refused(tmp_path):
    write(tmp_path / "out", model())
    path = tmp_path / "out" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": False}))
    with pytest.raises(ValueError, match="tokenizer_config.json: do_lower_case is False"):
        read_directory(tmp_path / "out")


@pytest.mark.parametrize(
    "classes, architectures, change, message",
    [
        (0, None, {"cls.predictions.bias": None}, "cls.predictions.bias is missing"),
        (
            0,
            None,
            {"bert.pooler.dense.weight": None, "bert.pooler.dense.bias": None},
            "bert.pooler.dense.weight is missing",  # the NSP head reads it
        ),
        (0, None, {"qa_outputs.bias": np.zeros(2)}, "qa_outputs.bias is unexpected"),
        (0, None, {"cls.predictions.decoder.weight": np.zeros((11, 8))}, "has the two tied"),
        (2, ["BertForMultipleChoice"], {}, r"architectures is \['BertForMultipleChoice'\]"),
        (
            2,
            None,
            {"bert.pooler.dense.weight": None, "bert.pooler.dense.bias": None},
            "bert.pooler.dense.weight is missing",
        ),
    ],
)
def test_heads_that_are_incomplete_or_of_another_kind_are_refused(
    tmp_path, classes, architectures, change, message
):
    source = model(classes=classes)
    state = {k: v for k, v in (state_of(source) | change).items() if v is not None}
    write(tmp_path / "out", source, state, architectures=architectures)
    with pytest.raises(ValueError, match=message):
        read_directory(tmp_path / "out")


def test_files_that_are_missing_or_damaged_are_named(tmp_path, monkeypatch):
    directory = tmp_path / "out"
    with pytest.raises(ValueError, match="there is no .*out/config.json"):
        read_directory(directory)
    write(directory, model())
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        read_directory(directory)
    weights.rename(directory / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="pytorch_model.bin needs PyTorch .*pip install torch"):
        read_directory(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor pytorch_model.bin"):
        read_directory(directory)
    (directory / "config.json").write_text('{"model_type": "bert"')
    with pytest.raises(ValueError, match="config.json is not a JSON file"):
        read_directory(directory)
    (directory / "config.json").write_text('{"vocab_size": 11}')
    write(tmp_path / "other", model())
    (tmp_path / "other" / "config.json").write_text('{"vocab_size": 11}')
    with pytest.raises(ValueError, match="config.json has no num_hidden_layers"):
        read_directory(tmp_path / "other")


def test_nothing_is_written_over_a_directory_in_use(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and nothing is overwritten"):
        write_directory(model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_model_that_lost_a_parameter_is_not_given_away(tmp_path):
    source = model()
    del source.params["bert"]["norm"]["scale"]
    with pytest.raises(ValueError, match=r"runs/x \(step 7\) .* bert/norm/scale is missing"):
        write_directory(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_card_says_what_it_is_and_where_it_comes_from(tmp_path, recipe):
    run = {"program": "pretrain", "corpus_dir": "data/wiki", "init_from": "", "teacher": "runs/fp"}
    source = model(recipe, run=run, metrics={"loss": 2.345678, "mlm_accuracy": None})
    write_directory(source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    front, _, rest = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: bipft_jax\npipeline_tag: fill-mask\ntags:\n- bert" in front
    assert ("- binary-neural-network" in front) == (recipe != "fp")
    for text in (
        f"`{recipe}` of bipft_jax (Bi" if recipe != "fp" else "(BERT, Devlin",
        "Size: 2 layers, hidden size 8, 2 heads, vocabulary of 11",
        f"{sum(leaf.size for leaf in jax.tree.leaves(source.params)):,} parameters",
        "- Origin: pretrained on the corpus `data/wiki`, distilled from `runs/fp`; step 7",
        "| loss | 2.346 |\n| mlm_accuracy | not finite |",
    ):
        assert text in rest
    assert ("BertForPreTraining.from_pretrained" in rest) == (recipe == "fp")
    assert ("CC BY-NC" in rest) == recipe.startswith("bit_")


def test_a_torch_file_is_read_as_weights_only(tmp_path, monkeypatch):
    """With a stand-in for torch; the peers' tests have the real one."""
    write(tmp_path, model())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    def load(path, *, map_location, weights_only):
        assert path == tmp_path / "pytorch_model.bin" and map_location == "cpu" and weights_only
        raise pickle.UnpicklingError("Unsupported global: os.system")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds more than tensors"):
        read_directory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0, it must be a positive number"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers is '6', it must be a positive number"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None, it must be a positive number"),
        (
            {"num_hidden_layers": 2.0},
            "num_hidden_layers is 2.0, it must be a positive number without",
        ),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, it must be a positive number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, .* from 1 to 10000"),
        ({"hidden_size": 10**30}, "hidden_size is 1000.*, it must be a positive number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan, it must be a positive number"),
        ({"num_attention_heads": 3}, "config.json: hidden size 8 is not a multiple of 3 heads"),
        ({"architectures": "BertModel"}, "architectures is 'BertModel', it must be a list"),
        (
            {"architectures": ["BertForSequenceClassification"]},
            "the weights have no classifier.weight",
        ),
        ({"bipft_jax": {}}, "bipft_jax is not what this library writes there"),
        ({"bipft_jax": 1}, "bipft_jax is not what this library writes there"),
    ],
)
def test_a_broken_config_is_explained_by_its_key(tmp_path, changes, message):
    write(tmp_path, model(), **changes)
    with pytest.raises(ValueError, match=message):
        read_directory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": ["a", "b", "c"]}, "id2label is .* must be an object"),
        ({"id2label": {"0": "a", "1": "b"}}, "id2label has the numbers 0, 1, .* has 3 outputs"),
        ({"id2label": {"0": "a", "1": "b", "2": None}}, "each output must have a name"),
        ({"id2label": {"0": "a", "1": "b", "2": "A"}}, "gives two outputs one name: a, b, A"),
        ({"label2id": {"a": 0, "b": 1, "c": 1}}, "label2id has the numbers 0, 1, "),
        (
            {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"b": 0, "a": 1, "c": 2}},
            "contradict each other: a, b, c and b, a, c",
        ),
        ({"num_labels": 2}, "num_labels is 2, it must be 3"),
        ({"problem_type": "multi_label_classification"}, "must be 'single_label_classification'"),
        ({"problem_type": "regression"}, "must be 'single_label_classification'"),
    ],
)
def test_what_a_classifier_means_is_said_once_for_each_output(tmp_path, changes, message):
    nothing = dict.fromkeys(("id2label", "label2id"))
    write(tmp_path, model(classes=3), **(nothing | changes))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read_directory(tmp_path)


def test_this_librarys_own_description_must_agree_with_the_other_keys(tmp_path):
    write_directory(model("bipft_b"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 4}))
    with pytest.raises(ValueError, match="num_attention_heads is 4, but bipft_jax .* heads is 2"):
        read_directory(tmp_path)


LAYER = "bert.encoder.layer.1."


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", [f"{LAYER}output.dense.weight", "cls.predictions.bias"])
def test_an_array_that_is_not_finite_is_named(tmp_path, name, value):
    state = state_of(model())
    state[name] = state[name].copy()
    state[name].flat[3] = value
    write(tmp_path, model(), state)
    with pytest.raises(ValueError, match=f"{name} has 1 values that are NaN or infinite, of"):
        read_directory(tmp_path)


def test_only_floats_that_fit_are_weights(tmp_path):
    name = "bert.pooler.dense.weight"
    for array, message in (
        (np.zeros((8, 8), np.int8), "has type int8"),
        (np.full((8, 8), 1e39), "has 64 values that are NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            state = state_of(model()) | {name: array}
            from_state_dict(state, config(RECIPES["fp"]), objective(0))


def test_scales_may_be_uninitialised_but_not_infinite(tmp_path):
    source = model("bit_w1a1")
    name = f"{LAYER}attention.self.clip_key"
    for value, allowed in ((np.nan, True), (np.inf, False)):
        state = state_of(source) | {name: np.float32(value)}
        write(tmp_path / str(value), source, state)
        if allowed:
            read_directory(tmp_path / str(value), "bit_w1a1")
            continue
        with pytest.raises(ValueError, match=f"{name} has 1 values"):
            read_directory(tmp_path / str(value), "bit_w1a1")


def test_a_model_with_a_value_that_is_not_finite_is_not_given_away(tmp_path):
    source = model()
    source.params["bert"]["norm"]["bias"][2] = np.nan
    with pytest.raises(ValueError, match="bert/norm/bias has 1 values that are NaN"):
        write_directory(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_beyond_the_vocabulary_are_cut_off_everywhere(tmp_path):
    source = model()
    state = state_of(source)
    words = "bert.embeddings.word_embeddings.weight"
    for name in (words, "cls.predictions.bias"):
        more = np.full((5, *state[name].shape[1:]), 7, np.float32)
        state[name] = np.concatenate([state[name], more])
    state["cls.predictions.decoder.weight"] = state[words]
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    for vocab_size in (16, 11):
        directory = tmp_path / str(vocab_size)
        write(directory, source, state, vocab_size=vocab_size)
        found, _ = read_directory(directory)
        assert_same_bits(found.params, source.params)
        assert found.architecture == source.architecture
        assert (found.run["surplus_rows"], found.run["added_tokens"]) == (5, [])
    (directory / "added_tokens.json").write_text('{"<user>": 12, "<url>": 11}')
    assert read_directory(directory)[0].run["added_tokens"] == ["<url>", "<user>"]
    (directory / "added_tokens.json").write_text('{"<user>": 8}')
    with pytest.raises(ValueError, match="added_tokens.json gives the id 8 to '<user>'"):
        read_directory(directory)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."]
)
def test_names_of_a_wrapped_model_are_those_of_the_model(tmp_path, prefix):
    source = model()
    state = {prefix + name: array for name, array in state_of(source).items()}
    write(tmp_path, source, state)
    assert_same_bits(read_directory(tmp_path)[0].params, source.params)
    state["cls.predictions.bias"] = np.zeros(11, np.float32)
    with pytest.raises(ValueError, match="another array are both the model's cls.predictions.bias"):
        usual_names(state)


def test_an_array_that_is_tied_may_have_either_name(tmp_path):
    source = model()
    state = state_of(source)
    words, decoder = "bert.embeddings.word_embeddings", "cls.predictions.decoder"
    state[f"{decoder}.weight"] = state.pop(f"{words}.weight")
    state[f"{decoder}.bias"] = state.pop("cls.predictions.bias")
    write(tmp_path / "out", source, state)
    assert_same_bits(read_directory(tmp_path / "out")[0].params, source.params)
    state["cls.predictions.bias"] = state[f"{decoder}.bias"] + 1
    write(tmp_path / "untied", source, state)
    with pytest.raises(ValueError, match=f"{decoder}.bias is not .* has the two tied"):
        read_directory(tmp_path / "untied")


def in_two_files(directory, source, **changes) -> dict:
    """Weights as Hugging Face writes those of large models."""
    write(directory, source)
    (directory / "model.safetensors").unlink()
    state, files = state_of(source), {}
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({n: state[n] for n in part}, directory / name)
        files |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": files | changes})
    )
    return files


def test_weights_in_several_files_are_read_by_their_index(tmp_path):
    source = model()
    in_two_files(tmp_path, source)
    found, _ = read_directory(tmp_path)
    assert_same_bits(found.params, source.params)
    assert found.run["weights"] == str(tmp_path / "model.safetensors.index.json")
    missing = tmp_path / "model-00002-of-00002.safetensors"
    missing.rename(tmp_path.parent / missing.name)
    with pytest.raises(ValueError, match=f"index.json lists {missing.name}, which is not a file"):
        read_directory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ghost": "model-00001-of-00002.safetensors"}, "00001-of-00002.* it lacks ghost"),
        ({"cls.predictions.bias": "model-00001-of-00002.safetensors"}, "cls.predictions.bias"),
        ({"ghost": "../elsewhere"}, "lists ../elsewhere, which is not a file of"),
        ({"ghost": 3}, "index.json is not an index"),
    ],
)
def test_an_index_that_is_not_of_its_files_is_refused(tmp_path, changes, message):
    files = in_two_files(tmp_path, model(), **changes)
    assert files["cls.predictions.bias"] == "model-00002-of-00002.safetensors"
    with pytest.raises(ValueError, match=message):
        read_directory(tmp_path)


def test_a_vocabulary_may_be_in_tokenizer_json_but_not_two_of_them(tmp_path):
    write(tmp_path, model())
    pieces = [WORDS.id_to_piece(i) for i in range(11)]
    path, vocabulary = tmp_path / "tokenizer.json", tmp_path / "vocab.txt"
    hugging_face_json(path, pieces)
    assert read_directory(tmp_path)[0].tokenizer.fingerprint == WORDS.fingerprint
    vocabulary.unlink()
    assert read_directory(tmp_path)[0].tokenizer.fingerprint == WORDS.fingerprint
    vocabulary.write_text("\n".join([*pieces[:9], "the", "a"]), encoding="utf-8")
    with pytest.raises(ValueError, match="contradict each other: the id 9 is 'the' in the one and"):
        read_directory(tmp_path)
    hugging_face_json(path, pieces, lowercase=False)
    with pytest.raises(ValueError, match="tokenizer.json: normalizer.lowercase is False"):
        read_directory(tmp_path)


def test_labels_that_a_directory_names_are_kept(tmp_path):
    names = ["contradiction", "entailment", "neutral"]
    write(tmp_path / "in", model(classes=3), id2label=dict(enumerate(names)))
    source, _ = read_directory(tmp_path / "in")
    assert source.run["labels"] == names
    write_directory(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["id2label"] == {"0": names[0], "1": names[1], "2": names[2]}
    write(tmp_path / "by name", model(classes=3), label2id={n: i for i, n in enumerate(names)})
    assert read_directory(tmp_path / "by name")[0].run["labels"] == names
    write(tmp_path / "nameless", model(classes=3))
    assert read_directory(tmp_path / "nameless")[0].run["labels"] == []


def test_the_card_names_a_tokenizer_only_where_transformers_has_it(tmp_path):
    pieces = train_sentencepiece([f"the value of item {i} is none." for i in range(200)], 45)
    for name, tokenizer in (("wordpiece", WORDS), ("sentencepiece", pieces)):
        write_directory(model(tokenizer=tokenizer), tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert "BertForPreTraining.from_pretrained" in card
        assert ("BertTokenizer" in card) == (name == "wordpiece")
