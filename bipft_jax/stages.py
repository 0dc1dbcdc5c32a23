"""The stages of finetuning: a chain of recipes, each the start and the teacher of the next.

With `intermediate_recipes` (BiT's progressive distillation, SPEC 3) every seed has several stages:
first WORKDIR/stage_1_RECIPE/seed_N and so on, last WORKDIR/seed_N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import ml_collections
import optax

from bipft_jax.checkpoints.manager import verify_tokenizer
from bipft_jax.checkpoints.source import Source, require_initialised_scales, warm_started
from bipft_jax.data.glue import tasks as glue
from bipft_jax.models.recipes import recipe_named
from bipft_jax.objectives.classification import classification
from bipft_jax.objectives.task_distillation import (
    DISTILLATIONS,
    Distillation,
    TaskTeacher,
    bit_distillation_of_scores,
)
from bipft_jax.training import sharding
from bipft_jax.training.learner import Learner
from bipft_jax.training.optimizer import adamw, bert_adam, linear_schedule
from bipft_jax.training.step import prediction_step
from bipft_jax.training.task_outputs import require_outputs


@dataclasses.dataclass(frozen=True)
class Stage:
    """The finetuning of one recipe.

    before: the stage whose best checkpoint is this stage's start and teacher; None for the first.
    directory: of its seeds, in WORKDIR; "" for the last stage.
    label: its progress lines begin with it.
    learner, predict: compiled once for all seeds.
    """

    before: Stage | None
    directory: str
    label: str
    learner: Learner
    predict: Callable[..., jax.Array]


def make_stages(
    config: ml_collections.ConfigDict,
    task: glue.GlueTask,
    source: Source,
    teacher: TaskTeacher | None,
    total: int,
    mesh: jax.sharding.Mesh,
) -> Stage:
    """The last stage, linked to those of the intermediate recipes before it.

    source, teacher: of the first stage. total: updates per stage.

    Raises: ValueError for a checkpoint that does not fit the first stage, or a model that does not
      split over the mesh.
    """
    objective = classification(task.num_outputs)
    schedule, optimizer = make_optimizer(config, total)
    recipes = (*config.intermediate_recipes, config.recipe)
    stage = None
    for number, recipe in enumerate(recipes, start=1):
        model_config = dataclasses.replace(
            source.config(
                dropout=config.dropout,
                dtype=config.dtype,
                compute=config.compute,
                backward=config.backward,
                remat=config.remat,
            ),
            recipe=recipe_named(
                recipe, config.estimator_rank, config.lora_rank, config.full_precision_weights
            ),
        )
        if stage is None and config.pretrained:  # does the checkpoint fit? on shapes only
            shapes = objective.abstract_params(model_config)
            warm_started(shapes, model_config, objective, source)
        sharding.check_model(model_config, mesh)
        model = objective.model(model_config)
        predict = prediction_step(objective, model)
        several = f" stage {number}/{len(recipes)} {recipe}" if len(recipes) > 1 else ""
        stage = Stage(
            before=stage,
            directory=f"stage_{number}_{recipe}" if number < len(recipes) else "",
            label=task.name + several,
            learner=Learner(
                objective, model, optimizer, schedule, mesh, config.accumulation, teacher
            ),
            predict=jax.jit(predict, out_shardings=sharding.replicated(mesh)),
        )
        teacher = dataclasses.replace(teacher, model=model) if teacher else None
    return stage


def distillation_of(config: ml_collections.ConfigDict) -> Distillation:
    """The distillation loss of a config."""
    return bit_distillation_of_scores if config.score_mse else DISTILLATIONS[config.distillation]


def make_teacher(
    config: ml_collections.ConfigDict, task: glue.GlueTask, student: Source, source: Source
) -> TaskTeacher:
    """The finetuned teacher from a checkpoint.

    Raises: ValueError for a teacher of another task, with other outputs or another tokenizer, or
      whose layers, width or heads do not match the student's.
    """
    verify_tokenizer(source.tokenizer.to_dict(), student.tokenizer)
    if source.run.get("task", task.name) != task.name:
        raise ValueError(
            f"the teacher {config.teacher} was finetuned on {source.run['task']}, not on "
            f"{task.name}"
        )
    require_outputs(source, task)
    compared = ("layers", "hidden", "heads")  # heads matter to direction_matching's relations only
    for name in compared if config.distillation == "direction_matching" else compared[:2]:
        theirs, ours = source.architecture[name], student.architecture[name]
        if theirs != ours:
            raise ValueError(f"the teacher has {name} {theirs}, the student {ours}: must be equal")
    require_initialised_scales(source)
    model_config = source.config(dropout=config.dropout, dtype=config.dtype, compute=config.compute)
    model = source.objective.model(model_config)
    return TaskTeacher(model, distillation_of(config), config.teacher_dropout)


def make_optimizer(config, total: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning-rate schedule and the optimiser of a run of `total` updates."""

    def scheduled(rate: float) -> optax.Schedule:
        if config.schedule == "constant":
            return optax.constant_schedule(rate)
        return linear_schedule(rate, total / 10, total)

    schedule = scheduled(config.learning_rate)
    if config.optimizer == "adamw":
        return schedule, adamw(
            schedule, weight_decay=config.weight_decay, clip_norm=config.clip_norm
        )
    return schedule, bert_adam(
        schedule,
        scale_schedule=scheduled(config.scale_learning_rate or config.learning_rate),
        weight_decay=config.weight_decay,
    )
