"""Compares the results of runs in Markdown tables: one of finetuning, one of pretraining.

    python -m bipft_jax.comparison RESULT... [--last] [--glue_dir DIR] [--output FILE]

RESULT is the result.json of a run (of finetuning over all its seeds), under any file name, or a
directory to search for such files. Of finetuning, a row is a model: a recipe with the rank of its
estimators, pretrained or not, with a distillation or without, and the checkpoint that it starts
from, which is named where a recipe has several. A column is a metric of a task; a cell is the mean
over seeds and the sample standard deviation, in percent, of each seed's best evaluation, or with
--last of its last. The last column averages all tasks of the table, each by the metric that selects
its best evaluation; it is empty for a model that lacks a task. --glue_dir adds a row for a linear
model of bags of words (`bipft_jax/data/glue/bag_of_words.py`) and the standard error of an accuracy
on that many dev rows. --output draws the scores. Of pretraining, a row is a setting, named by the
keys in which those of its recipe and size differ; a cell is the mean over its seeds of a held-out
loss (nats) or accuracy (percent).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bipft_jax.data.glue import bag_of_words
from bipft_jax.data.glue.tasks import TASKS, read_split
from bipft_jax.paths import require_local, require_writable
from bipft_jax.reports import pretraining_table, scores_plot
from bipft_jax.reports.compared_models import (
    NEEDED,
    Model,
    Result,
    average_level,
    averages,
    of_model,
    tasks_of,
)
from bipft_jax.reports.plot import require_format
from bipft_jax.reports.results import statistics
from bipft_jax.reports.tables import percent


def tables(
    paths: Iterable[str | Path], glue_dir: str | Path | None = None, last: bool = False
) -> str:
    """The tables of the results at these paths, recursively in directories, as Markdown.

    glue_dir, last: of `table`.

    Raises: as `read_results` and `table`.
    """
    return _tables(read_results(paths), glue_dir, last)


def _tables(results: Results, glue_dir: str | Path | None, last: bool) -> str:
    of_pretraining = pretraining_table.tables(results.pretraining, last)
    if not results.finetuning:
        return "\n\n".join(of_pretraining)
    of_tasks = table(list(results.finetuning.values()), glue_dir, last)
    return "\n\n".join([of_tasks, *of_pretraining])


class Results(NamedTuple):
    """Contents of result.json files, by file."""

    finetuning: dict[Path, dict[str, Any]]
    pretraining: dict[Path, dict[str, Any]]


def read_results(paths: Iterable[str | Path]) -> Results:
    """Reads the results at these paths, recursively in directories; skips results of single seeds
    of finetuning.

    Raises: ValueError for a path without results, a result without scores of its seeds, or two
      results of the same model on the same task.
    """
    results = Results({}, {})
    for path in map(Path, paths):
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        loaded = {file.resolve(): _load(file, strictly=file == path) for file in files}
        new = Results(
            {file: result for file, result in loaded.items() if _is_of_a_task(result)},
            {f: r for f, r in loaded.items() if pretraining_table.is_of_pretraining(r)},
        )
        if not any(new):
            raise ValueError(f"{path} has no result.json of a run")
        for kind, of_path in zip(results, new, strict=True):
            kind.update(of_path)
    by_cell: dict[tuple[Model, str], Path] = {}
    for file, result in results.finetuning.items():
        if missing := [key for key in NEEDED if key not in result]:
            raise ValueError(f"{file} is not a run's result: it lacks {', '.join(missing)}")
        model, task = Model.of(result), result["task"]
        other = by_cell.setdefault((model, task), file)
        if other != file:
            raise ValueError(
                f"{other} and {file} are both of {model.label([])} on {task}: give one of them"
            )
    return results


def table(results: Sequence[Result], glue_dir: str | Path | None = None, last: bool = False) -> str:
    """A Markdown table: rows in the order of the recipes, with the majority class last; columns in
    the order of the task table.

    Arguments:
      results: contents of result.json files of finetuning runs.
      glue_dir: the tasks' data, for the bag-of-words row; None: no such row.
      last: shows the scores of each seed's last evaluation, not of its best.

    Raises: ValueError if a task of the results cannot be read from `glue_dir`, or its results
      select by different metrics.
    """
    if last:
        results = [{**r, **statistics([seed["last"] for seed in r["seeds"]])} for r in results]
    tasks = tasks_of(results)
    scores = {
        (task, metric): None
        for task in tasks
        for result in results
        if result["task"] == task
        for metric in result["mean"]
    }
    models = sorted({Model.of(result) for result in results})
    names = [f"{tasks[task].directory}, {metric}" for task, metric in scores]
    average = [f"average of these {len(tasks)}"] if len(tasks) > 1 else []
    rows = [["", *names, *average]]
    rows.append(["---", *("---:" for _ in rows[0][1:])])
    for model in models:
        by_task = of_model(results, model)
        cells = [_cell(by_task.get(task), metric) for task, metric in scores]
        if average:
            of_seeds = [{"": score} for score in averages(by_task, tasks, last)]
            cells.append(_cell(statistics(of_seeds) if of_seeds else None, ""))
        rows.append([model.label(models), *cells])
    majority = {
        (r["task"], metric): score for r in results for metric, score in r["majority_class"].items()
    }
    notes, baselines = [], {}
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
        baselines["linear model of bags of words"] = words
    baselines["majority class"] = majority
    for name, of_metrics in baselines.items():
        cells = [percent(of_metrics[key]) if key in of_metrics else "" for key in scores]
        if average:
            cells.append(percent(average_level(of_metrics, results)))
        rows.append([name, *cells])
    counts = sorted({len(result["seeds"]) for result in results})
    seeds = " or ".join(map(str, counts))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    which = "last" if last else "best"
    return "\n".join(
        [*lines, "", f"Percent of the {which} evaluation on the dev sets; seeds: {seeds}.", *notes]
    )


def _cell(result: Result | None, metric: str) -> str:
    if result is None or metric not in result["mean"]:
        return ""
    mean, deviation = result["mean"][metric], result["standard_deviation"][metric]
    return percent(mean) if deviation is None else f"{percent(mean)} ± {percent(deviation)}"


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
        "--last",
        action="store_true",
        help="scores of the last evaluation of each seed, not of its best",
    )
    parser.add_argument(
        "--glue_dir",
        metavar="DIR",
        help="the tasks' data, as finetuning takes it: adds a row of bags of words",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="draws the scores of finetuning: .png, .svg or .pdf"
    )
    arguments = parser.parse_args(argv)
    try:
        require_local(vars(arguments))
        if arguments.output:
            require_format(arguments.output)
            require_writable(arguments.output)
        results = read_results(arguments.results)
        print(_tables(results, arguments.glue_dir, arguments.last))
        if arguments.output:
            drawing = scores_plot.figure(list(results.finetuning.values()), arguments.last)
            drawing.savefig(arguments.output, dpi=120)
            print(f"\nwrote {arguments.output}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
