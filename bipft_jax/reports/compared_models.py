"""Models whose finetuning is compared, and their scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bipft_jax.data.glue import own_tasks
from bipft_jax.data.glue.tasks import TASKS, GlueTask
from bipft_jax.models.recipes import RECIPES

Result = Mapping[str, Any]  # contents of the result.json of a finetuning run


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
    def of(cls, result: Mapping[str, Any]) -> Model:
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
    """The tasks by name, in the order of the task table; tasks of the user's own last."""
    tasks = {result["task"]: own_tasks.task_of_run(result) for result in results}
    return {name: tasks[name] for name in dict.fromkeys((*TASKS, *tasks)) if name in tasks}


def seed_scores(result: Result, last: bool) -> list[float]:
    """The score of each seed: of the metric that selects its best evaluation.

    last: of the last evaluation, not of the best.
    """
    which, metric = "last" if last else "best", result["selection_metric"]
    return [seed[which][metric] for seed in result["seeds"]]


def seed_averages(results: Iterable[Result], last: bool) -> list[float]:
    """`seed_scores` averaged over the results of one model, one per task; one average of all seeds
    if the tasks have different numbers of them."""
    of_tasks = [seed_scores(result, last) for result in results]
    if len({len(scores) for scores in of_tasks}) > 1:
        of_tasks = [[sum(scores) / len(scores)] for scores in of_tasks]
    return [sum(scores) / len(scores) for scores in zip(*of_tasks, strict=True)]
