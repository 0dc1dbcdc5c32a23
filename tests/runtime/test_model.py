"""Answers of a packed file: those of the JAX model, from Python and from the command line."""

import dataclasses
import subprocess
import sys
import warnings

import numpy as np
import pytest
from bipft_runtime import Model, file
from bipft_runtime.__main__ import main

from bipft_jax import predict
from bipft_jax.data.glue.tasks import TASKS, Unlabelled
from bipft_jax.interop import pack
from tests.runtime.packing import packed_source, random_source

TEXTS = ["a film", "Çafé  b\tc [MASK] xyz", "", "w " * 100, "中 a", "film" * 30]
PAIRS = [("a film", "b c"), ("w " * 100, "x"), ("x", "w " * 100), ("y " * 40, "z " * 50), ("", "")]


def unlabelled(columns, first, second=None):
    return Unlabelled(
        numbers=None, columns=columns, sentences1=first, sentences2=second, places=first
    )


def saved(tmp_path, *arguments, **keywords):
    source, model = packed_source(*arguments, **keywords)
    path = tmp_path / "model.safetensors"
    file.write(path, model)
    return source, path


@pytest.mark.filterwarnings("ignore:text .* was cut")
def test_labels_and_probabilities_are_those_of_predict(tmp_path):
    source, path = saved(tmp_path, "bipft_b", seed=1)
    answers = predict.answers(source, TASKS["sst2"], unlabelled(("sentence",), TEXTS))
    for answer, expected in zip(Model(path).predict(TEXTS), answers, strict=True):
        assert list(answer.probabilities) == ["0", "1"]
        np.testing.assert_allclose(list(answer.probabilities.values()), expected, atol=2e-5)
        assert answer.label == str(expected.argmax())


@pytest.mark.filterwarnings("ignore:text .* was cut")
def test_scores_of_pairs_are_those_of_predict(tmp_path):
    source, path = saved(tmp_path, "bit_w1a1", task="stsb", seed=2)
    columns = TASKS["stsb"].sentences
    answers = predict.answers(source, TASKS["stsb"], unlabelled(columns, *map(list, zip(*PAIRS))))
    scores = [answer.score for answer in Model(path).predict(PAIRS)]
    np.testing.assert_allclose(scores, answers[:, 0], atol=2e-5)


def test_encode_gives_hidden_states_without_padding(tmp_path):
    source, path = saved(tmp_path, "bipft_a")
    short, long = Model(path).encode(["a", "a b c d"])
    assert short.hidden.shape == (3, 128) and long.hidden.shape == (6, 128)
    np.testing.assert_array_equal(Model(path).encode(["a b c d"])[0].hidden, long.hidden)
    assert short.pooled.dtype == np.float32 and np.abs(short.pooled).max() <= 1


def test_a_long_text_is_cut_with_a_warning(tmp_path):
    _, path = saved(tmp_path, "bipft_a")
    with pytest.warns(UserWarning, match="text 1 has more than 32 tokens and was cut"):
        assert Model(path).encode(["a", "b " * 60])[1].hidden.shape == (32, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Model(path).encode(["b " * 30])


def test_what_a_task_takes_is_said(tmp_path):
    _, path = saved(tmp_path, "bipft_a")
    with pytest.raises(ValueError, match="text 1: task sst2 takes one text"):
        Model(path).predict(["a", ("a", "b")])
    with pytest.raises(ValueError, match="give a list of texts"):
        Model(path).predict("a")


@pytest.mark.parametrize("text", [5, b"a", ("a", "b", "c"), ("a", 1), "\udcff film"])
def test_what_is_no_text_is_named(tmp_path, text):
    _, path = saved(tmp_path, "bipft_a")
    with pytest.raises(ValueError, match="text 1 is "):
        Model(path).predict(["a", text])


def test_a_command_that_fails_leaves_the_output_as_it_was(tmp_path):
    source, model = packed_source("bipft_a")
    bare = dataclasses.replace(model.architecture, outputs=0)
    tensors = {n: t for n, t in model.tensors.items() if not n.startswith("classifier")}
    task = file.Task("", (), 1, 32)
    path, output, texts = (tmp_path / name for name in ("bare", "out.tsv", "in.tsv"))
    file.write(path, dataclasses.replace(model, architecture=bare, tensors=tensors, task=task))
    output.write_text("before")
    texts.write_text("sentence\na\n")
    with pytest.raises(SystemExit, match="this file has no classifier"):
        main([str(path), "--input", str(texts), "--output", str(output)])
    assert output.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "in.tsv", "out.tsv"]


def test_the_command(tmp_path, capsys):
    _, path = saved(tmp_path, "bipft_a")
    main([str(path), "a film"])
    label, *shares = capsys.readouterr().out.splitlines()
    assert label in ("0", "1") and len(shares) == 2
    source, output = tmp_path / "in.tsv", tmp_path / "out.tsv"
    source.write_text("sentence\na film\nb c\n")
    main([str(path), "--input", str(source), "--output", str(output)])
    rows = [line.split("\t") for line in output.read_text().splitlines()]
    assert rows[0] == ["sentence", "prediction", "p(0)", "p(1)"]
    assert [row[0] for row in rows[1:]] == ["a film", "b c"] and len(rows[1]) == 4
    source.write_bytes(b"sentence\na\tb\n")
    with pytest.raises(SystemExit, match=r"in.tsv:2: 2 tab-separated columns, the task has 1"):
        main([str(path), "--input", str(source), "--output", str(output)])
    source.write_bytes(b"sentence\n\xff\n")
    with pytest.raises(SystemExit, match=r"in.tsv:2: not valid UTF-8"):
        main([str(path), "--input", str(source), "--output", str(output)])
    with pytest.raises(SystemExit, match="not a safetensors file"):
        main([str(source), "a"])


def test_the_runtime_needs_neither_jax_nor_this_library():
    code = "import sys, bipft_runtime.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    names = {name.partition(".")[0] for name in loaded.split()}
    assert "bipft_runtime" in names and not names & {"jax", "flax", "bipft_jax", "scipy"}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("fp", r"recipe fp .* cannot be packed: .*bipft_a, bipft_b, bit_w1a1, bibert"),
        ("bit_w1a4", "recipe bit_w1a4"),
    ],
)
def test_recipes_that_the_runtime_lacks_are_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        pack.packed(random_source(recipe))


def test_scales_that_were_never_set_are_refused():
    source = random_source("bipft_a")
    source.params["bert"]["pooler"]["input_scale"] = np.float32("nan")
    with pytest.raises(ValueError, match="scales that were never set, such as bert/pooler/input"):
        pack.packed(source)


def test_a_file_has_positions_for_its_longest_text():
    source = random_source("bipft_a")  # of a run with texts of 32 tokens
    table = source.params["bert"]["positions"]["embedding"]
    for max_length, expected in ((None, 32), (7, 7)):
        model = pack.packed(source, max_length=max_length)
        assert (model.architecture.max_positions, model.task.max_length) == (expected, expected)
        np.testing.assert_array_equal(model.tensors["positions"], table[:expected], strict=True)
    for max_length in (2, 513):
        with pytest.raises(ValueError, match=f"max_length is {max_length}, not from 3 to 512"):
            pack.packed(source, max_length=max_length)
