"""Finetuning on all GLUE tasks, one after another, with the averages that papers report.

Every task is a run of its own in WORKDIR/TASK (`bipft_jax.finetune`), so a stopped run resumes.
After every task it prints the table of the finished tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from bipft_jax import finetune
from bipft_jax.checkpoints.workdir import (
    absolute,
    check_workdir,
    claim_workdir,
    owned,
    recorded_inputs,
    write_json,
)
from bipft_jax.config_keys import ALL_TASKS, check_keys
from bipft_jax.data.glue import tasks as glue
from bipft_jax.processes import interruption, is_first, say
from bipft_jax.reports.results import RESULT_NAME, statistics
from bipft_jax.reports.tables import aligned, percent

# The entries that papers average; neither average includes WNLI. The scores are our selection
# metrics on the dev sets, not F1 and Spearman on the test sets as in BERT's table.
_EIGHT = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
AVERAGES = {
    "average of 8": _EIGHT,  # as in BiT: MNLI counts once, by its matched set
    "average of 9": (*_EIGHT, "mnli-mm"),  # as in BERT's table: both dev sets of MNLI count
}
_MISMATCHED = "_dev_mismatched"  # suffix of the names of scores on MNLI's second dev set


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Finetunes on the config's task or, with task "all", on every task in `config.glue_dir`.
    Prints a table, for all tasks with averages.

    Arguments:
      config: of `configs/finetune.py`.
      workdir: receives result.json and a directory per task, or for a single task the files of
        `finetune.train`.

    Returns: the contents of result.json.

    Raises: as `finetune.train`; for all tasks also ValueError if `config.glue_dir` has none, or for
      a teacher, which belongs to one task.
    """
    check_keys(config, "finetune")
    if config.task != ALL_TASKS:
        return finetune.train(config, workdir)
    if config.teacher:
        raise ValueError(
            f"the teacher {config.teacher} was finetuned on a single task: finetune on each "
            "task with its own (--config=configs/finetune.py:RECIPE,TASK), or leave teacher empty"
        )
    workdir = str(absolute(workdir))
    check_workdir(workdir, config.to_dict())
    with owned(workdir):
        return _all_tasks(config, workdir)


def _all_tasks(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    present = [name for name in glue.BENCHMARK if glue.is_there(glue.TASKS[name], config.glue_dir)]
    if not present:
        raise ValueError(f"glue_dir {config.glue_dir!r} has none of {', '.join(glue.BENCHMARK)}")
    if missing := [name for name in glue.BENCHMARK if name not in present]:
        say(f"not in {config.glue_dir}, left out: {', '.join(missing)}")
    configs = {name: ml_collections.ConfigDict({**config, "task": name}) for name in present}
    # Checks the checkpoint and the dev splits before claiming the workdir or spending hours.
    run = finetune.make_run(configs[present[0]], recorded_inputs(workdir))
    for name in present:
        task = glue.TASKS[name]
        for split in glue.dev_splits(task, config.glue_dir):
            glue.read_split(task, config.glue_dir, split)
    begun = {"init_from": run.inputs["init_from"]}  # the same for all tasks
    claim_workdir(workdir, config.to_dict(), begun)
    summaries = {}
    with interruption():
        for name, task_config in configs.items():
            summaries[name] = finetune.train(task_config, str(Path(workdir) / name), begun)
            summary = summarise(config, summaries)
            say(f"\n{table(summary)}\n")
    if is_first():
        write_json(Path(workdir) / RESULT_NAME, summary)
    return summary


def entries(summary: Mapping[str, Any], scores: Mapping[str, float]) -> dict[str, float]:
    """A task's values of its selection metric, one per dev set: {"mnli": .., "mnli-mm": ..}.

    Arguments:
      summary: the task's result.json.
      scores: by metric, of one seed or of a baseline.
    """
    metric = summary["selection_metric"]
    scores_by_task = {summary["task"]: scores[metric]}
    if metric + _MISMATCHED in scores:
        scores_by_task[f"{summary['task']}-mm"] = scores[metric + _MISMATCHED]
    return scores_by_task


def summarise(
    config: ml_collections.ConfigDict, summaries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The result of all tasks, in the form of a single task's. Its scores are the entries and the
    averages whose entries are complete, or else the average of the existing entries.

    Arguments:
      summaries: task name -> contents of its result.json.
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
        "task": ALL_TASKS,
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
    """A summary of all tasks as text: one row per entry, and the averages."""
    origin = "pretrained" if summary["pretrained"] else "not pretrained"
    rows = [["", "mean", "deviation", "majority class", "metric"]]
    majority, metrics = {}, {}
    for task in summary["tasks"].values():
        baselines = entries(task, task["majority_class"])
        majority |= baselines
        metrics |= dict.fromkeys(baselines, task["selection_metric"])
    for name, mean in summary["mean"].items():
        scores = (mean, summary["standard_deviation"][name], majority.get(name))
        metric = metrics.get(name) or ", ".join(AVERAGES.get(name, metrics))
        rows.append([name, *map(percent, scores), metric])
    return (
        f"GLUE, {summary['recipe']}, {origin}: best evaluation on the dev sets, in percent, "
        f"mean over {len(summary['seeds'])} seed(s)\n{aligned(rows, right=(1, 2, 3))}"
    )
