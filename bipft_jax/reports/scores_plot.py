"""Draws the scores of finetuned models, task by task."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bipft_jax.reports.compared_models import Model, Result, seed_averages, seed_scores, tasks_of

_WIDTH = 0.8  # of all models of a task; tasks are 1 apart


def figure(results: Sequence[Result], last: bool = False) -> Figure:
    """For each task and model a bar for the mean over seeds and a dot for each seed, in percent of
    the metric that selects the best evaluation; a line for the majority class. With several tasks,
    also the average over them, of models that have them all.

    results: of finetuning, one per model and task. last: draws the last evaluation, not the best.

    Raises: ValueError without results.
    """
    if not results:
        raise ValueError("no result of finetuning: there are no scores of tasks to draw")
    tasks, models = tasks_of(results), sorted(set(map(Model.of, results)))
    metrics = {result["task"]: result["selection_metric"] for result in results}
    texts = [f"{tasks[task].directory}\n{metrics[task]}" for task in tasks]
    texts += ["average"] if len(tasks) > 1 else []
    drawing = Figure(figsize=(2.4 + 1.3 * len(texts), 4.2), layout="constrained")
    axes = drawing.add_subplot()
    for index, model in enumerate(models):
        of_model = {r["task"]: r for r in results if Model.of(r) == model}
        scores = [seed_scores(of_model[t], last) if t in of_model else [] for t in tasks]
        if len(tasks) > 1:
            whole = of_model.keys() == tasks.keys()
            scores.append(seed_averages(of_model.values(), last) if whole else [])
        _draw(axes, scores, index, len(models), model.label(models).replace("`", ""))
    majority = {r["task"]: r["majority_class"][r["selection_metric"]] for r in results}
    levels = [majority[task] for task in tasks]
    levels += [sum(levels) / len(levels)] if len(tasks) > 1 else []
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
    color = matplotlib.colormaps["tab10"].colors[index % 10]
    heights = [sum(seeds) / len(seeds) for _, seeds in drawn]
    axes.bar([x for x, _ in drawn], heights, 0.9 * width, color=color, alpha=0.6, label=label)
    dots = [(x, score) for x, seeds in drawn for score in seeds]
    axes.plot(*zip(*dots, strict=True), ".", color="black", markersize=5, alpha=0.6)
