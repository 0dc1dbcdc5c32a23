"""Compares the results of finetuning runs in a Markdown table.

    python -m bipft_jax.comparison RESULT... [--glue_dir DIR]

RESULT is the result.json of a finetuning run (over all its seeds, under any file name), or a
directory to search for such files. A row is a recipe, pretrained or not, and the checkpoint that it
starts from, which is named where a recipe has several; a column is a metric of a task; a cell is
the mean over seeds and the sample standard deviation, in percent. --glue_dir adds a
row for a linear model of bags of words (`bipft_jax/data/glue/bag_of_words.py`) and the standard
error of an accuracy on that many dev rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bipft_jax.data.glue import bag_of_words, own_tasks
from bipft_jax.data.glue.tasks import TASKS, read_split
from bipft_jax.models.recipes import RECIPES
from bipft_jax.paths import require_local
from bipft_jax.reports.tables import percent


def read_results(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Reads the results at these paths, recursively in directories; skips results of single seeds
    and of pretraining.

    Raises: ValueError for a path without results, or two results of the same model on the same
      task.
    """
    by_cell: dict[tuple, tuple[Path, dict[str, Any]]] = {}
    for path in map(Path, paths):
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        loaded = [(file.resolve(), _load(file, strictly=file == path)) for file in files]
        loaded = [(file, result) for file, result in loaded if _is_of_a_task(result)]
        if not loaded:
            raise ValueError(f"{path} has no result.json of a finetuning run")
        for file, result in loaded:
            cell = (*_model(result), result["task"])
            if cell in by_cell and by_cell[cell][0] != file:
                raise ValueError(
                    f"{by_cell[cell][0]} and {file} are both of {_label(result)} on "
                    f"{result['task']}: give one of them"
                )
            by_cell[cell] = file, result
    return [result for _, result in by_cell.values()]


def table(results: Sequence[Mapping[str, Any]], glue_dir: str | Path | None = None) -> str:
    """A Markdown table: rows in the order of the recipes, with the majority class last; columns in
    the order of the task table.

    Arguments:
      results: as `read_results` returns them.
      glue_dir: the tasks' data, for the bag-of-words row; None: no such row.

    Raises: ValueError if a task of the results cannot be read from `glue_dir`.
    """
    tasks = {result["task"]: own_tasks.task_of_run(result) for result in results}
    tasks = {name: tasks[name] for name in dict.fromkeys((*TASKS, *tasks)) if name in tasks}
    scores = {
        (task, metric): None
        for task in tasks
        for result in results
        if result["task"] == task
        for metric in result["mean"]
    }
    order = list(RECIPES)
    models = sorted({_model(r) for r in results}, key=lambda m: (order.index(m[0]), *m[1:]))
    starts = Counter((recipe, pretrained) for recipe, pretrained, _ in models)
    rows = [["", *(f"{tasks[task].directory}, {metric}" for task, metric in scores)]]
    rows.append(["---", *("---:" for _ in scores)])
    for model in models:
        of_model = {r["task"]: r for r in results if _model(r) == model}
        cells = [_cell(of_model.get(task), metric) for task, metric in scores]
        label = _label(next(iter(of_model.values())))
        if starts[model[:2]] > 1:
            label += f", from `{model[2]}`"
        rows.append([label, *cells])
    majority = {
        (r["task"], metric): score for r in results for metric, score in r["majority_class"].items()
    }
    notes = []
    if glue_dir is not None:
        words = {}
        for name, task in tasks.items():
            train, dev = (
                read_split(task, glue_dir, split) for split in ("train", task.dev_splits[0])
            )
            words |= {(name, metric): s for metric, s in bag_of_words.scores(train, dev).items()}
            error = 50 / len(dev) ** 0.5
            notes.append(
                f"{task.directory}: {len(train):,} training and {len(dev):,} dev rows; "
                f"standard error of an accuracy: at most {error:.1f}."
            )
        cells = (percent(words[key]) if key in words else "" for key in scores)
        rows.append(["linear model of bags of words", *cells])
    rows.append(["majority class", *(percent(majority[key]) for key in scores)])
    counts = sorted({len(result["seeds"]) for result in results})
    seeds = " or ".join(map(str, counts))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(
        [*lines, "", f"Percent of the best evaluation on the dev sets; seeds: {seeds}.", *notes]
    )


def _cell(result: Mapping[str, Any] | None, metric: str) -> str:
    if result is None or metric not in result["mean"]:
        return ""
    mean, deviation = result["mean"][metric], result["standard_deviation"][metric]
    return percent(mean) if deviation is None else f"{percent(mean)} ± {percent(deviation)}"


def _model(result: Mapping[str, Any]) -> tuple[str, bool, str]:
    return result["recipe"], result["pretrained"], result["init_from"]


def _label(result: Mapping[str, Any]) -> str:
    return f"`{result['recipe']}`" + ("" if result["pretrained"] else ", not pretrained")


def _is_of_a_task(result: Mapping[str, Any]) -> bool:
    """Whether this is a finetuning result and not a config.json, which also names a task."""
    return "mean" in result and (result.get("task") in TASKS or "own_task" in result)


def _load(path: Path, strictly: bool) -> dict[str, Any]:
    """strictly: raise ValueError if the file is not JSON."""
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        if not strictly:
            return {}
        raise ValueError(f"{path} is not JSON ({error})") from error
    return result if isinstance(result, dict) else {}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.comparison",
        description=first,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="RESULT", help="file or directory")
    parser.add_argument(
        "--glue_dir",
        metavar="DIR",
        help="the tasks' data, as finetuning takes it: adds a row of bags of words",
    )
    arguments = parser.parse_args(argv)
    try:
        require_local(vars(arguments))
        print(table(read_results(arguments.results), arguments.glue_dir))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
