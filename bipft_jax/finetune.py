"""Finetuning on a GLUE task, from a checkpoint to scores. Read it top to bottom.

Every seed runs in WORKDIR/seed_N, after the earlier stages of `bipft_jax/stages.py`: create or
restore the state, then run `training/loop.py`, which documents the order of updates, telemetry, dev
evaluation and checkpoints. The task's selection metric selects the best checkpoint. A finished seed
has a result.json and does not run again; WORKDIR/result.json has all seeds, the majority-class
baseline and the settings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from bipft_jax.checkpoints.manager import Checkpointer
from bipft_jax.checkpoints.source import Source, checkpoint_description, load_input, load_source
from bipft_jax.checkpoints.workdir import (
    Inputs,
    absolute,
    check_workdir,
    claim_workdir,
    owned,
    recorded_inputs,
    write_json,
)
from bipft_jax.config_keys import check_keys
from bipft_jax.data.glue import batches as glue_batches
from bipft_jax.data.glue import metrics as glue_metrics
from bipft_jax.data.glue import own_tasks
from bipft_jax.data.glue import tasks as glue
from bipft_jax.models.recipes import recipe_named
from bipft_jax.objectives.task_distillation import DISTILLATIONS
from bipft_jax.processes import interruption, is_first, say
from bipft_jax.reports.results import RESULT_NAME, of_seed, read_result, summarise, table
from bipft_jax.stages import Stage, make_stages, make_teacher
from bipft_jax.training import loop, sharding
from bipft_jax.training.evaluation import named_by_split, task_scores
from bipft_jax.training.initial_state import first_state, restored
from bipft_jax.training.loop import Course
from bipft_jax.training.state import TrainState
from bipft_jax.training.task_outputs import has_classifier_of


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's training split and dev splits, encoded; the first dev split selects the checkpoint.

    baseline: scores of the majority class, named as by `named_by_split`. fingerprints: of the
    splits.
    """

    task: glue.GlueTask
    train: glue_batches.EncodedSplit
    dev: dict[str, glue_batches.EncodedSplit]
    baseline: dict[str, float]
    fingerprints: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that all seeds share.

    source, teacher: the checkpoints that the first stage starts from and learns from. inputs:
    identities of these and of the task's files. total: updates of one seed in every stage. stage:
    the last one.
    """

    config: ml_collections.ConfigDict
    data: TaskData
    source: Source
    teacher: Source | None
    inputs: Inputs
    total: int
    mesh: jax.sharding.Mesh
    stage: Stage


def train(
    config: ml_collections.ConfigDict, workdir: str, begun: Inputs | None = None
) -> dict[str, Any]:
    """Finetunes once per seed and prints a table; resumes a stopped run.

    Arguments:
      config: of `configs/finetune.py`.
      workdir: receives config.json, inputs.json, result.json and a directory per seed.
      begun: recorded inputs of the larger run that this run is a part of.

    Returns: the contents of result.json.

    Raises: ValueError that says what to change, for a task, file, checkpoint or config that does
      not fit or differs from that of the resumed run, or a workdir that another job uses;
      FloatingPointError once losses or gradients stay non-finite; SystemExit (0) after SIGTERM,
      once the state is saved.
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
    with interruption(), sharding.on(run.mesh):
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
      begun: recorded inputs of a resumed run, which fix the checkpoints; empty for a new run.

    Raises: ValueError for a missing directory, incompatible keys, texts with more tokens than the
      model has positions, or a batch that does not split.
    """
    task = own_tasks.task_named(config.task, config.glue_dir)
    check_together(config, task)
    source = load_input(config.init_from, "init_from", begun)
    inputs = {"init_from": source.identity}
    if not has_classifier_of(source, task):
        source = source.without_classifier()
    data = load_task(
        task, config.glue_dir, source.tokenizer, config.max_length, config.length_buckets
    )
    inputs["glue_dir"] = data.fingerprints | own_tasks.fingerprint(task)
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
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.tensor)
    sharding.check_batch_size(config.batch_size, config.accumulation, mesh)
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
        total=total,
        mesh=mesh,
        stage=make_stages(config, task, source, task_teacher, total, mesh),
    )


def check_together(config: ml_collections.ConfigDict, task: glue.GlueTask) -> None:
    """Raises ValueError, before anything is loaded, for an empty directory key, switches that a
    recipe does not have, or a key that would have no effect beside the others."""
    for key in ("init_from", "glue_dir"):
        if not config[key]:
            raise ValueError(f"{key} is empty: give --config.{key}=DIR (see configs/finetune.py)")
    for recipe in (*config.intermediate_recipes, config.recipe):
        recipe_named(recipe, config.estimator_rank, config.lora_rank, config.full_precision_weights)
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
    if config.distillation == "direction_matching" and config.accumulation > 1:
        raise ValueError(
            "direction_matching compares norms over the whole batch, which micro-batches do not "
            "have: leave accumulation at 1"
        )
    if config.optimizer == "adamw" and config.scale_learning_rate:
        raise ValueError("adamw has one learning rate: leave scale_learning_rate at 0")
    if config.optimizer == "bert_adam" and config.clip_norm:
        raise ValueError("bert_adam clips every tensor to norm 1: leave clip_norm at 0")


def load_task(
    task: glue.GlueTask, glue_dir: str, tokenizer, max_length: int, length_buckets: int
) -> TaskData:
    """Reads and encodes a task's files. All splits share the same `length_buckets` padded lengths,
    each of which is compiled once."""
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
    return TaskData(task, encoded.pop("train"), encoded, named_by_split(baseline), fingerprints)


def finetune_seed(run: Run, stage: Stage, workdir: Path, seed: int) -> dict[str, Any]:
    """Runs a stage of one seed in WORKDIR/seed_N or WORKDIR/stage_I_RECIPE/seed_N, after the
    earlier stages. Returns its result, read from result.json if the stage is finished."""
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
    learner, metric = stage.learner, run.data.task.selection_metric
    with Checkpointer(directory, keep_every=0, best_metric=metric, best_mode="max") as checkpointer:
        state = restored(learner, checkpointer, run.source.tokenizer)
        state = begin(run, stage, start, seed) if state is None else state
        teacher_params = sharding.put(run.mesh, teacher.params if teacher else None)
        course = course_of(run, stage, directory, seed)
        loop.run(learner, course, checkpointer, state, teacher_params)
        result = {**of_seed(seed, run.total, checkpointer), "intermediate": intermediate}
        if is_first():
            write_json(finished, result)
        checkpointer.keep_parameters({result["best_update"], run.total})
    return result


def begin(run: Run, stage: Stage, start: Source | None, seed: int) -> TrainState:
    """The state before the first update: the checkpoint's parameters (random ones for the baseline
    without pretraining), a new classifier unless the checkpoint has one, and missing scales
    calibrated on a batch that is not grouped by length."""
    lengths = run.data.train.padded_lengths[-1:]
    ungrouped = dataclasses.replace(run.data.train, padded_lengths=lengths)
    batch = next(glue_batches.train_batches(ungrouped, run.config.batch_size, seed, 1))
    return first_state(stage.learner, seed, sharding.put_batch(run.mesh, batch), start)


def batches(run: Run, seed: int, first: int, last: int) -> Iterator[dict[str, jax.Array]]:
    """The batches of the updates `first` to `last` - 1, on the devices."""
    size = run.config.batch_size
    for batch in glue_batches.train_batches(run.data.train, size, seed, run.total, first):
        yield sharding.put_batch(run.mesh, batch)


def course_of(run: Run, stage: Stage, directory: Path, seed: int) -> Course:
    """The arguments of the loop for a seed."""
    config, data, learner = run.config, run.data, stage.learner
    size, examples = config.batch_size, len(data.train)
    evaluated = _evaluation_steps(config, examples, run.total)
    record = {**config.to_dict(), **own_tasks.task_record(data.task)}
    description = checkpoint_description(learner.model.config, learner.objective, record)
    return Course(
        config=config,
        directory=directory,
        label=stage.label,
        held_out="dev",
        num_updates=run.total,
        seed=seed,
        batches=functools.partial(batches, run, seed),
        rates={"sequences_per_second": size},
        checkpoint_items={"config": description, "tokenizer": run.source.tokenizer.to_dict()},
        evaluates_at=evaluated.__contains__,
        evaluate=lambda params, update: task_scores(
            stage.predict, params, data.task, data.dev, size, run.mesh
        ),
        dropout=lambda update: (
            not (
                config.dropout_until_evaluation
                and evaluated_in_epoch(update, evaluated, examples, size)
            )
        ),
        describe_batch=lambda update: f"epoch {update * size // examples + 1} of seed {seed}",
        after_divergence="Try a lower learning_rate",
    )


def _evaluation_steps(config, examples: int, total: int) -> set[int]:
    """Updates after which to evaluate: the last one, and the last of every epoch or every n-th."""
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
    """Whether the epoch of update `step` (0-based) has been evaluated before it: BiBERT's reference
    then disables the student's dropout until the end of the epoch (SPEC 6, quirk 28).

    An update belongs to the epoch of its batch's first example. An evaluation after an epoch's last
    update does not count.
    """
    epoch = step * batch_size // examples
    first = glue_batches.updates_for_epochs(examples, batch_size, epoch)
    return any(first < at <= step for at in evaluated)
