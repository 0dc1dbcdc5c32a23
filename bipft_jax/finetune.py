"""Finetuning on a GLUE task: the loop from a checkpoint and a task to scores, read top to bottom.

For each seed, in WORKDIR/seed_N: make or restore the state, then for every update: next batch,
step; every `log_every` updates telemetry; every epoch (or `evaluate_every` updates) the dev scores
and a checkpoint, the best by the task's selection metric. A finished seed leaves result.json and is
not run again; WORKDIR/result.json has all seeds, the majority-class baseline and the settings.

With `intermediate_recipes` (BiT's progressive distillation, SPEC 3) each seed has several stages:
WORKDIR/stage_1_RECIPE/seed_N and so on come first, each the start and the teacher of the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from bipft_jax.config_keys import check_keys
from bipft_jax.data import glue, glue_batches, glue_metrics
from bipft_jax.models.bert import BertForSequenceClassification
from bipft_jax.models.recipes import recipe_named
from bipft_jax.predict import outputs, require_outputs
from bipft_jax.results import RESULT_NAME, read_result, summarise, table
from bipft_jax.training import sharding
from bipft_jax.training import state as states
from bipft_jax.training import step as steps
from bipft_jax.training.checkpoints import Checkpointer, verify_tokenizer
from bipft_jax.training.optimizer import adamw, bert_adam, linear_schedule
from bipft_jax.training.processes import interruption, is_first, say
from bipft_jax.training.state import TrainState
from bipft_jax.training.task_distillation import (
    DISTILLATIONS,
    Distillation,
    TaskTeacher,
    bit_distillation_of_scores,
)
from bipft_jax.training.telemetry import Telemetry, ThroughputMeter
from bipft_jax.training.warm_start import (
    Source,
    abstract_params,
    checkpoint_description,
    load_input,
    load_source,
    require_initialised_scales,
    warm_started,
)
from bipft_jax.training.workdir import (
    Inputs,
    absolute,
    check_workdir,
    claim_workdir,
    owned,
    recorded_inputs,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's training split and dev splits, encoded; the first dev split selects.

    baseline: scores of the majority class, by name as `evaluate`'s. fingerprints: of the splits.
    """

    task: glue.GlueTask
    train: glue_batches.EncodedSplit
    dev: dict[str, glue_batches.EncodedSplit]
    baseline: dict[str, float]
    fingerprints: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The finetuning of one recipe.

    before: the stage whose best checkpoint is this one's start and teacher; None of the first.
    directory: that of its seeds, in WORKDIR: "" of the last stage.
    label: what its progress lines begin with.
    update, predict: the jitted steps, compiled once for all seeds.
    """

    before: Stage | None
    directory: str
    label: str
    model: BertForSequenceClassification
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    predict: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Run:
    """What all seeds of a run share.

    source, teacher: what the first stage starts from and learns from. inputs: what these and the
    task's files are. total: updates of one seed, in every stage. schedule: learning rate by update.
    stage: the last one.
    """

    config: ml_collections.ConfigDict
    data: TaskData
    source: Source
    teacher: Source | None
    inputs: Inputs
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    total: int
    mesh: jax.sharding.Mesh
    stage: Stage


def train(
    config: ml_collections.ConfigDict, workdir: str, begun: Inputs | None = None
) -> dict[str, Any]:
    """Finetunes once per seed and prints a table; goes on where a stopped run was.

    Arguments:
      config: of `configs/finetune.py`.
      workdir: receives config.json, inputs.json, result.json and a directory for each seed.
      begun: inputs of a larger run that this is a part of, which has begun with them.

    Returns: what result.json holds.

    Raises: ValueError with what to change, for a task, file, checkpoint or config that does not
      fit or is not what the run was begun with, or a workdir that another job has;
      FloatingPointError when losses or gradients are no longer finite; SystemExit (0) after
      SIGTERM, when the state has been saved.
    """
    check_keys(config, "finetune")
    workdir = str(absolute(workdir))
    check_workdir(workdir, config.to_dict())
    with owned(workdir):
        run = make_run(config, {**(begun or {}), **recorded_inputs(workdir)})
        claim_workdir(workdir, config.to_dict(), run.inputs)
        return _all_seeds(run, workdir)


def _all_seeds(run: Run, workdir: str) -> dict[str, Any]:
    config, results = run.config, []
    if config.pretrained:
        head = "its classifier" if "classifier" in run.source.params else "a new classifier"
        say(f"starting from {run.source.described()}, with {head}")
    with interruption():
        for seed in config.seeds:
            results.append(finetune_seed(run, run.stage, Path(workdir), seed))
            if len(results) < len(config.seeds):
                scores = ", ".join(f"{k} {100 * v:.1f}" for k, v in results[-1]["best"].items())
                say(f"{run.data.task.name}, seed {seed}: {scores}")
    summary = summarise(config, run.data.task, run.data.baseline, results)
    if is_first():
        write_json(Path(workdir) / RESULT_NAME, summary)
    say(table(summary))
    return summary


def make_run(config: ml_collections.ConfigDict, begun: Inputs) -> Run:
    """Loads checkpoint and task, and builds models, optimiser and mesh.

    Arguments:
      begun: the inputs that the run was begun with, empty for a new one: checkpoints are the same.

    Raises: ValueError for a missing directory, keys that do not go together, texts longer than the
      model has positions for, or a batch that does not split.
    """
    task = glue.glue_task(config.task)
    check_together(config, task)
    source = load_input(config.init_from, "init_from", begun)
    inputs = {"init_from": source.identity}
    if not has_classifier_of(source, task):
        source = source.without_classifier()
    data = load_task(
        task, config.glue_dir, source.tokenizer, config.max_length, config.length_buckets
    )
    inputs["glue_dir"] = data.fingerprints
    longest, positions = data.train.padded_lengths[-1], source.architecture["max_positions"]
    if longest > positions:
        raise ValueError(
            f"max_length is {config.max_length} and the longest example has {longest} tokens, but "
            f"{source.workdir} has {positions} positions: give --config.max_length={positions}"
        )
    total = glue_batches.updates_for_epochs(
        len(data.train), config.batch_size, config.epochs or task.epochs
    )
    total = min(total, config.max_updates) if config.max_updates else total
    schedule, optimizer = make_optimizer(config, total)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.batch_size, 1, mesh)
    teacher = task_teacher = None
    if config.distillation:
        teacher = load_input(config.teacher, "teacher", begun)
        inputs["teacher"] = teacher.identity
        task_teacher = make_teacher(config, task, source, teacher)
    return Run(
        config=config,
        data=data,
        source=source,
        teacher=teacher,
        inputs=inputs,
        optimizer=optimizer,
        schedule=schedule,
        total=total,
        mesh=mesh,
        stage=make_stages(config, task, source, task_teacher, optimizer, mesh),
    )


def make_stages(
    config: ml_collections.ConfigDict,
    task: glue.GlueTask,
    source: Source,
    teacher: TaskTeacher | None,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> Stage:
    """The last stage, linked to those of the intermediate recipes before it.

    source, teacher: the first stage's.

    Raises: ValueError for a checkpoint that is not one for the first stage.
    """
    recipes = (*config.intermediate_recipes, config.recipe)
    stage = None
    for number, recipe in enumerate(recipes, start=1):
        model_config = dataclasses.replace(
            source.config(
                dropout=config.dropout,
                dtype=config.dtype,
                compute=config.compute,
                backward=config.backward,
            ),
            recipe=recipe_named(
                recipe, config.estimator_rank, config.lora_rank, config.full_precision_weights
            ),
        )
        if stage is None and config.pretrained:  # on shapes only: is the checkpoint one for it?
            shapes = abstract_params(model_config, task.num_outputs)
            warm_started(shapes, model_config, task.num_outputs, source)
        model = BertForSequenceClassification(model_config, task.num_outputs)
        update = steps.finetuning_step(model, optimizer, teacher)
        several = f" stage {number}/{len(recipes)} {recipe}" if len(recipes) > 1 else ""
        stage = Stage(
            before=stage,
            directory=f"stage_{number}_{recipe}" if number < len(recipes) else "",
            label=task.name + several,
            model=model,
            update=jax.jit(update, donate_argnums=0, static_argnames="dropout"),
            predict=jax.jit(steps.prediction_step(model), out_shardings=sharding.replicated(mesh)),
        )
        teacher = dataclasses.replace(teacher, model=model) if teacher else None
    return stage


def check_together(config: ml_collections.ConfigDict, task: glue.GlueTask) -> None:
    """Raises ValueError, before anything is loaded, for a directory that is not given, switches
    that a recipe does not have, or a key that would be ignored beside the others."""
    for key in ("init_from", "glue_dir"):
        if not config[key]:
            raise ValueError(f"{key} is empty: give --config.{key}=DIR (see configs/finetune.py)")
    for recipe in (*config.intermediate_recipes, config.recipe):
        recipe_named(
            recipe, config.estimator_rank, config.lora_rank, config.full_precision_weights
        )
    if bool(config.teacher) != bool(config.distillation):
        raise ValueError(
            "distillation needs both --config.teacher=DIR, a finetuning run's seed_N directory, "
            f"and --config.distillation, one of {', '.join(DISTILLATIONS)}"
        )
    if config.intermediate_recipes and not config.teacher:
        raise ValueError(
            "intermediate_recipes are stages of distillation: give --config.teacher=DIR and "
            "--config.distillation too, or leave intermediate_recipes empty"
        )
    if config.score_mse and not (config.distillation == "bit" and task.is_regression):
        raise ValueError(
            f"score_mse is for distillation 'bit' on a task of scores, not for distillation "
            f"{config.distillation!r} on task {task.name}: leave it at False"
        )
    if config.dropout_until_evaluation and not config.evaluate_every:
        raise ValueError(
            "dropout_until_evaluation has no effect without evaluations within an epoch: give "
            "--config.evaluate_every"
        )
    if config.optimizer == "adamw" and config.scale_learning_rate:
        raise ValueError("adamw has one learning rate: leave scale_learning_rate at 0")
    if config.optimizer == "bert_adam" and config.clip_norm:
        raise ValueError("bert_adam clips every tensor to norm 1: leave clip_norm at 0")


def make_optimizer(config, total: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate by update, and the optimiser, for a run of `total` updates."""

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


