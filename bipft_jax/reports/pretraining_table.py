"""A Markdown table of pretraining runs: held-out scores, and the settings in which runs differ."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from bipft_jax.objectives.table import objective_named
from bipft_jax.points import label
from bipft_jax.reports.tables import percent

# Config keys that change nothing that is learned.
_NOT_COMPARED = ("seed", "data_workers", "log_every", "evaluate_every", "keep_every")


def is_of_pretraining(result: Mapping[str, Any]) -> bool:
    """Whether this is the result.json of a pretraining run."""
    return "size" in result and "seeds" in result


def table(results: Iterable[Mapping[str, Any]], last: bool = False) -> str:
    """One row for runs that differ in their seeds only: the mean of their held-out loss (nats) and
    accuracy (percent) for each part of the objective, with the sample standard deviation. The best
    rows come first; a recipe's other rows are named by what they change of its best.

    Arguments:
      results: of `is_of_pretraining`, of one objective.
      last: shows the scores of each run's last evaluation, not of its best.

    Raises: ValueError for several objectives, whose scores cannot be compared.
    """
    settings: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        settings.setdefault(json.dumps(_compared(result), sort_keys=True), []).append(result)
    which = "last" if last else "best"
    runs = sorted(settings.values(), key=lambda of: _selected(of, which))
    objectives = {of[0]["config"].get("objective", "mlm_nsp") for of in runs}
    if len(objectives) > 1:
        raise ValueError(
            f"pretraining runs of {' and '.join(sorted(objectives))} have no common scores: give "
            "those of one objective"
        )
    shown = objective_named(objectives.pop()).shown
    metrics = [name for part in shown for name in (part.loss, part.accuracy)]
    rows = [["pretraining", *(f"held-out {name}" for name in metrics), "M tokens", "seeds"]]
    rows.append(["---", *("---:" for _ in rows[0][1:])])
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for of_setting in runs:
        first, compared = of_setting[0], _compared(of_setting[0])
        model = first["recipe"], first["size"]
        base = best.setdefault(model, compared)
        changes = {k: v for k, v in compared.items() if k in base and base[k] != v}
        name = f"`{model[0]}`, {model[1]}" + (f": {label(changes)}" if changes else "")
        tokens = first.get("tokens")
        rows.append(
            [
                name,
                *(_cell(of_setting, which, metric) for metric in metrics),
                f"{tokens / 1e6:.1f}" if tokens else "-",
                str(len(of_setting)),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _compared(result: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result["config"].items() if k not in _NOT_COMPARED}


def _scores(results: Iterable[Mapping[str, Any]], which: str, metric: str) -> list[float]:
    return [seed[which][metric] for result in results for seed in result["seeds"]]


def _selected(results: list[Mapping[str, Any]], which: str) -> float:
    """The mean selection metric, lower for better."""
    mean = statistics.fmean(_scores(results, which, results[0]["selection_metric"]))
    return -mean if results[0]["higher_is_better"] else mean


def _cell(results: list[Mapping[str, Any]], which: str, metric: str) -> str:
    scores = _scores(results, which, metric)
    text = percent if metric.endswith("accuracy") else "{:.3f}".format
    mean = text(statistics.fmean(scores))
    return f"{mean} ± {text(statistics.stdev(scores))}" if len(scores) > 1 else mean
