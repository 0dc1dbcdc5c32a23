"""Finetuning on a GLUE task: the loop from a checkpoint and a task to scores, read top to bottom.

For each seed, in WORKDIR/seed_N: make or restore the state, then for every update: next batch,
step; every `log_every` updates telemetry; every epoch (or `evaluate_every` updates) the dev scores
and a checkpoint, the best by the task's selection metric. A finished seed leaves result.json and is
not run again; WORKDIR/result.json has all seeds, the majority-class baseline and the settings.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from bipft_jax.data import glue, glue_batches, glue_metrics
from bipft_jax.errors import unknown_name
from bipft_jax.models.bert import BertForSequenceClassification
from bipft_jax.models.recipes import BertConfig, architecture, recipe_named
from bipft_jax.training import sharding
from bipft_jax.training import state as states
from bipft_jax.training import step as steps
from bipft_jax.training.checkpoints import Checkpointer, verify_tokenizer
from bipft_jax.training.flops import update_flops
from bipft_jax.training.optimizer import adamw, bert_adam, linear_schedule
from bipft_jax.training.state import Params, TrainState
from bipft_jax.training.task_distillation import DISTILLATIONS, TaskTeacher
from bipft_jax.training.telemetry import Telemetry, ThroughputMeter
from bipft_jax.training.warm_start import (
    Source,
    abstract_params,
    checkpoint_description,
    load_source,
    warm_started,
)
from bipft_jax.training.workdir import check_workdir, claim_workdir, write_atomically

RESULT_NAME = "result.json"


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's training split and dev splits, encoded; the first dev split selects."""

    task: glue.GlueTask
    train: glue_batches.EncodedSplit
    dev: dict[str, glue_batches.EncodedSplit]
    baseline: dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What all seeds of a run share.

    total: updates of one seed. schedule: learning rate by update. teacher_params: on the devices,
    None without a teacher. update, predict: the jitted steps, compiled once for all seeds.
    """

    config: ml_collections.ConfigDict
    data: TaskData
    source: Source
    model: BertForSequenceClassification
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    total: int
    mesh: jax.sharding.Mesh
    teacher_params: Params | None
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    predict: Callable[..., jax.Array]


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Finetunes once per seed and prints a table; goes on where a stopped run was.

    Arguments:
      config: of `configs/finetune.py`.
      workdir: receives result.json and a directory for each seed.

    Returns: what result.json holds.

    Raises: ValueError with what to change, for a task, file, checkpoint or config that does not
      fit.
    """
    check_workdir(workdir, config.to_dict())
    run = make_run(config)
    claim_workdir(workdir, config.to_dict())
    results = [finetune_seed(run, Path(workdir) / f"seed_{seed}", seed) for seed in config.seeds]
    summary = summarise(config, run.data, results)
    if jax.process_index() == 0:
        _write_json(Path(workdir) / RESULT_NAME, summary)
    print(table(summary))
    return summary


def make_run(config: ml_collections.ConfigDict) -> Run:
    """Loads checkpoint and task, and builds model, optimiser and mesh.

    Raises: ValueError for a missing directory, an unknown name, or a batch that does not split.
    """
    task = glue.glue_task(config.task)
    for key in ("init_from", "glue_dir"):
        if not config[key]:
            raise ValueError(f"{key} is empty: give --config.{key}=DIR (see configs/finetune.py)")
    source = load_source(config.init_from)
    data = load_task(task, config.glue_dir, source.tokenizer, config.max_length)
    total = glue_batches.updates_for_epochs(
        len(data.train), config.batch_size, config.epochs or task.epochs
    )
    total = min(total, config.max_updates) if config.max_updates else total
    schedule, optimizer = make_optimizer(config, total)
    teacher, teacher_params = load_teacher(config, task, source)
    model_config = dataclasses.replace(
        source.config(dropout=config.dropout, dtype=config.dtype, compute=config.compute),
        recipe=recipe_named(
            config.recipe,
            config.estimator_rank,
            config.lora_rank,
            config.full_precision_weights,
        ),
    )
    if config.pretrained:  # on shapes only: is the checkpoint one for this model?
        check_switches(model_config, source)
        shapes = abstract_params(model_config, task.num_outputs)
        warm_started(shapes, model_config, task.num_outputs, source)
    mesh = sharding.data_mesh()
    sharding.check_batch_size(config.batch_size, 1, mesh)
    model = BertForSequenceClassification(model_config, task.num_outputs)
    return Run(
        config=config,
        data=data,
        source=source,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        total=total,
        mesh=mesh,
        teacher_params=sharding.put_replicated(mesh, teacher_params),
        update=jax.jit(steps.finetuning_step(model, optimizer, teacher), donate_argnums=0),
        predict=jax.jit(steps.prediction_step(model), out_shardings=sharding.replicated(mesh)),
    )