def distillation_of(config: ml_collections.ConfigDict) -> Distillation:
    """What the student learns from its teacher."""
    return bit_distillation_of_scores if config.score_mse else DISTILLATIONS[config.distillation]


def has_classifier_of(source: Source, task: glue.GlueTask) -> bool:
    """Whether a checkpoint's classifier, if it has one, is one of the task and not only as wide: of
    a run on the task, or imported with the task's labels in its order. Numbers name no labels."""
    if "task" in source.run:
        return source.run["task"] == task.name
    labels = [label.lower() for label in source.run.get("labels", [])]
    named = [list(names or ()) for names in (task.label_names, task.tfds_label_names)]
    return (
        source.classes == task.num_outputs
        and labels in named
        and not any(label.isdecimal() for label in labels)
    )


def make_teacher(
    config: ml_collections.ConfigDict, task: glue.GlueTask, student: Source, source: Source
) -> TaskTeacher:
    """The finetuned teacher of a checkpoint.

    Raises: ValueError for a teacher of another task, with another number of outputs or another
      tokenizer, or one whose hidden states cannot be compared.
    """
    verify_tokenizer(source.tokenizer.to_dict(), student.tokenizer)
    if source.run.get("task", task.name) != task.name:
        raise ValueError(
            f"the teacher {config.teacher} was finetuned on {source.run['task']}, not on "
            f"{task.name}"
        )
    require_outputs(source, task)
    compared = ("layers", "hidden", "heads")  # the last by direction matching's relations only
    for name in compared if config.distillation == "direction_matching" else compared[:2]:
        theirs, ours = source.architecture[name], student.architecture[name]
        if theirs != ours:
            raise ValueError(f"the teacher has {name} {theirs}, the student {ours}: must be equal")
    # Those of an imported model, whose directory may name them.
    labels, ours = source.run.get("labels", []), list(task.label_names or ())
    if labels != ours and sorted(labels) == sorted(ours):
        raise ValueError(
            f"the teacher {config.teacher} has the labels in the order {', '.join(labels)}, task "
            f"{task.name} in the order {', '.join(ours)}: its logits would mean other classes"
        )
    require_initialised_scales(source)
    model_config = source.config(dropout=config.dropout, dtype=config.dtype, compute=config.compute)
    model = BertForSequenceClassification(model_config, source.classes)
    return TaskTeacher(model, distillation_of(config), config.teacher_dropout)


