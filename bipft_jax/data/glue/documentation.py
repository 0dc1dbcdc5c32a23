"""A small task of its own (`own_tasks.py`): which package is a sentence of documentation about?

    python -m bipft_jax.data.glue.documentation --output data/glue

It makes it possible to pretrain, finetune and score without downloading GLUE. The classes are
Python itself and the packages of the corpus `package-docs`. The sentences come from the documents
that this corpus holds out from pretraining; sentences that also occur in a training document or
name a package are left out. Training and dev rows may come from one document. All classes have
the same number of rows, and few are for training: pretraining is for tasks where labels are scarce
and text is not.

Compare a score with the majority class, which is right one time in six, and with a logistic
regression on bags of words (`bipft_jax/data/glue/bag_of_words.py`).
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bipft_jax.data.corpus.python_docs import PACKAGE_DOCS, PACKAGES, held_out_sentences
from bipft_jax.data.glue.own_tasks import TASK_FILE, described_task, task_description
from bipft_jax.paths import require_local

TASK = described_task(
    "documentation",
    {"sentences": ["sentence"], "label": "label", "labels": ["python", *PACKAGES]},
)
MIN_WORDS, MAX_WORDS = 6, 40

_NAMES = re.compile(rf"python|scikit|{'|'.join(PACKAGES)}", re.IGNORECASE)


def sentences_by_class(named: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The usable sentences of each class, in the order of the task's classes.

    named: (document name, sentence) pairs. White space is normalised; sentences that differ only
      in case or white space count once.
    """
    classes: dict[str, list[str]] = {label: [] for label in TASK.label_names}
    seen = set()
    for name, sentence in named:
        package = name.partition("/")[0]
        sentence = " ".join(sentence.split())
        key = sentence.casefold()
        if key in seen or _NAMES.search(sentence):
            continue
        if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
            seen.add(key)
            classes[package if package in PACKAGES else "python"].append(sentence)
    return classes


def make_rows(
    classes: Mapping[str, Sequence[str]], train: int, dev: int, seed: int
) -> dict[str, list[tuple[str, str]]]:
    """Chooses the rows of both splits: `{"train": [(sentence, label), ...], "dev": [...]}`.

    Args:
        classes: the sentences of each class.
        train: training rows of each class.
        dev: dev rows of each class.
        seed: seed of the choice and the order of the rows.

    Raises:
        ValueError: if a class has too few sentences, or a split has no rows.
    """
    if train < 1 or dev < 1:
        raise ValueError(f"each split needs a row of each class, not train {train} and dev {dev}")
    rng = random.Random(seed)
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "dev": []}
    for label, sentences in classes.items():
        if len(sentences) < train + dev:
            raise ValueError(
                f"cannot make {train} train and {dev} dev rows of each class: the held-out prose "
                f"of {label} has {len(sentences)} usable sentences"
            )
        chosen = [(sentence, label) for sentence in rng.sample(sentences, train + dev)]
        splits["train"] += chosen[:train]
        splits["dev"] += chosen[train:]
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def write_task(glue_dir: str | Path, splits: Mapping[str, Sequence[tuple[str, str]]]) -> list[Path]:
    """Writes `glue_dir/documentation/{train,dev}.tsv` with the columns `sentence` and `label`, and
    task.json, which describes them. Replaces existing files. Returns the paths of the splits.

    Raises: ValueError if `glue_dir` is a URL such as gs://."""
    require_local({"glue_dir": glue_dir})
    directory = Path(glue_dir) / TASK.directory
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(task_description(TASK), indent=1)
    (directory / TASK_FILE).write_text(text + "\n", encoding="utf-8")
    paths = []
    for split, rows in splits.items():
        path = directory / f"{split}.tsv"
        lines = [f"{TASK.sentences[0]}\t{TASK.label}\n"]
        lines += (f"{sentence}\t{label}\n" for sentence, label in rows)
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """The command: writes GLUE_DIR/documentation/{train,dev}.tsv and prints the row counts."""
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.data.glue.documentation",
        description="Writes GLUE_DIR/documentation/{train,dev}.tsv: sentences of the documentation "
        f"of Python, {', '.join(PACKAGES)}, held out from pretraining on package-docs, each with "
        "the name of its package.",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="GLUE_DIR",
        help="directory that holds the GLUE tasks' directories; finetuning's glue_dir",
    )
    for split, rows in (("train", 100), ("dev", 300)):
        parser.add_argument(
            f"--{split}",
            type=int,
            default=rows,
            metavar="ROWS",
            help=f"{split} rows of each class (default {rows})",
        )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the choice of sentences; the same seed writes the same files",
    )
    arguments = parser.parse_args(argv)
    try:
        require_local(vars(arguments))
        classes = sentences_by_class(held_out_sentences(PACKAGE_DOCS))
        splits = make_rows(classes, arguments.train, arguments.dev, arguments.seed)
        paths = write_task(arguments.output, splits)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for path, rows in zip(paths, splits.values(), strict=True):
        print(f"{path}: {len(rows)} rows, {len(rows) // len(classes)} of each class")


if __name__ == "__main__":
    main()
