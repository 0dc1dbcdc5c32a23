"""Files in GLUE's layouts in, submission files and probabilities out."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from bipft_jax import predict
from bipft_jax.checkpoints.source import Source
from bipft_jax.data.glue import batches as glue_batches
from bipft_jax.data.glue import tasks as glue
from bipft_jax.data.tokenizers import WordPieceTokenizer
from bipft_jax.models.bert import BertForSequenceClassification
from bipft_jax.models.recipes import BertConfig, architecture, recipe_named
from bipft_jax.training import sharding
from bipft_jax.training import step as steps
from bipft_jax.training.evaluation import outputs
from bipft_jax.training.task_outputs import require_outputs
from tests.objectives import abstract_params, objective

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


def source(classes, task=None, recipe="fp", **run) -> Source:
    """A classifier with random weights."""
    config = BertConfig(recipe_named(recipe), len(PIECES), 1, 16, 2, 32, 16)
    values = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: values.normal(size=leaf.shape).astype(np.float32),
        abstract_params(config, classes),
    )
    run = run if task is None else {"task": task, **run}
    tokenizer = WordPieceTokenizer(PIECES)
    return Source("runs/x", 7, params, architecture(config), objective(classes), tokenizer, run=run)


def run(monkeypatch, tmp_path, model, text, *options) -> list[list[str]]:
    monkeypatch.setattr(predict, "load_source", lambda workdir: model)
    (tmp_path / "in.tsv").write_text(text)
    files = ("--input", str(tmp_path / "in.tsv"), "--output", str(tmp_path / "out.tsv"))
    predict.main(["--workdir", str(tmp_path), *files, *options])
    return [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]


def logits_of(model, first, second=None):
    """One example at a time, without padding."""
    tokenizer = model.tokenizer
    ids = [tokenizer.cls_id, *tokenizer.encode(first), tokenizer.sep_id]
    types = [0] * len(ids)
    if second is not None:
        ids += [*tokenizer.encode(second), tokenizer.sep_id]
        types += [1] * (len(ids) - len(types))
    module = model.objective.model(model.config())
    rows = [np.asarray([row]) for row in (ids, types, [1] * len(ids))]
    return np.asarray(module.apply({"params": model.params}, *rows).logits[0])


def test_a_test_set_of_glue_gives_a_file_to_submit(monkeypatch, tmp_path):
    pairs = [("a b", "c"), ("d", 'e " f g'), ("h a b", "b"), ("c c", "a")]
    text = "index\tsentence1\tsentence2\n"
    text += "".join(f"{i + 5}\t{a}\t{b}\n" for i, (a, b) in enumerate(pairs))
    model = source(2, "rte")
    bias = model.params["classifier"]["bias"]  # so that both labels are predicted
    bias -= np.mean([logits_of(model, *pair) for pair in pairs], axis=0)
    rows = run(monkeypatch, tmp_path, model, text)
    names = ("entailment", "not_entailment")
    expected = [names[logits_of(model, *pair).argmax()] for pair in pairs]
    assert set(expected) == set(names)
    assert rows == [["index", "prediction"], *([str(i + 5), e] for i, e in enumerate(expected))]


def test_ones_own_sentences_come_back_with_probabilities(monkeypatch, tmp_path):
    # CoLA's own train and dev files have no header, its test file has this one.
    rows = run(monkeypatch, tmp_path, source(2, "cola"), "note\tsentence\nx\ta b c\ny\tg h\n")
    assert rows[0] == ["sentence", "prediction", "p(0)", "p(1)"]
    for row, text in zip(rows[1:], ("a b c", "g h"), strict=True):
        logits = logits_of(source(2), text).astype(np.float64)
        p = np.exp(logits) / np.exp(logits).sum()
        assert row[:2] == [text, str(p.argmax())]
        np.testing.assert_allclose([float(x) for x in row[2:]], p, atol=1e-4)


def test_scores_have_no_probabilities(monkeypatch, tmp_path):
    rows = run(monkeypatch, tmp_path, source(1, "stsb"), "sentence1\tsentence2\na\tb c\n")
    assert rows[0] == ["sentence1", "sentence2", "prediction"]
    assert float(rows[1][2]) == pytest.approx(logits_of(source(1), "a", "b c")[0], abs=1e-3)


def test_long_sentences_are_cut_as_they_were_in_training(monkeypatch, tmp_path):
    text = "sentence\n" + " ".join("abcdefgh" * 4) + "\n"
    model = source(2, "sst2", max_length=6)
    row = run(monkeypatch, tmp_path, model, text)[1]
    logits = logits_of(model, "a b c d").astype(np.float64)
    assert float(row[2]) == pytest.approx(1 / (1 + np.exp(logits[1] - logits[0])), abs=1e-4)


def test_the_best_seed_answers(tmp_path):
    seeds = [{"seed": s, "best": {"accuracy": a, "f1": 1 - a}} for s, a in ((4, 0.5), (9, 0.7))]
    assert predict.best_seed(tmp_path) == tmp_path
    summary = {"task": "mrpc", "selection_metric": "accuracy", "seeds": seeds}
    (tmp_path / "result.json").write_text(json.dumps(summary))
    assert predict.best_seed(tmp_path) == tmp_path / "seed_9"
    (tmp_path / "result.json").write_text(json.dumps(seeds[0]))  # of one seed's directory
    assert predict.best_seed(tmp_path) == tmp_path
    pretraining = {"selection_metric": "loss", "seeds": [{"seed": 0, "best": {"loss": 6.0}}]}
    (tmp_path / "result.json").write_text(json.dumps(pretraining))
    assert predict.best_seed(tmp_path) == tmp_path
    seeds[1]["best"]["accuracy"] = float("nan")
    (tmp_path / "result.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"result\.json does not say which seed is the best"):
        predict.best_seed(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"task": "all", "tasks": {"mrpc": summary}}))
    with pytest.raises(ValueError, match="a run for each task: give .*TASK"):
        predict.best_seed(tmp_path)


@pytest.mark.parametrize(
    ("model", "text", "options", "message"),
    [
        (source(2), "sentence\na\n", (), "does not say its task: give --task"),
        (source(2, "rte"), "sentence\na\n", ("--task", "sst2"), "finetuned on rte, not on sst2"),
        (source(2), "sentence\na\n", ("--task", "sst3"), "did you mean sst2"),
        (source(3), "sentence\na\n", ("--task", "sst2"), "3 outputs, task sst2 needs 2"),
        (source(0), "sentence\na\n", ("--task", "sst2"), "pretraining heads, task sst2 needs 2"),
        (source(2, "qqp"), "sentence1\n", (), r"in.tsv:1: no column 'question1', 'question2'"),
        (source(2, "qqp"), "id\tquestion1\tquestion2\n1\ta\n", (), "in.tsv:2: the row has 2 tab"),
        (source(2, "sst2"), "sentence\n", (), "no complete rows"),
        (source(2, "sst2"), "id\tsentence\n1\ta\n\n", (), "in.tsv:3: the row has 1 tab"),
        (
            source(2, "sst2"),
            "id\tsentence\n1\ta\n1\tb\n",
            (),
            "in.tsv:3: the id '1' is also that of line 2",
        ),
        (source(2, "sst2"), "sentence\tsentence\na\tb\n", (), "in.tsv:1: .* 'sentence' twice"),
        (
            source(2, labels=["entailment", "not_entailment"]),
            "sentence\na\n",
            ("--task", "sst2"),
            "answers with entailment, not_entailment, task sst2 has 0, 1 or negative, positive",
        ),
    ],
)
def test_what_cannot_be_answered_is_explained(monkeypatch, tmp_path, model, text, options, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tmp_path, model, text, *options)
    assert not (tmp_path / "out.tsv").exists()


def always(number, classes, labels):
    """An imported classifier that gives every row its output `number`."""
    model = source(classes, labels=labels)
    model.params["classifier"]["kernel"][:] = 0
    model.params["classifier"]["bias"][:] = 3.0 * (np.arange(classes) == number)
    return model


@pytest.mark.parametrize(
    "task, labels, number, answer",
    [
        ("mnli", ["contradiction", "entailment", "neutral"], 0, "contradiction"),
        ("mnli", ["CONTRADICTION", "Entailment", "NEUTRAL"], 2, "neutral"),
        ("rte", ["not-entailment", "ENTAILMENT"], 0, "not_entailment"),
        ("sst2", ["POSITIVE", "NEGATIVE"], 0, "1"),
        ("sst2", ["1", "0"], 1, "0"),
    ],
)
def test_an_imported_model_answers_in_its_own_order_and_the_tasks_words(
    monkeypatch, tmp_path, task, labels, number, answer
):
    columns = glue.glue_task(task).sentence_names
    text = "\t".join(columns) + "\n" + "\t".join("a" for _ in columns) + "\n"
    model = always(number, len(labels), labels)
    header, row = run(monkeypatch, tmp_path, model, text, "--task", task)
    assert row[len(columns)] == answer
    assert float(row[header.index(f"p({answer})")]) > 0.8
    rows = run(
        monkeypatch, tmp_path, model, "index\t" + text.replace("\na", "\n7\ta"), "--task", task
    )
    assert rows[1] == ["7", answer]
    with pytest.raises(ValueError, match="its logits would mean other classes"):  # as a teacher
        require_outputs(model, glue.glue_task(task))


def test_outputs_without_names_are_taken_in_the_tasks_order_and_that_is_said(
    monkeypatch, tmp_path, caplog
):
    text = "sentence1\tsentence2\na\tb\n"
    for labels in ([], ["LABEL_0", "LABEL_1", "LABEL_2"]):
        model = always(2, 3, labels)
        assert run(monkeypatch, tmp_path, model, text, "--task", "mnli")[1][2] == "contradiction"
        assert "0 = entailment, 1 = neutral, 2 = contradiction" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("place", ["kernel", "bias"])
def test_answers_that_are_not_finite_are_none(monkeypatch, tmp_path, place):
    model = source(2, "sst2")
    model.params["classifier"][place][..., 1] = np.nan
    with pytest.raises(SystemExit, match=r"NaN or infinite for 2 of 2 rows, first for .*in.tsv:2"):
        run(monkeypatch, tmp_path, model, "sentence\na\nb\n")
    assert not (tmp_path / "out.tsv").exists()


def test_only_scores_to_submit_are_moved_into_the_benchmarks_range(monkeypatch, tmp_path, caplog):
    model = source(1, "stsb")
    for bias, submitted in ((5.4, "5.000"), (-0.5, "0.000"), (2.5, "2.500")):
        model.params["classifier"]["kernel"][:] = 0
        model.params["classifier"]["bias"][:] = bias
        text = "sentence1\tsentence2\na\tb\n"
        assert float(run(monkeypatch, tmp_path, model, text)[1][2]) == pytest.approx(bias)
        assert not caplog.records
        rows = run(monkeypatch, tmp_path, model, "index\t" + text.replace("\na", "\n0\ta"))
        assert rows[1] == ["0", submitted]
        assert ("1 of 1 scores were outside 0 to 5" in caplog.text) == (bias != 2.5)
        caplog.clear()


def test_every_line_below_the_header_is_a_row(monkeypatch, tmp_path):
    rows = run(monkeypatch, tmp_path, source(2, "sst2"), "sentence\na\n\nb\n\n\n")
    assert [row[0] for row in rows] == ["sentence", "a", "", "b", "", ""]


def test_rows_that_are_cut_are_counted(monkeypatch, tmp_path, caplog):
    text = "sentence\n" + " ".join("abcdefgh" * 4) + "\na\n"
    model = source(2, "sst2")
    model.architecture["max_positions"] = 16
    model.params["bert"]["positions"]["embedding"] = np.ones((16, 16), np.float32)
    assert len(run(monkeypatch, tmp_path, model, text)) == 3
    assert "1 of 2 rows are longer than the 16 tokens" in caplog.text


def test_a_pipe_is_read_once(monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "load_source", lambda workdir: source(2, "sst2"))
    reading, writing = os.pipe()
    os.write(writing, b"sentence\na\n")
    os.close(writing)
    output = tmp_path / "out.tsv"
    predict.main(["--workdir=x", f"--input=/dev/fd/{reading}", f"--output={output}"])
    os.close(reading)
    assert len(output.read_text().splitlines()) == 2


def test_where_nothing_can_be_written_is_known_before_anything_is_read(tmp_path):
    (tmp_path / "in.tsv").write_text("sentence\na\n")
    for output, message in (
        ("no/out.tsv", "has no directory .*/no"),
        (".", "is a directory"),
        ("in.tsv", "in.tsv is the input"),
    ):
        with pytest.raises(SystemExit, match=message):
            predict.main(
                ["--workdir=no", f"--input={tmp_path}/in.tsv", f"--output={tmp_path}/{output}"]
            )
    assert (tmp_path / "in.tsv").read_text() == "sentence\na\n"


@pytest.mark.parametrize("recipe", ["fp", "bibert"])
def test_padding_changes_no_answer(recipe):
    model = source(2, recipe=recipe)
    config = model.config()
    module = BertForSequenceClassification(config, 2)
    texts = [" ".join("abcdefgh"[i] for i in range(n)) for n in (7, 1, 3, 8, 2)]
    split = glue.GlueSplit(glue.glue_task("sst2"), "dev", texts, None, np.zeros(5, np.int32))
    encoded = glue_batches.encode(split, model.tokenizer, 16)
    step = jax.jit(steps.prediction_step(model.objective, module))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def logits(*lengths):
        padded = dataclasses.replace(encoded, padded_lengths=lengths)
        return outputs(step, model.params, padded, 2, mesh)

    assert np.ptp(logits(16), axis=0).max() > 0.1
    np.testing.assert_allclose(logits(4, 8, 16), logits(16), atol=1e-5)