def load_task(
    task: glue.GlueTask, glue_dir: str, tokenizer, max_length: int, length_buckets: int
) -> TaskData:
    """Reads and encodes a task's files; all splits get the same `length_buckets` padded lengths, so
    one compilation for each."""
    names = ("train", *glue.dev_splits(task, glue_dir))
    splits = {name: glue.read_split(task, glue_dir, name) for name in names}
    encoded = {
        name: glue_batches.encode(split, tokenizer, max_length) for name, split in splits.items()
    }
    fingerprints = {name: split.fingerprint for name, split in splits.items()}
    longest = max(split.padded_lengths[-1] for split in encoded.values())
    lengths = glue_batches.padded_lengths(longest, length_buckets)
    encoded = {
        name: dataclasses.replace(split, padded_lengths=lengths) for name, split in encoded.items()
    }
    train_split = splits.pop("train")
    baseline = {name: glue_metrics.baseline(train_split, dev) for name, dev in splits.items()}
    return TaskData(task, encoded.pop("train"), encoded, _scores(baseline), fingerprints)


def finetune_seed(run: Run, stage: Stage, workdir: Path, seed: int) -> dict[str, Any]:
    """One seed's run of a stage, in WORKDIR/seed_N or WORKDIR/stage_I_RECIPE/seed_N, after the
    stages before it; returns its result, read back if it is finished."""
    directory = workdir / stage.directory / f"seed_{seed}"
    finished = directory / RESULT_NAME
    if finished.exists():
        return read_result(finished)
    if stage.before is None:
        start, teacher = run.source if run.config.pretrained else None, run.teacher
        intermediate = {}
    else:
        before = finetune_seed(run, stage.before, workdir, seed)
        start = teacher = load_source(workdir / stage.before.directory / f"seed_{seed}")
        intermediate = {**before["intermediate"], stage.before.directory: before["best"]}
    metric = run.data.task.selection_metric
    with Checkpointer(directory, keep_every=0, best_metric=metric, best_mode="max") as checkpointer:
        shapes = abstract_params(stage.model.config, stage.model.classes)
        abstract = sharding.placed(run.mesh, states.abstract_state(shapes, run.optimizer))
        restored = checkpointer.restore_latest(abstract, tokenizer=run.source.tokenizer)
        state = first_state(run, stage, start, seed) if restored is None else restored[0]
        _loop(run, stage, teacher, directory, seed, checkpointer, state)
        best = checkpointer.best_step()
        result = {
            "seed": seed,
            "updates": run.total,
            "best_update": best,
            "best": checkpointer.metrics(best),
            "last": checkpointer.metrics(run.total),
            "intermediate": intermediate,
        }
        if is_first():
            write_json(finished, result)
        checkpointer.keep_parameters({best, run.total})
    return result


