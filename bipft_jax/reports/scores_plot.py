"""Draws the scores of finetuned models, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bipft_jax.reports.compared_models import (
    Model,
    Result,
    average_level,
    averages,
    of_model,
    seed_scores,
    tasks_of,
)

_WIDTH = 0.8  # of all models of a task; tasks are 1 apart


def figure(results: Sequence[Result], last: bool = False) -> Figure:
    """For each task and model a bar for the mean over seeds and a dot for each seed, in percent of
    the metric that selects the best evaluation; a line for the majority class. With several tasks,
    also the average over them, of models that have them all.

    results: of finetuning, one per model and task. last: draws the last evaluation, not the best.

    Raises: ValueError without results, or for a task whose results select by different metrics.
    """
    if not results:
        raise ValueError("no result of finetuning: there are no scores of tasks to draw")
    tasks, models = tasks_of(results), sorted(set(map(Model.of, results)))
    first = {task: next(r for r in results if r["task"] == task) for task in tasks}
    metrics = {task: result["selection_metric"] for task, result in first.items()}
    majority = {(t, metrics[t]): first[t]["majority_class"][metrics[t]] for t in tasks}
    texts = [f"{tasks[task].directory}\n{metrics[task]}" for task in tasks]
    levels = list(majority.values())
    if len(tasks) > 1:
        texts.append(f"average of\nthese {len(tasks)}")
        levels.append(average_level(majority, results))
    labels = [model.label(models).replace("`", "") for model in models]
    width = max(2.4 + 1.3 * len(texts), 1.0 + 0.075 * max(map(len, labels)))  # inches
    drawing = Figure(figsize=(width, 3.6 + 0.17 * len(models)), layout="constrained")
    axes = drawing.add_subplot()
    for index, (model, label) in enumerate(zip(models, labels, strict=True)):
        by_task = of_model(results, model)
        scores = [
            list(seed_scores(by_task[task], last).values()) if task in by_task else []
            for task in tasks
        ]
        if len(tasks) > 1:
            scores.append(averages(by_task, tasks, last))
        _draw(axes, scores, index, len(models), label)
    axes.hlines(
        [100 * level for level in levels],
        [place - 0.45 for place in range(len(levels))],
        [place + 0.45 for place in range(len(levels))],
        color="black",
        linestyle="--",
        linewidth=1,
        label="majority class",
    )
    axes.set_xticks(range(len(texts)), texts, fontsize=9)
    axes.set_ylabel(f"percent, {'last' if last else 'best'} evaluation", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    line, *bars = axes.get_legend_handles_labels()[0]
    drawing.legend(handles=[*bars, line], loc="outside upper center", fontsize=8)
    return drawing


def _draw(
    axes: Axes, scores: Sequence[Sequence[float]], index: int, models: int, label: str
) -> None:
    """The scores of one model: of each group, those of its seeds; none where it has no result."""
    width = _WIDTH / models
    places = [group + (index - (models - 1) / 2) * width for group in range(len(scores))]
    drawn = [
        (x, [100 * s for s in seeds]) for x, seeds in zip(places, scores, strict=True) if seeds
    ]
    if models <= 10:
        color = matplotlib.colormaps["tab10"].colors[index]
    else:
        color = matplotlib.colormaps["turbo"](index / (models - 1))
    heights = [fmean(seeds) for _, seeds in drawn]
    axes.bar([x for x, _ in drawn], heights, 0.9 * width, color=color, alpha=0.6, label=label)
    dots = [(x, score) for x, seeds in drawn for score in seeds]
    axes.plot(*zip(*dots, strict=True), ".", color="black", markersize=5, alpha=0.6)
