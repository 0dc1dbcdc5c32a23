"""Checks that the outputs of a checkpoint's classifier are the classes of a task."""

from __future__ import annotations

import logging
from typing import Any

from bipft_jax.checkpoints.source import Source
from bipft_jax.data.glue.labels import are_numbers, outputs_of_classes
from bipft_jax.data.glue.own_tasks import task_of_run
from bipft_jax.data.glue.tasks import GlueTask
from bipft_jax.objectives.classification import classification


def require_number_of_outputs(source: Source, task: GlueTask) -> None:
    """Raises ValueError unless a model has as many outputs as the task needs."""
    if source.objective != classification(task.num_outputs):
        outputs = source.objective.outputs
        has = f"{outputs} outputs" if outputs else "pretraining heads"
        raise ValueError(
            f"{source.workdir} has {has}, task {task.name} needs {task.num_outputs} outputs: "
            "give a model that was finetuned on this task"
        )


def require_outputs(source: Source, task: GlueTask) -> None:
    """Raises ValueError if a model has another number of outputs than the task, or the task's
    classes in another order; of a model that was finetuned here, also for other classes. An
    imported model may name its classes in words of its own."""
    require_number_of_outputs(source, task)
    trained = task_of_run(source.run)
    if trained:
        names = trained.label_names or ()
        same = trained.label_names == task.label_names
    else:
        names = source.run.get("labels") or ()
        order = outputs_of_classes(task, names)
        same = order is None or order == sorted(order)
    if not same:
        raise ValueError(
            f"{source.workdir} has the labels in the order {', '.join(names)}, task {task.name} "
            f"in the order {', '.join(task.label_names)}: its logits would mean other classes"
        )


def class_outputs(source: Source, task: GlueTask) -> list[int]:
    """The index of the model's output for each class of the task, in the task's order. Warns if the
    order is a guess: the outputs of an imported model may have numbers instead of names.

    Raises: ValueError if the names of the model's outputs are not those of the task's classes.
    """
    if task.is_regression or source.run.get("task"):  # trained here, so in the task's order
        return list(range(task.num_outputs))
    names = source.run.get("labels") or [str(number) for number in range(task.num_outputs)]
    order = outputs_of_classes(task, names)
    if order is None:
        raise ValueError(
            f"{source.workdir} answers with {', '.join(names)}, task {task.name} has "
            f"{' or '.join(', '.join(row) for row in task.spellings)}: give the task that it was "
            "trained on, or import it again with these names as id2label of its config.json"
        )
    if are_numbers(task, names):
        logging.warning(
            "the outputs of %s have only numbers: they are taken for %s",
            source.workdir,
            ", ".join(f"{order[i]} = {row[-1]}" for i, row in enumerate(zip(*task.spellings))),
        )
    return order


def has_classifier_of(source: Source, task: GlueTask) -> bool:
    """Whether a checkpoint's classifier was trained on the task: by a run on the task, or imported
    with the task's labels in the task's order. An equal width or numbered labels do not suffice."""
    if "task" in source.run:
        trained = task_of_run(source.run)
        return trained is not None and _asked(trained) == _asked(task)
    labels = [label.lower() for label in source.run.get("labels", [])]
    named = [list(names or ()) for names in (task.label_names, task.tfds_label_names)]
    return (
        source.objective == classification(task.num_outputs)
        and labels in named
        and not any(label.isdecimal() for label in labels)
    )


def _asked(task: GlueTask) -> tuple[Any, ...]:
    """What decides the meaning of the outputs; epochs and metrics do not."""
    return task.name, task.sentences, task.label_names, task.score_range
