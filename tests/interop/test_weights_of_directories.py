"""Weights that others write: every array is checked, whatever its name or file."""

import json

import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from bipft_jax.data.tokenizers import train_sentencepiece
from bipft_jax.interop.hugging_face import read_directory, write_directory
from bipft_jax.interop.torch_weights import from_state_dict, usual_names
from bipft_jax.models.recipes import RECIPES
from tests.data.test_tokenizers import hugging_face_json
from tests.interop.directories import WORDS, assert_same_bits, config, model, state_of, write
from tests.objectives import objective

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


def test_the_card_names_the_tokenizer_that_transformers_has(tmp_path):
    pieces = train_sentencepiece([f"the value of item {i} is none." for i in range(200)], 45)
    for name, tokenizer in (("wordpiece", WORDS), ("sentencepiece", pieces)):
        write_directory(model(tokenizer=tokenizer), tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert "BertForPreTraining.from_pretrained" in card
        tokenizer = "BertTokenizer" if name == "wordpiece" else "PreTrainedTokenizerFast"
        assert f'= {tokenizer}.from_pretrained("DIR")' in card
