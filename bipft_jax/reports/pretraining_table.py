"""A Markdown table of pretraining runs: held-out scores, and the settings in which runs differ."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bipft_jax.objectives.table import objective_named
from bipft_jax.points import label
from bipft_jax.reports.settings import differing, setting
from bipft_jax.reports.tables import percent

Result = Mapping[str, Any]


def is_of_pretraining(result: Result) -> bool:
    """Whether this is the result.json of a pretraining run."""
    return "size" in result and "seeds" in result


def tables(results: Mapping[Path, Result], last: bool = False) -> list[str]:
    """A table for each objective, whose scores have nothing in common. A row is a setting: the mean
    over its seeds, with the sample standard deviation, of the selection metric, by which rows are
    ordered, and of the held-out loss (nats) and accuracy (percent) of each part of the objective. A
    row is named by the keys in which settings of its recipe and size differ.

    Arguments:
      results: of `is_of_pretraining`, by file.
      last: shows the scores of each run's last evaluation, not of its best.

    Raises: ValueError for two results of one setting and seed.
    """
    by_objective: dict[str, dict[Path, Result]] = {}
    for file, result in results.items():
        objective = setting(result["config"])["objective"]
        by_objective.setdefault(objective, {})[file] = result
    return [_table(name, of, "last" if last else "best") for name, of in by_objective.items()]


def _table(objective: str, results: Mapping[Path, Result], which: str) -> str:
    rows_of = _by_setting(results)
    selected = next(iter(results.values()))["selection_metric"]
    parts = [
        name for part in objective_named(objective).shown for name in (part.loss, part.accuracy)
    ]
    metrics = list(dict.fromkeys([selected, *parts]))
    lines = [["pretraining", *(f"held-out {name}" for name in metrics), "M tokens", "seeds"]]
    lines.append(["---", *("---:" for _ in lines[0][1:])])
    for of_setting in sorted(rows_of, key=lambda of: _order(of, which)):
        first = of_setting[0]
        alike = [setting(of[0]["config"]) for of in rows_of if _model(of[0]) == _model(first)]
        values = setting(first["config"])
        changed = {key: values.get(key, "-") for key in differing(alike)}
        name = "`{}`, {}".format(*_model(first)) + (f": {label(changed)}" if changed else "")
        tokens = f"{first['tokens'] / 1e6:.1f}" if "tokens" in first else "-"
        cells = [_cell(of_setting, which, metric) for metric in metrics]
        lines.append([name, *cells, tokens, str(len(of_setting))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_setting(results: Mapping[Path, Result]) -> list[list[Result]]:
    """The results, together if they differ in their seeds only."""
    files: dict[tuple[str, int], Path] = {}
    settings: dict[str, list[Result]] = {}
    for file, result in results.items():
        key, seed = json.dumps(setting(result["config"]), sort_keys=True), result["config"]["seed"]
        if (key, seed) in files:
            raise ValueError(
                f"{files[key, seed]} and {file} are both seed {seed} of one setting of "
                f"{', '.join(_model(result))}: give one of them"
            )
        files[key, seed] = file
        settings.setdefault(key, []).append(result)
    return list(settings.values())


def _model(result: Result) -> tuple[str, str]:
    return result["recipe"], result["size"]


def _scores(results: Sequence[Result], which: str, metric: str) -> list[float | None]:
    return [seed[which][metric] for result in results for seed in result["seeds"]]


def _order(results: Sequence[Result], which: str) -> float:
    mean = statistics.fmean(_scores(results, which, results[0]["selection_metric"]))
    return -mean if results[0]["higher_is_better"] else mean


def _cell(results: Sequence[Result], which: str, metric: str) -> str:
    scores = _scores(results, which, metric)
    if None in scores:  # not finite
        return "-"
    text = percent if metric.endswith("accuracy") else "{:.3f}".format
    mean = text(statistics.fmean(scores))
    return f"{mean} ± {text(statistics.stdev(scores))}" if len(scores) > 1 else mean