def check_switches(config: BertConfig, source: Source) -> None:
    """Raises ValueError if the source is of the same recipe with other switches: finetuning would
    then drop trained parameters or binarise kernels that were not, and say nothing."""
    theirs, ours = architecture(source.config()), architecture(config)
    for name in ("estimator_rank", "lora_rank", "full_precision_weights"):
        if theirs["recipe"] == ours["recipe"] and theirs[name] != ours[name]:
            raise ValueError(
                f"{source.workdir} was trained with {name} {theirs[name]}, the config has "
                f"{ours[name]}: give --config.{name}={theirs[name]}"
            )


def make_optimizer(config, total: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate by update, and the optimiser, for a run of `total` updates.

    Raises: ValueError for an unknown schedule or optimiser, or a key that the optimiser ignores.
    """
    if config.schedule not in ("constant", "linear"):
        raise ValueError(f"schedule is {config.schedule!r}: it must be constant or linear")

    def scheduled(rate: float) -> optax.Schedule:
        if config.schedule == "constant":
            return optax.constant_schedule(rate)
        return linear_schedule(rate, total / 10, total)

    schedule = scheduled(config.learning_rate)
    if config.optimizer == "adamw":
        if config.scale_learning_rate:
            raise ValueError("adamw has one learning rate: leave scale_learning_rate at 0")
        return schedule, adamw(
            schedule, weight_decay=config.weight_decay, clip_norm=config.clip_norm
        )
    if config.optimizer != "bert_adam":
        raise unknown_name("optimizer", config.optimizer, ("adamw", "bert_adam"))
    if config.clip_norm:
        raise ValueError("bert_adam clips every tensor to norm 1: leave clip_norm at 0")
    return schedule, bert_adam(
        schedule,
        scale_schedule=scheduled(config.scale_learning_rate or config.learning_rate),
        weight_decay=config.weight_decay,
    )


def load_teacher(
    config: ml_collections.ConfigDict, task: glue.GlueTask, student: Source
) -> tuple[TaskTeacher | None, Params | None]:
    """The finetuned teacher that the config names, if any, and its parameters.

    Raises: ValueError for a teacher without a distillation or the reverse, an unknown one, a
      teacher with another number of outputs or another tokenizer, or one whose hidden states cannot
      be compared.
    """
    if bool(config.teacher) != bool(config.distillation):
        raise ValueError(
            "distillation needs both --config.teacher=DIR, a finetuning run's seed_N directory, "
            f"and --config.distillation, one of {', '.join(DISTILLATIONS)}"
        )
    if not config.teacher:
        return None, None
    if config.distillation not in DISTILLATIONS:
        raise unknown_name("distillation", config.distillation, DISTILLATIONS)
    source = load_source(config.teacher)
    verify_tokenizer(source.tokenizer.to_dict(), student.tokenizer)
    if source.classes != task.num_outputs:
        found = f"{source.classes} outputs" if source.classes else "pretraining heads"
        raise ValueError(
            f"the teacher {config.teacher} has {found}, task {task.name} needs {task.num_outputs} "
            "outputs: give a model that was finetuned on this task"
        )
    for name in ("layers", "hidden"):
        theirs, ours = source.architecture[name], student.architecture[name]
        if theirs != ours:
            raise ValueError(f"the teacher has {name} {theirs}, the student {ours}: must be equal")
    model_config = source.config(dropout=config.dropout, dtype=config.dtype, compute=config.compute)
    model = BertForSequenceClassification(model_config, source.classes)
    distillation = DISTILLATIONS[config.distillation]
    return TaskTeacher(model, distillation, config.teacher_dropout), source.params


def load_task(task: glue.GlueTask, glue_dir: str, tokenizer, max_length: int) -> TaskData:
    """Reads and encodes a task's files; all splits get one padded length, so one compilation."""
    names = ("train", *glue.dev_splits(task, glue_dir))
    splits = {name: glue.read_split(task, glue_dir, name) for name in names}
    encoded = {
        name: glue_batches.encode(split, tokenizer, max_length) for name, split in splits.items()
    }
    length = max(split.sequence_length for split in encoded.values())
    encoded = {
        name: dataclasses.replace(split, sequence_length=length) for name, split in encoded.items()
    }
    train_split = splits.pop("train")
    baseline = {name: glue_metrics.baseline(train_split, dev) for name, dev in splits.items()}
    return TaskData(task, encoded.pop("train"), encoded, baseline)


def finetune_seed(run: Run, directory: Path, seed: int) -> dict[str, Any]:
    """One finetuning run in WORKDIR/seed_N; returns its result, read back if it is finished."""
    finished = directory / RESULT_NAME
    if finished.exists():
        return json.loads(finished.read_text())
    metric = run.data.task.selection_metric
    with Checkpointer(directory, keep_every=0, best_metric=metric, best_mode="max") as checkpointer:
        shapes = abstract_params(run.model.config, run.model.classes)
        abstract = states.abstract_state(shapes, run.optimizer, sharding.replicated(run.mesh))
        restored = checkpointer.restore_latest(abstract, tokenizer=run.source.tokenizer)
        state = first_state(run, seed) if restored is None else restored[0]
        _loop(run, directory, seed, checkpointer, state)
        best = checkpointer.best_step()
        result = {
            "seed": seed,
            "updates": run.total,
            "best_update": best,
            "best": checkpointer.metrics(best),
            "last": checkpointer.metrics(run.total),
        }
    if jax.process_index() == 0:
        _write_json(finished, result)
    return result


def first_state(run: Run, seed: int) -> TrainState:
    """The state before the first update: the checkpoint's parameters (or random ones, for the
    baseline that was not pretrained), a new classifier unless the checkpoint has one, scales that
    were missing calibrated."""
    batch = next(glue_batches.train_batches(run.data.train, run.config.batch_size, seed))
    inputs = [jnp.asarray(batch[name]) for name in steps.SEQUENCE_INPUTS]
    params = states.initial_params(run.model, jax.random.key(seed), *inputs)
    if run.config.pretrained:
        params = warm_started(params, run.model.config, run.model.classes, run.source)
    params = states.calibrate(run.model, params, *inputs)
    return sharding.put_replicated(run.mesh, states.new_state(params, run.optimizer))


def _loop(
    run: Run, directory: Path, seed: int, checkpointer: Checkpointer, state: TrainState
) -> None:
    config, data, model, total = run.config, run.data, run.model, run.total
    length = data.train.sequence_length
    meter = ThroughputMeter(
        total_steps=total,
        sequences_per_step=config.batch_size,
        tokens_per_step=config.batch_size * length,
        model_flops_per_step=update_flops(model.config, config.batch_size, length, 0),
    )
    evaluated = _evaluation_steps(config, len(data.train), total)
    description = checkpoint_description(model.config, model.classes, config.to_dict())
    tokenizer = run.source.tokenizer.to_dict()
    start = step = int(state.step)
    batches = glue_batches.train_batches(data.train, config.batch_size, seed, start_update=start)
    unread: list[dict[str, jax.Array]] = []  # metrics since the last log point
    with Telemetry(directory, name=config.task, start_step=start, total_steps=total) as telemetry:
        while step < total:
            batch = _put(run.mesh, next(batches))
            state, metrics = run.update(state, run.teacher_params, seed, batch)
            step += 1
            unread.append(metrics)
            if step == start + 1:
                jax.block_until_ready(state.step)
                meter.restart(step)
            if step % config.log_every == 0 or step == total:
                read = jax.device_get(unread)
                values = {name: float(np.mean([m[name] for m in read])) for name in metrics}
                values["learning_rate"] = run.schedule(step - 1)
                telemetry.log(step, {**values, **meter.rates(step)})
                unread = []
            if step in evaluated:
                scores = evaluate(run.predict, state.params, data, config.batch_size, run.mesh)
                telemetry.log(step, scores, split="dev")
                checkpointer.save(
                    step, state, config=description, tokenizer=tokenizer, metrics=scores
                )
                meter.restart(step)


def _evaluation_steps(config, examples: int, total: int) -> set[int]:
    """Updates after which to evaluate: the last, and every epoch's last or every n-th."""
    if config.evaluate_every:
        wanted = set(range(config.evaluate_every, total, config.evaluate_every))
    else:
        epochs = total * config.batch_size // examples
        wanted = {
            glue_batches.updates_for_epochs(examples, config.batch_size, epoch)
            for epoch in range(1, epochs + 1)
        }
    return {step for step in wanted if step < total} | {total}


def evaluate(predict, params, data: TaskData, batch_size: int, mesh) -> dict[str, float]:
    """Scores on every dev split; those of further splits are named METRIC_SPLIT."""
    scores: dict[str, float] = {}
    for index, (name, split) in enumerate(data.dev.items()):
        logits, weights = [], []
        for batch in glue_batches.evaluation_batches(split, batch_size):
            logits.append(predict(params, _put(mesh, batch)))
            weights.append(batch["weights"])
        real = np.concatenate(weights) > 0
        outputs = np.concatenate(jax.device_get(logits))[real]
        found = glue_metrics.evaluate(data.task, outputs, split.labels)
        scores |= {(k if index == 0 else f"{k}_{name}"): v for k, v in found.items()}
    return scores


def summarise(
    config: ml_collections.ConfigDict, data: TaskData, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """All seeds' results with mean and standard deviation of each best score."""
    names = results[0]["best"]
    columns = {name: [r["best"][name] for r in results] for name in names}
    return {
        "task": data.task.name,
        "recipe": config.recipe,
        "pretrained": config.pretrained,
        "init_from": config.init_from,
        "selection_metric": data.task.selection_metric,
        "mean": {name: float(np.mean(column)) for name, column in columns.items()},
        "standard_deviation": {
            name: float(np.std(column, ddof=1)) if len(column) > 1 else None
            for name, column in columns.items()
        },
        "majority_class": data.baseline[next(iter(data.dev))],
        "seeds": results,
        "config": config.to_dict(),
    }


def table(summary: dict[str, Any]) -> str:
    """A summary for reading: a row for each seed, the mean, and the majority-class baseline."""
    names = list(summary["mean"])
    origin = "pretrained" if summary["pretrained"] else "not pretrained"
    rows = [
        [f"seed {r['seed']} (update {r['best_update']} of {r['updates']})", r["best"]]
        for r in summary["seeds"]
    ]
    if len(rows) > 1:
        rows.append(["mean", summary["mean"]])
        rows.append(["standard deviation", summary["standard_deviation"]])
    rows.append(["majority class", summary["majority_class"]])
    what = f"{summary['task']}, {summary['recipe']}, {origin}"
    lines = [f"{what}: best evaluation on the dev set, in percent"]
    lines.append(f"{'':34}" + "".join(f"{name:>12}" for name in names))
    for label, scores in rows:
        cells = [f"{100 * scores[n]:12.1f}" if n in scores else f"{'-':>12}" for n in names]
        lines.append(f"{label:34}" + "".join(cells))
    return "\n".join(lines)


def _put(mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Every process makes the same global batch and keeps its own rows."""
    count, index = jax.process_count(), jax.process_index()
    return sharding.put_batch(
        mesh, {name: np.array_split(rows, count)[index] for name, rows in batch.items()}
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=1) + os.linesep)