def first_state(run: Run, stage: Stage, start: Source | None, seed: int) -> TrainState:
    """The state before the first update: the checkpoint's parameters (or random ones, for the
    baseline that was not pretrained), a new classifier unless the checkpoint has one, scales that
    were missing calibrated, on a batch of any lengths."""
    lengths = run.data.train.padded_lengths[-1:]
    ungrouped = dataclasses.replace(run.data.train, padded_lengths=lengths)
    batch = next(glue_batches.train_batches(ungrouped, run.config.batch_size, seed, 1))
    inputs = [jnp.asarray(batch[name]) for name in steps.SEQUENCE_INPUTS]
    one = [x[:1] for x in inputs]
    params = states.initial_params(stage.model, jax.random.key(seed), *one)
    if start is not None:
        params = warm_started(params, stage.model.config, stage.model.classes, start)
    params = states.calibrate(stage.model, params, *inputs)
    return sharding.put(run.mesh, states.new_state(params, run.optimizer))


def _loop(
    run: Run,
    stage: Stage,
    teacher: Source | None,
    directory: Path,
    seed: int,
    checkpointer: Checkpointer,
    state: TrainState,
) -> None:
    config, data, model, total = run.config, run.data, stage.model, run.total
    meter = ThroughputMeter(total_steps=total, per_step={"sequences_per_second": config.batch_size})
    evaluated = _evaluation_steps(config, len(data.train), total)
    description = checkpoint_description(model.config, model.classes, config.to_dict())
    tokenizer = run.source.tokenizer.to_dict()
    teacher_params = sharding.put(run.mesh, teacher.params if teacher else None)
    # On the devices once, not anew for every update.
    device_seed = jax.device_put(np.int32(seed), sharding.replicated(run.mesh))
    start = step = int(state.step)
    batches = glue_batches.train_batches(data.train, config.batch_size, seed, total, start)
    unread: list[dict[str, jax.Array]] = []  # metrics since the last log point
    with (
        Telemetry(directory, name=stage.label, start_step=start, total_steps=total) as telemetry,
        interruption() as interrupted,
    ):

        def save(metrics: dict[str, float] | None = None) -> None:
            states.require_finite(state.params)
            checkpointer.save(step, state, config=description, tokenizer=tokenizer, metrics=metrics)

        for batch in batches:
            dropout = not config.dropout_until_evaluation or not evaluated_in_epoch(
                step, evaluated, len(data.train), config.batch_size
            )
            rows = sharding.put_batch(run.mesh, batch)
            state, metrics = stage.update(state, teacher_params, device_seed, rows, dropout=dropout)
            step += 1
            unread.append(metrics)
            if step == start + 1:
                jax.block_until_ready(state.step)
                meter.restart(step)
            stopping = interrupted.requested() and step < total
            if step % config.log_every == 0 or step == total or stopping:
                read = jax.device_get(unread)
                sums = {name: sum(np.float64(m[name]) for m in read) for name in metrics}
                values = steps.mean_metrics(sums, len(read))
                values["learning_rate"] = run.schedule(step - 1)
                telemetry.log(step, {**values, **meter.rates(step)})
                unread = []
                _require_updates(int(state.skipped_in_row), step, config)
            if step in evaluated:
                jax.block_until_ready(state.step)
                meter.rates(step)  # up to here it was training
                scores = evaluate(stage.predict, state.params, data, config.batch_size, run.mesh)
                telemetry.log(step, scores, split="dev")
                save(scores)
                meter.restart(step)
            if stopping:
                interrupted.stop(step, checkpointer, save)


