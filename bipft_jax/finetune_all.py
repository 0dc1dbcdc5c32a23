"""Finetuning on every GLUE task, one after the other, and the averages that papers report.

Each task is a run of its own in WORKDIR/TASK (`bipft_jax.finetune`), so a stopped run goes on where
it was. After each task the table of those that are done is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from bipft_jax import finetune
from bipft_jax.data import glue
from bipft_jax.results import RESULT_NAME, statistics
from bipft_jax.training.workdir import check_workdir, claim_workdir, write_json

# Of the development sets' selection metrics; neither counts WNLI.
_EIGHT = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
AVERAGES = {
    "average of 8": _EIGHT,  # as BiT reports: MNLI counts once, by its matched set
    "average of 9": (*_EIGHT, "mnli-mm"),  # as BERT's table: both sets of MNLI count
}
_MISMATCHED = "_dev_mismatched"  # ends the names of scores on MNLI's second dev set


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Finetunes on all tasks that `config.glue_dir` has and prints a table with the averages.

    Arguments:
      config: of `configs/finetune.py`, task "all".
      workdir: receives result.json and a directory for each task.

    Returns: what result.json holds.

    Raises: ValueError as `finetune.train`, also if no task is there.
    """
    check_workdir(workdir, config.to_dict())
    there = [name for name in glue.BENCHMARK if glue.is_there(glue.TASKS[name], config.glue_dir)]
    if not there:
        raise ValueError(f"glue_dir {config.glue_dir!r} has none of {', '.join(glue.BENCHMARK)}")
    if missing := [name for name in glue.BENCHMARK if name not in there]:
        print(f"not in {config.glue_dir}, left out: {', '.join(missing)}")
    claim_workdir(workdir, config.to_dict())
    summaries = {}
    for name in there:
        task_config = config.copy_and_resolve_references()
        task_config.update({"program": "finetune", "task": name})
        summaries[name] = finetune.train(task_config, str(Path(workdir) / name))
        summary = summarise(config, summaries)
        print(f"\n{table(summary)}\n")
    if jax.process_index() == 0:
        write_json(Path(workdir) / RESULT_NAME, summary)
    return summary


def entries(summary: Mapping[str, Any], scores: Mapping[str, float]) -> dict[str, float]:
    """A task's scores by selection metric, one for each dev set: {"mnli": .., "mnli-mm": ..}.

    Arguments:
      summary: the task's result.json.
      scores: by metric, of one seed or of a baseline.
    """
    metric = summary["selection_metric"]
    found = {summary["task"]: scores[metric]}
    if metric + _MISMATCHED in scores:
        found[f"{summary['task']}-mm"] = scores[metric + _MISMATCHED]
    return found


def summarise(
    config: ml_collections.ConfigDict, summaries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The result of all tasks, in the form of one task's: scores are the entries and those averages
    that have all their entries, or else the average of what is there.

    Arguments:
      summaries: result.json of each task by its name.
    """
    seeds = []
    for index, seed in enumerate(config.seeds):
        best = {}
        for summary in summaries.values():
            best |= entries(summary, summary["seeds"][index]["best"])
        averages = {
            name: float(np.mean([best[entry] for entry in counted]))
            for name, counted in AVERAGES.items()
            if best.keys() >= set(counted)
        }
        averages = averages or {f"average of these {len(best)}": float(np.mean([*best.values()]))}
        seeds.append({"seed": seed, "best": best | averages})
    return {
        "task": "all",
        "recipe": config.recipe,
        "pretrained": config.pretrained,
        "init_from": config.init_from,
        "selection_metric": next(iter(averages)),
        "higher_is_better": True,
        **statistics([seed["best"] for seed in seeds]),
        "seeds": seeds,
        "tasks": dict(summaries),
        "config": config.to_dict(),
    }


def table(summary: Mapping[str, Any]) -> str:
    """A summary of all tasks for reading: a row for each entry, and the averages."""
    origin = "pretrained" if summary["pretrained"] else "not pretrained"
    lines = [
        f"GLUE, {summary['recipe']}, {origin}: best evaluation on the dev sets, in percent, "
        f"mean over {len(summary['seeds'])} seed(s)",
        f"{'':20}{'mean':>8}{'deviation':>12}{'majority class':>16}  metric",
    ]
    majority, metrics = {}, {}
    for task in summary["tasks"].values():
        found = entries(task, task["majority_class"])
        majority |= found
        metrics |= dict.fromkeys(found, task["selection_metric"])
    for name, mean in summary["mean"].items():
        cells = (mean, summary["standard_deviation"][name], majority.get(name))
        shown = ["-" if cell is None else f"{100 * cell:.1f}" for cell in cells]
        what = metrics.get(name) or ", ".join(AVERAGES.get(name, metrics))
        lines.append(f"{name:20}{shown[0]:>8}{shown[1]:>12}{shown[2]:>16}  {what}")
    return "\n".join(lines)
