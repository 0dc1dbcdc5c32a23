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

from bipft_jax.checkpoints.source import warm_started
from bipft_jax.data.tokenizers import train_sentencepiece
from bipft_jax.fill_mask import fill_mask
from bipft_jax.interop.hugging_face import read_directory, transformers_class, write_directory
from bipft_jax.models.bert import BertForPreTraining
from bipft_jax.models.parameters import is_scale, named_leaves
from bipft_jax.models.recipes import RECIPES, recipe_named
from bipft_jax.objectives.distillation import make_teacher
from tests.interop.directories import HEADS, WORDS, assert_same_bits, config, model, state_of, write
from tests.objectives import abstract_params, objective


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


def test_all_files_may_be_read_by_the_same(tmp_path):
    write_directory(model("bipft_a"), tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


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