def _require_updates(skipped_in_row: int, step: int, config) -> None:
    if skipped_in_row >= config.max_skipped_updates:
        raise FloatingPointError(
            f"{skipped_in_row} updates in a row were skipped, up to update {step}: their loss or "
            "gradient is not finite. Try a lower learning_rate"
        )


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


def evaluated_in_epoch(step: int, evaluated: set[int], examples: int, batch_size: int) -> bool:
    """Whether an epoch has had an evaluation before its update `step` (0-based): from there to its
    end BiBERT's reference leaves the student without dropout (SPEC 6, quirk 28).

    An update belongs to the epoch of its batch's first example. An evaluation after an epoch's last
    update does not count.
    """
    epoch = step * batch_size // examples
    first = glue_batches.updates_for_epochs(examples, batch_size, epoch)
    return any(first < at <= step for at in evaluated)


def evaluate(predict, params, data: TaskData, batch_size: int, mesh) -> dict[str, float]:
    """Scores on every dev split; those of further splits are named METRIC_SPLIT."""
    return _scores(
        {
            name: glue_metrics.evaluate(
                data.task, outputs(predict, params, split, batch_size, mesh), split.labels
            )
            for name, split in data.dev.items()
        }
    )


def _scores(by_split: dict[str, dict[str, float]]) -> dict[str, float]:
    first, *others = by_split
    further = {f"{key}_{name}": v for name in others for key, v in by_split[name].items()}
    return by_split[first] | further
