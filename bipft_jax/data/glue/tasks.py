"""The nine GLUE tasks: the task table and the reading of files of any task.

A task is a row of `TASKS`: its files, their columns, its metrics. Nothing else in the library asks
which task it is working on.

The files are the benchmark's own: `GLUE_DIR/<task directory>/{train,dev}.tsv`, tab-separated with
**no quoting**. A quotation mark is an ordinary character, often unbalanced, so a row always ends at
the end of its line. GLUE: Wang et al. 2018, arXiv:1804.07461.

GLUE_DIR may also be a data directory of TensorFlow Datasets (`data/glue/tfds.py`), which has the
same rows in `GLUE_DIR/glue/<task>/<version>/`.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bipft_jax.data.glue import tfds as glue_tfds
from bipft_jax.errors import unknown_name

Column = str | int  # by header name, or by 0-based position in a file without a header


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """One row of the task table.

    Attributes:
        name: the task's name in configs, e.g. `"sst2"`.
        directory: its directory in the benchmark's layout, e.g. `"SST-2"`.
        sentences: the column of the sentence, or the two columns of a sentence pair. Integers
            (positions) mean that the file has no header.
        label: the label's column.
        label_names: the labels as the file spells them, in class order (the Hugging Face
            datasets' order, which the BiPFT reference trains with); None for regression.
        metrics: names from `glue_metrics.METRICS` to report; the first one selects the best epoch
            (SPEC 2.7: accuracy also for MRPC and QQP, Pearson, Matthews).
        epochs: default number of passes over the training split (SPEC 2.7).
        dev_splits: file stems of the dev sets; the first is required and selects the best epoch.
        skip_short_rows: the official file has rows broken over two lines, which every user of the
            benchmark drops; they are counted and logged.
        tfds_sentences: the sentences' features in TFDS, if their names differ from the columns'.
        tfds_label_names: the classes in TFDS, in the same order, if their names differ.
        score_range: the lowest and highest score that the benchmark allows, for regression.
    """

    name: str
    directory: str
    sentences: tuple[Column] | tuple[Column, Column]
    label: Column
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    epochs: int
    dev_splits: tuple[str, ...] = ("dev",)
    skip_short_rows: bool = False
    tfds_sentences: tuple[str] | tuple[str, str] | None = None
    tfds_label_names: tuple[str, ...] | None = None
    score_range: tuple[float, float] | None = None

    @property
    def sentence_names(self) -> tuple[str, ...]:
        """The names of the sentence columns; "sentence" for tasks whose train and dev files have no
        header (their test file has one)."""
        return tuple(name if isinstance(name, str) else "sentence" for name in self.sentences)

    @property
    def is_regression(self) -> bool:
        return self.label_names is None

    @property
    def num_outputs(self) -> int:
        """Width of the classifier: the number of classes, 1 for regression."""
        return 1 if self.label_names is None else len(self.label_names)

    @property
    def spellings(self) -> list[tuple[str, ...]]:
        """The names of the classes, in order: the benchmark's and, where they differ, TFDS's."""
        return [names for names in (self.label_names, self.tfds_label_names) if names]

    @property
    def selection_metric(self) -> str:
        return self.metrics[0]


_ROW_NUMBERS = ("index", "id")  # the first that is in the header counts

_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")

# fmt: off
TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        # name, directory, sentence column(s), label column, classes, metrics, epochs
        GlueTask("cola", "CoLA", (3,), 1, _BINARY, ("matthews", "accuracy"), 50,
                 tfds_label_names=("unacceptable", "acceptable")),
        GlueTask("sst2", "SST-2", ("sentence",), "label", _BINARY, ("accuracy",), 10,
                 tfds_label_names=("negative", "positive")),
        GlueTask("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", _BINARY,
                 ("accuracy", "f1"), 20, tfds_sentences=("sentence1", "sentence2"),
                 tfds_label_names=("not_equivalent", "equivalent")),
        GlueTask("stsb", "STS-B", ("sentence1", "sentence2"), "score", None,
                 ("pearson", "spearman"), 20, score_range=(0.0, 5.0)),
        GlueTask("rte", "RTE", ("sentence1", "sentence2"), "label", _ENTAILMENT, ("accuracy",), 20),
        # The reference has no WNLI script. Its dev pairs are near copies of train pairs with the
        # opposite label, so long training ends below the majority class: 5 epochs.
        GlueTask("wnli", "WNLI", ("sentence1", "sentence2"), "label", _BINARY, ("accuracy",), 5,
                 tfds_label_names=("not_entailment", "entailment")),
        GlueTask("qnli", "QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",), 10),
        GlueTask("qqp", "QQP", ("question1", "question2"), "is_duplicate", _BINARY,
                 ("accuracy", "f1"), 6, skip_short_rows=True,
                 tfds_label_names=("not_duplicate", "duplicate")),
        GlueTask("mnli", "MNLI", ("sentence1", "sentence2"), "gold_label",
                 ("entailment", "neutral", "contradiction"), ("accuracy",), 6,
                 dev_splits=("dev_matched", "dev_mismatched"),
                 tfds_sentences=("premise", "hypothesis")),
    )
}
# fmt: on

BENCHMARK = tuple(TASKS)


def glue_task(name: str) -> GlueTask:
    """The task of that name. Raises: ValueError naming the closest known names."""
    if name not in TASKS:
        raise unknown_name("GLUE task", name, TASKS)
    return TASKS[name]


# --- reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GlueSplit:
    """The rows of one split, in the order of the benchmark's file.

    Attributes:
        task: the task it belongs to.
        split: the file's stem: "train", "dev", "dev_matched", ...
        sentences1: N strings.
        sentences2: N strings, or None for a single-sentence task.
        labels: int32[N] class numbers, or float32[N] scores for regression.
        skipped_rows: broken rows that were dropped (only if the task table allows it).
    """

    task: GlueTask
    split: str
    sentences1: list[str]
    sentences2: list[str] | None
    labels: np.ndarray
    skipped_rows: int = 0

    def __len__(self) -> int:
        return len(self.sentences1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of texts and labels, the same in either layout."""
        texts = json.dumps([self.sentences1, self.sentences2]).encode()
        return hashlib.sha256(texts + self.labels.tobytes()).hexdigest()


def is_there(task: GlueTask, glue_dir: str | Path) -> bool:
    """Whether a directory has the task in either layout."""
    glue_dir = Path(glue_dir).expanduser()
    return bool(
        (glue_dir / task.directory).is_dir() or glue_tfds.newest_version(glue_dir, task.name)
    )


def dev_splits(task: GlueTask, glue_dir: str | Path) -> tuple[str, ...]:
    """The dev sets to evaluate on: the first is required, others are optional.

    Raises: ValueError for a task that exists in both layouts, or a dataset that cannot be opened.
    """
    first, *others = task.dev_splits
    glue_dir = Path(glue_dir).expanduser()
    if dataset := _dataset(task, glue_dir):
        present = [name for name in others if glue_tfds.has_split(dataset, name)]
    else:
        directory = glue_dir / task.directory
        present = [name for name in others if (directory / f"{name}.tsv").exists()]
    return (first, *present)


def read_split(task: GlueTask, glue_dir: str | Path, split: str) -> GlueSplit:
    """Reads `glue_dir/<task.directory>/<split>.tsv`, or the newest version of the dataset
    `glue_dir/glue/<task.name>`.

    A file may have a byte-order mark, Windows line endings, columns that the task does not use,
    quotation marks of any kind and blank lines at the end.

    Raises:
        ValueError: naming file and line: no such file, not UTF-8, no rows, a missing or repeated
            column, a row with another number of fields than columns, a label that is not in the
            table, a score that is not a number or outside the task's range. Naming the dataset: as
            `glue_tfds.read_records`. Naming both: a task that exists in both layouts.
    """
    glue_dir = Path(glue_dir).expanduser()
    if dataset := _dataset(task, glue_dir):
        sentences, labels = glue_tfds.read_records(
            dataset,
            split,
            task.tfds_sentences or task.sentence_names,
            task.tfds_label_names or task.label_names,
        )
        return _split(task, split, sentences, labels)
    path = _find_file(task, glue_dir, split)
    lines = _read_lines(path)
    while not lines[-1] and len(lines) > 1:  # no row, because a row has at least two columns
        lines.pop()
    rows = _columns(path, lines, task, (*task.sentences, task.label))
    *sentences, labels = zip(*rows.fields, strict=True)
    parsed = [
        _parse_label(task, label, f"{path}:{line}")
        for label, line in zip(labels, rows.lines, strict=True)
    ]
    dtype = np.float32 if task.is_regression else np.int32
    return _split(task, split, sentences, np.asarray(parsed, dtype), rows.skipped)


def _split(
    task: GlueTask,
    split: str,
    sentences: Sequence[Sequence[str]],
    labels: np.ndarray,
    skipped_rows: int = 0,
) -> GlueSplit:
    return GlueSplit(
        task=task,
        split=split,
        sentences1=list(sentences[0]),
        sentences2=list(sentences[1]) if len(sentences) == 2 else None,
        labels=labels,
        skipped_rows=skipped_rows,
    )


def _dataset(task: GlueTask, glue_dir: Path) -> Path | None:
    """The task's TFDS dataset; None if the task is read from the benchmark's files."""
    dataset, directory = glue_tfds.newest_version(glue_dir, task.name), glue_dir / task.directory
    if dataset and directory.is_dir():
        raise ValueError(
            f"task {task.name} exists twice, as the benchmark's files in {directory} and as the "
            f"TFDS dataset {dataset}: remove or move one of them"
        )
    return dataset


@dataclasses.dataclass(frozen=True)
class Unlabelled:
    """Examples without labels, in file order.

    Attributes:
        numbers: the file's own row numbers (GLUE's test sets have them); None without any.
        columns: the names of its sentence columns.
        sentences1: N strings.
        sentences2: N strings, or None for a single-sentence task.
        places: `file:line` of each row.
    """

    numbers: list[str] | None
    columns: tuple[str, ...]
    sentences1: list[str]
    sentences2: list[str] | None
    places: list[str]


def read_unlabelled(task: GlueTask, path: str | Path) -> Unlabelled:
    """Reads a tab-separated file whose header names the task's sentence columns: a GLUE test.tsv,
    or your own. It may have other columns. Every line below the header is a row, even an empty line
    if the file has only one column. The file is read once, so it may be a pipe.

    Raises:
        ValueError: as `read_split`, except for labels; also for any broken row, because every row
            needs a prediction, and for a repeated row number.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise ValueError(f"there is no file {path}")
    columns, lines = task.sentence_names, _read_lines(path)
    header = lines[0].split("\t")
    number = [name for name in _ROW_NUMBERS if name in header][:1]
    task = dataclasses.replace(task, skip_short_rows=False)
    rows = _columns(path, lines, task, (*columns, *number))
    fields = list(zip(*rows.fields, strict=True))
    numbers = list(fields[len(columns)]) if number else None
    first: dict[str, int] = {}
    for text, line in zip(numbers or (), rows.lines, strict=False):
        if first.setdefault(text, line) != line:
            raise ValueError(
                f"{path}:{line}: the {number[0]} {text!r} is also that of line {first[text]}: each "
                "row needs its own"
            )
    return Unlabelled(
        numbers=numbers,
        columns=columns,
        sentences1=list(fields[0]),
        sentences2=list(fields[1]) if len(columns) == 2 else None,
        places=[f"{path}:{line}" for line in rows.lines],
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """fields: the wanted fields of every row. lines: line number of every row. skipped: number of
    broken rows."""

    fields: list[tuple[str, ...]]
    lines: list[int]
    skipped: int


def _columns(path: Path, lines: Sequence[str], task: GlueTask, wanted: tuple[Column, ...]) -> _Rows:
    """Columns of a file by their names in its header, or by position in a file without a header,
    whose last column must be a wanted one."""
    has_header = all(isinstance(column, str) for column in wanted)
    if has_header:
        header = lines[0].split("\t")
        missing = [name for name in wanted if name not in header]
        if missing:
            raise ValueError(
                f"{path}:1: no column {', '.join(map(repr, missing))} for task {task.name}; "
                f"the header has {', '.join(map(repr, header))} (columns are separated by tabs)"
            )
        twice = [name for name in wanted if header.count(name) > 1]
        if twice:
            raise ValueError(f"{path}:1: the header has the column {twice[0]!r} twice")
        positions, width = [header.index(name) for name in wanted], len(header)
    else:
        positions, width = list(wanted), max(wanted) + 1

    rows, numbers, short = [], [], []
    for number, line in enumerate(lines[has_header:], start=1 + has_header):
        fields = line.split("\t")
        if len(fields) < width:
            if task.skip_short_rows:
                short.append(number)
                continue
            raise ValueError(
                f"{path}:{number}: the row has {len(fields)} tab-separated field(s), "
                f"task {task.name} needs {width}"
            )
        if len(fields) > width:  # ambiguous
            owner = "the header" if has_header else f"task {task.name}"
            raise ValueError(
                f"{path}:{number}: the row has {len(fields)} tab-separated fields, {owner} "
                f"{width}: remove tabs from within the sentences"
            )
        rows.append(tuple(fields[position] for position in positions))
        numbers.append(number)
    if not rows:
        raise ValueError(f"{path} has no complete rows below its header")
    if short:
        logging.warning(
            "%s: dropped %d row(s) with fewer than %d fields (broken over two lines), the first "
            "at line %d",
            path,
            len(short),
            width,
            short[0],
        )
    return _Rows(rows, numbers, len(short))


def _find_file(task: GlueTask, glue_dir: Path, split: str) -> Path:
    if not glue_dir.is_dir():
        raise ValueError(f"there is no GLUE directory {glue_dir}")
    directory = glue_dir / task.directory
    if not directory.is_dir():
        present = [t.directory for t in TASKS.values() if (glue_dir / t.directory).is_dir()]
        present += [f"glue/{name}" for name in TASKS if glue_tfds.newest_version(glue_dir, name)]
        raise ValueError(
            f"{glue_dir} has no directory {task.directory} and no TFDS dataset "
            f"glue/{task.name}/VERSION, which task {task.name} is read from; it has the tasks "
            f"{', '.join(present) or 'none'}"
        )
    path = directory / f"{split}.tsv"
    if not path.is_file():
        present = sorted(file.name for file in directory.glob("*.tsv"))
        raise ValueError(f"{path} does not exist; its directory has {', '.join(present) or 'none'}")
    return path


def _read_lines(path: Path) -> list[str]:
    """The file's lines, at least one, without an empty one after the last line break. Does not use
    `str.splitlines`, which also breaks at U+0085, U+2028 and others."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: not valid UTF-8 (byte 0x{content[error.start]:02x}); "
            "convert the file to UTF-8"
        ) from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not lines[-1]:
        lines.pop()
    if not any(lines):
        raise ValueError(f"{path} is empty")
    return lines


def _parse_label(task: GlueTask, text: str, where: str) -> float:
    if task.label_names is not None:
        if text not in task.label_names:
            raise ValueError(
                f"{where}: unknown label {text!r} for task {task.name}; "
                f"its labels are {', '.join(task.label_names)}"
            )
        return task.label_names.index(text)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{where}: the score of task {task.name} must be a number, not {text!r}")
    least, greatest = task.score_range or (-math.inf, math.inf)
    if not least <= score <= greatest:
        raise ValueError(
            f"{where}: the score {text!r} is outside the range of task {task.name}, "
            f"{least:g} to {greatest:g}: correct it, or scale all scores to the range"
        )
    return score
