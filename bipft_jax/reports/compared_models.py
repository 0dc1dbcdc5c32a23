"""Models whose finetuning is compared, and their scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from bipft_jax.data.glue import own_tasks
from bipft_jax.data.glue.tasks import TASKS, GlueTask
from bipft_jax.models.recipes import RECIPES

Result = Mapping[str, Any]  # contents of the result.json of a finetuning run
NEEDED = ("selection_metric", "seeds", "mean", "standard_deviation", "majority_class")  # its keys


class Model(NamedTuple):
    """What tells the rows of a table apart; sorts in their order.

    recipe: its position in `RECIPES`. rank: of the residual estimators. distillation: "" for none.
    start: the checkpoint that it starts from; "" if that is its teacher, another for every task.
    """

    recipe: int
    rank: int
    pretrained: bool
    distillation: str
    start: str

    @classmethod
    def of(cls, result: Result) -> Model:
        """The model of a finetuning run's result."""
        names = list(RECIPES)
        config = result.get("config", {})  # without what is newer than the result
        rank = config.get("estimator_rank", -1)
        start, teacher = result["init_from"], config.get("teacher", "")
        return cls(
            recipe=names.index(result["recipe"]),
            rank=RECIPES[result["recipe"]].estimator_rank if rank < 0 else rank,
            pretrained=result["pretrained"],
            distillation=config.get("distillation", ""),
            start="" if teacher and Path(teacher) == Path(start) else start,
        )

    def label(self, models: Iterable[Model]) -> str:
        """The name of its row among those of `models`: what models of its recipe differ in."""
        recipe = list(RECIPES.values())[self.recipe]
        alike = [m for m in models if (m.recipe, m.pretrained) == (self.recipe, self.pretrained)]
        distillations = {m.distillation for m in alike} - {""}
        parts = [f"`{recipe.name}`"]
        if self.rank != recipe.estimator_rank:
            parts.append(f"rank {self.rank}")
        if not self.pretrained:
            parts.append("not pretrained")
        if self.distillation:
            by = f" by `{self.distillation}`" if len(distillations) > 1 else ""
            parts.append(f"distilled{by} from a finetuned teacher")
        if len({m.start for m in alike}) > 1:
            parts.append(f"from `{self.start}`" if self.start else "from that teacher's weights")
        return ", ".join(parts)


def tasks_of(results: Iterable[Result]) -> dict[str, GlueTask]:
    """The tasks by name, in the order of the task table; tasks of the user's own last.

    Raises: ValueError for a task whose results select by different metrics.
    """
    tasks, metrics = {}, {}
    for result in results:
        name, metric = result["task"], result["selection_metric"]
        tasks[name] = own_tasks.task_of_run(result)
        if metrics.setdefault(name, metric) != metric:
            raise ValueError(
                f"results of {name} select their best evaluation by {metrics[name]} and by "
                f"{metric}: give those of one"
            )
    return {name: tasks[name] for name in dict.fromkeys((*TASKS, *tasks)) if name in tasks}


def of_model(results: Iterable[Result], model: Model) -> dict[str, Result]:
    """The results of one model, by task."""
    return {result["task"]: result for result in results if Model.of(result) == model}


def seed_scores(result: Result, last: bool) -> dict[int, float]:
    """The score of each seed: of the metric that selects its best evaluation.

    last: of the last evaluation, not of the best.
    """
    which, metric = "last" if last else "best", result["selection_metric"]
    return {seed["seed"]: seed[which][metric] for seed in result["seeds"]}


def averages(
    by_task: Mapping[str, Result], tasks: Mapping[str, GlueTask], last: bool
) -> list[float]:
    """`seed_scores` of one model averaged over the tasks: of each seed or, if its tasks have other
    seeds, of their means. Empty if it lacks a task."""
    if by_task.keys() != tasks.keys():
        return []
    of_tasks = [seed_scores(result, last) for result in by_task.values()]
    seeds = of_tasks[0].keys()
    if any(scores.keys() != seeds for scores in of_tasks):
        return [fmean(fmean(scores.values()) for scores in of_tasks)]
    return [fmean(scores[seed] for scores in of_tasks) for seed in seeds]


def average_level(levels: Mapping[tuple[str, str], float], results: Iterable[Result]) -> float:
    """The average over tasks of a baseline.

    levels: its scores by task and metric.
    """
    selecting = {(result["task"], result["selection_metric"]) for result in results}
    return fmean(levels[key] for key in selecting)
