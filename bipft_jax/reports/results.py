"""The result of a finished run: WORKDIR/result.json, and its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from bipft_jax.data.glue.own_tasks import task_record
from bipft_jax.data.glue.tasks import GlueTask
from bipft_jax.json_text import parse_json
from bipft_jax.reports.tables import aligned, percent

if TYPE_CHECKING:
    from bipft_jax.checkpoints.manager import Checkpointer
    from bipft_jax.objectives.objective import FromCorpus

RESULT_NAME = "result.json"


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a finished run.

    metric: the metric that selected the best checkpoint.
    by_seed: each seed's scores at its best checkpoint, by name.
    """

    metric: str
    higher_is_better: bool
    by_seed: dict[int, dict[str, float]]


def finished_scores(workdir: str | Path) -> Scores | None:
    """The scores of a pretraining or finetuning run; None if it is not finished.

    Raises: ValueError if its result.json is invalid.
    """
    path = Path(workdir) / RESULT_NAME
    if not path.exists():
        return None
    result = read_result(path)
    try:
        return Scores(
            metric=result["selection_metric"],
            higher_is_better=result["higher_is_better"],
            by_seed={seed["seed"]: seed["best"] for seed in result["seeds"]},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a run's result ({error}): delete it to run again"
        ) from error


def read_result(path: str | Path) -> dict[str, Any]:
    """Reads a result.json. Raises: ValueError naming it if it is not a JSON object."""
    try:
        result = parse_json(Path(path).read_bytes())
        if not isinstance(result, dict):
            raise ValueError("no JSON object")
        return result
    except ValueError as error:
        raise ValueError(
            f"{path} is not a run's result ({error}): delete it to run again"
        ) from error


def of_seed(seed: int, updates: int, checkpointer: Checkpointer) -> dict[str, Any]:
    """The result of one seed: `seed`, `updates`, `best_update`, and the scores of the checkpoints
    `best` and `last`."""
    best = checkpointer.best_step()
    return {
        "seed": seed,
        "updates": updates,
        "best_update": best,
        "best": checkpointer.metrics(best),
        "last": checkpointer.metrics(updates),
    }


def of_pretraining(
    config: ml_collections.ConfigDict, objective: FromCorpus, seed: dict[str, Any], tokens: int
) -> dict[str, Any]:
    """The result of a pretraining run, in the form of a finetuning run with one seed.

    seed: the result of `of_seed`. tokens: seen in training, with repetitions.
    """
    return {
        "recipe": config.recipe,
        "size": config.size,
        "tokens": tokens,
        "selection_metric": objective.best_metric,
        "higher_is_better": objective.higher_is_better,
        "seeds": [seed],
        "config": config.to_dict(),
    }


def summarise(
    config: ml_collections.ConfigDict,
    task: GlueTask,
    baseline: dict[str, float],
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    """The result of a finetuning run: the results of all seeds, with mean and standard deviation of
    their best scores.

    Arguments:
      baseline: scores of the majority class.
      results: result.json of each seed.
    """
    return {
        "task": task.name,
        **task_record(task),
        "recipe": config.recipe,
        "pretrained": config.pretrained,
        "init_from": config.init_from,
        "selection_metric": task.selection_metric,
        "higher_is_better": True,
        **statistics([r["best"] for r in results]),
        "majority_class": baseline,
        "seeds": results,
        "config": config.to_dict(),
    }


def statistics(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """`mean` and sample `standard_deviation` (None for one seed) of each score over the seeds."""
    columns = {name: [of_seed[name] for of_seed in scores] for name in scores[0]}
    return {
        "mean": {name: float(np.mean(column)) for name, column in columns.items()},
        "standard_deviation": {
            name: float(np.std(column, ddof=1)) if len(column) > 1 else None
            for name, column in columns.items()
        },
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as aligned text: a row for each seed, after those of its intermediate stages;
    mean and standard deviation for several seeds; the majority-class baseline."""
    names = list(summary["mean"])
    origin = "pretrained" if summary["pretrained"] else "not pretrained"
    rows: list[tuple[str, Mapping[str, float]]] = []
    for r in summary["seeds"]:
        for stage, scores in r["intermediate"].items():
            rows.append((f"seed {r['seed']}, {stage}", scores))
        rows.append((f"seed {r['seed']} (update {r['best_update']} of {r['updates']})", r["best"]))
    if len(summary["seeds"]) > 1:
        rows.append(("mean", summary["mean"]))
        rows.append(("standard deviation", summary["standard_deviation"]))
    rows.append(("majority class", summary["majority_class"]))
    title = f"{summary['task']}, {summary['recipe']}, {origin}"
    cells = [["", *names], *([label, *map(percent, map(s.get, names))] for label, s in rows)]
    return (
        f"{title}: best evaluation on the dev set, in percent\n"
        f"{aligned(cells, right=range(1, len(names) + 1))}"
    )
