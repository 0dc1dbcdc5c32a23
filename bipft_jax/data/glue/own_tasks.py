"""Tasks of one's own: GLUE_DIR/NAME/task.json beside GLUE_DIR/NAME/{train,dev}.tsv.

    {"sentences": ["title", "text"], "label": "topic", "labels": ["sport", "science", "arts"]}

A task is then the same as a row of `TASKS`. Keys, those that may be left out in brackets:

    sentences   the column of the sentence, or the two columns of a pair; the files have a header
    label       the label's column
    labels      the labels as the files spell them, in the order of the classifier's outputs; or
    scores      instead, for regression: [least, greatest]
    [metrics]   names of `glue/metrics.py`, of which the first selects the best evaluation:
                accuracy; for scores pearson and spearman. f1 is for two labels, of the second one
    [epochs]    passes over the training rows: 10
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bipft_jax.data.glue.metrics import METRICS
from bipft_jax.data.glue.tasks import TASKS, GlueTask
from bipft_jax.errors import unknown_name
from bipft_jax.json_text import parse_json

TASK_FILE = "task.json"

_KEYS = ("sentences", "label", "labels", "scores", "metrics", "epochs")
_OF_SCORES, _OF_TWO_CLASSES = ("pearson", "spearman"), ("f1",)


def task_named(name: str, glue_dir: str | Path) -> GlueTask:
    """The row of `TASKS` of that name, or the task that `glue_dir` describes.

    Raises: ValueError if neither has it, naming the nearest known ones; for an invalid description,
      naming the file and the key; for a description of a task of GLUE.
    """
    directory = Path(glue_dir).expanduser()
    path = directory / name / TASK_FILE
    if name in TASKS:
        if path.is_file():
            raise ValueError(
                f"{path} describes {name}, which is a task of GLUE: give it another name"
            )
        return TASKS[name]
    if not path.is_file():
        own = sorted(file.parent.name for file in directory.glob(f"*/{TASK_FILE}"))
        raise ValueError(
            f"{unknown_name('GLUE task', name, (*TASKS, *own))}; a task of your own is described "
            f"in {path} (see bipft_jax/data/glue/own_tasks.py)"
        )
    try:
        return described_task(name, parse_json(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def described_task(name: str, described: Any) -> GlueTask:
    """The task of a description. Raises: ValueError naming the key that is wrong."""
    if not isinstance(described, Mapping):
        raise ValueError("it must be a JSON object")
    for key in described:
        if key not in _KEYS:
            raise unknown_name("key", key, _KEYS)
    sentences = _names(described, "sentences", (1, 2))
    label = described.get("label")
    if not _is_name(label):
        raise ValueError(f"label is {_shown(label)}: it must be the name of a column")
    if label in sentences:
        raise ValueError(f"label: {label!r} is a column of sentences")
    if ("labels" in described) == ("scores" in described):
        raise ValueError("it must have one of labels and scores")
    regression = "scores" in described
    labels = None if regression else _names(described, "labels", (2, None))
    if labels and len({label.casefold() for label in labels}) < len(labels):
        raise ValueError(f"labels is {list(labels)!r}: two of them differ in their case only")
    usual = list(_OF_SCORES) if regression else ["accuracy"]
    metrics = _names({"metrics": usual, **described}, "metrics", (1, None))
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metrics: {unknown_name('metric', metric, METRICS)}")
        if (metric in _OF_SCORES) != regression:
            raise ValueError(f"metrics: {metric} is not for {'scores' if regression else 'labels'}")
        if metric in _OF_TWO_CLASSES and len(labels) != 2:
            raise ValueError(f"metrics: {metric} is for two labels, not {len(labels)}")
    epochs = described.get("epochs", 10)
    if type(epochs) is not int or epochs < 1:
        raise ValueError(f"epochs is {epochs!r}: it must be a whole number, 1 or more")
    return GlueTask(
        name=name,
        directory=name,
        sentences=sentences,
        label=label,
        label_names=labels,
        metrics=metrics,
        epochs=epochs,
        score_range=_range(described["scores"]) if regression else None,
    )


def task_record(task: GlueTask) -> dict[str, Any]:
    """What a run records of its task beside the name: the description of a task of one's own,
    nothing for a task of GLUE."""
    return {} if task.name in TASKS else {"own_task": task_description(task)}


def fingerprint(task: GlueTask) -> dict[str, str]:
    """What identifies a description for a resumed run: its SHA-256 (hex) by the file's name; empty
    for a task of GLUE."""
    text = json.dumps(task_record(task), sort_keys=True)
    return {} if task.name in TASKS else {TASK_FILE: hashlib.sha256(text.encode()).hexdigest()}


def task_description(task: GlueTask) -> dict[str, Any]:
    """The content of a task.json; `described_task` makes the task of it."""
    classes = (
        {"scores": list(task.score_range)}
        if task.label_names is None
        else {"labels": list(task.label_names)}
    )
    return {
        "sentences": list(task.sentences),
        "label": task.label,
        **classes,
        "metrics": list(task.metrics),
        "epochs": task.epochs,
    }


def task_of_run(run: Mapping[str, Any]) -> GlueTask | None:
    """The task of a run, from what a checkpoint or result.json records; None for a run without."""
    if "own_task" in run:
        return described_task(run["task"], run["own_task"])
    return TASKS.get(run.get("task"))


def _names(
    described: Mapping[str, Any], key: str, count: tuple[int, int | None]
) -> tuple[str, ...]:
    """A list of distinct names. count: the least and the greatest length, None for any."""
    names, (least, most) = described.get(key), count
    many = f"{least}" if least == most else f"{least} or {most}" if most else f"{least} or more"
    if not (
        isinstance(names, list)
        and least <= len(names) <= (most or len(names))
        and all(map(_is_name, names))
        and len(set(names)) == len(names)
    ):
        raise ValueError(f"{key} is {_shown(names)}: it must be a list of {many} different names")
    return tuple(names)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and not set("\t\r\n") & set(name)


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)


def _range(scores: Any) -> tuple[float, float]:
    if isinstance(scores, list) and len(scores) == 2:
        # Between numbers that float32 has.
        if all(type(s) in (int, float) and abs(s) < 1e38 for s in scores) and scores[0] < scores[1]:
            return float(scores[0]), float(scores[1])
    raise ValueError(f"scores is {scores!r}: it must be [least, greatest], finite numbers")
