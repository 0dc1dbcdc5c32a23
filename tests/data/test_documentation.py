"""The embedded task: balanced, nothing shared by its splits, no answer given away by a name."""

from collections import Counter

import pytest

from bipft_jax.data.glue import documentation
from bipft_jax.data.glue import tasks as glue
from bipft_jax.data.glue.own_tasks import task_named

LABELS = documentation.TASK.label_names


def sentence(package: str, number: int) -> str:
    return f"Sentence {number} of the {package[::-1]} is about something else."


def named(count: int) -> list[tuple[str, str]]:
    """`count` usable sentences of each class, as (document, sentence)."""
    documents = {
        label: "json/decoder.py" if label == "python" else label + "/a.py" for label in LABELS
    }
    return [(documents[label], sentence(label, n)) for label in LABELS for n in range(count)]


def test_a_sentence_belongs_to_the_package_of_its_document():
    unusable = [
        ("numpy/a.py", "Too short."),
        ("numpy/a.py", "An array of NumPy has a shape and a type."),  # names the answer
        ("numpy/a.py", "very " * 40 + "long"),
        ("numpy/b.py", sentence("numpy", 0).replace(" ", "  ").upper()),  # there already
        ("jaxlib.py", "A module of the standard library, whatever its name."),
    ]
    classes = documentation.sentences_by_class(named(3) + unusable)
    assert tuple(classes) == LABELS
    for label in LABELS:
        assert classes[label][:3] == [sentence(label, n) for n in range(3)]
    assert {label: len(rows) for label, rows in classes.items() if len(rows) != 3} == {"python": 4}


def test_splits_are_balanced_shuffled_and_apart():
    classes = documentation.sentences_by_class(named(9))
    rows = documentation.make_rows(classes, train=4, dev=5, seed=0)
    for split, size in (("train", 4), ("dev", 5)):
        assert Counter(label for _, label in rows[split]) == dict.fromkeys(LABELS, size)
        assert len({label for _, label in rows[split][:size]}) > 1
    every = rows["train"] + rows["dev"]
    assert sorted(every) == sorted((s, label) for label in LABELS for s in classes[label])
    assert documentation.make_rows(classes, 4, 5, seed=1) != rows
    with pytest.raises(ValueError, match="4 train and 6 dev rows.*python has 9 usable"):
        documentation.make_rows(classes, train=4, dev=6, seed=0)


def test_the_command_writes_a_task_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documentation, "held_out_sentences", lambda corpus: named(5))
    documentation.main(["--output", str(tmp_path), "--train", "2", "--dev", "3"])
    assert "dev.tsv: 18 rows, 3 of each class" in capsys.readouterr().out
    task = task_named("documentation", tmp_path)
    assert task == documentation.TASK and task.metrics == ("accuracy",)
    for split, size in (("train", 2), ("dev", 3)):
        read = glue.read_split(task, tmp_path, split)
        assert Counter(read.labels.tolist()) == dict.fromkeys(range(6), size)
        for text, label in zip(read.sentences1, read.labels, strict=True):
            assert f"of the {LABELS[label][::-1]} is" in text
    with pytest.raises(SystemExit, match="error: each split needs a row"):
        documentation.main(["--output", str(tmp_path), "--train", "0"])
