"""Pretraining, from a corpus and a config to checkpoints. Read it top to bottom.

First it claims the workdir, loads the corpus, and creates or restores the state. Then it runs
`training/loop.py`, which documents the order of updates, telemetry, held-out evaluation and
checkpoints. At the end it writes the scores of the best and the last checkpoint to
WORKDIR/result.json. A batch, its masks and its dropout are functions of the seed and the step, so a
restarted run continues as if it had not stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from bipft_jax.checkpoints.manager import Checkpointer, verify_tokenizer
from bipft_jax.checkpoints.source import (
    Source,
    checkpoint_description,
    load_input,
    require_initialised_scales,
)
from bipft_jax.checkpoints.workdir import (
    absolute,
    check_inputs,
    check_workdir,
    claim_workdir,
    owned,
    recorded_inputs,
    write_json,
)
from bipft_jax.config_keys import check_keys
from bipft_jax.data.corpus.corpus import Corpus, load_corpus
from bipft_jax.data.corpus.pretraining import pretraining_batches
from bipft_jax.heap import keep_freed_memory
from bipft_jax.models.parameters import Params
from bipft_jax.objectives.objective import Batch, Examples, FromCorpus
from bipft_jax.objectives.table import objective_named
from bipft_jax.processes import interruption, is_first, say
from bipft_jax.reports.results import RESULT_NAME, of_pretraining, of_seed
from bipft_jax.training import loop, sharding
from bipft_jax.training.evaluation import (
    EVALUATION_ROWS,
    HeldOut,
    batch_sizes,
    held_out_metrics,
)
from bipft_jax.training.flops import update_flops
from bipft_jax.training.initial_state import first_state, restored
from bipft_jax.training.learner import Learner, Program
from bipft_jax.training.loop import Course
from bipft_jax.training.optimizer import adamw, staged
from bipft_jax.training.state import TrainState
from bipft_jax.training.step import evaluation_step

EVALUATION_SEED = 0  # held-out examples are the same for every run on a corpus

_AFTER_DIVERGENCE = (
    "The checkpoints in the workdir are from before and can be used: start a new --workdir with "
    "--config.init_from=this one and a lower learning_rate or clip_norm"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that follow from the config and the corpus; the learner has no teacher
    yet."""

    config: ml_collections.ConfigDict
    corpus: Corpus
    examples: Examples
    learner: Learner

    @property
    def from_corpus(self) -> FromCorpus:
        """The part of the objective that learns from a corpus."""
        return self.learner.objective.from_corpus


def train(config: ml_collections.ConfigDict, workdir: str) -> TrainState:
    """Pretrains a model, or resumes a stopped run.

    Arguments:
      config: of `configs/pretrain.py`.
      workdir: receives checkpoints, metrics.jsonl, TensorBoard files, config.json, inputs.json and,
        at the end, result.json.

    Returns: the final state, as it was saved.

    Raises: ValueError that says what to change, for a corpus, checkpoint, teacher, workdir or
      config that does not fit or differs from that of the resumed run, or a workdir that another
      job uses; FloatingPointError once losses or gradients stay non-finite; SystemExit (0) after
      SIGTERM, once the state is saved.
    """
    keep_freed_memory()
    check_keys(config, "pretrain")
    workdir = str(absolute(workdir))
    check_workdir(workdir, config.to_dict())
    with owned(workdir):
        run = make_run(config)
        inputs, begun = {"corpus_dir": run.corpus.identity}, recorded_inputs(workdir)
        check_inputs(workdir, inputs)
        from_corpus = run.from_corpus
        checkpointer = Checkpointer(
            workdir,
            keep_every=config.keep_every,
            best_metric=from_corpus.best_metric,
            best_mode="max" if from_corpus.higher_is_better else "min",
        )
        with interruption(), checkpointer, sharding.on(run.learner.mesh):
            teacher_params = None
            if config.teacher:
                source = load_input(config.teacher, "teacher", begun)
                inputs["teacher"] = source.identity
                verify_tokenizer(source.tokenizer.to_dict(), run.corpus.tokenizer)
                learner, teacher_params = taught(config, run.learner, source)
                teacher_params = sharding.put(learner.mesh, teacher_params)
                run = dataclasses.replace(run, learner=learner)
            state = restored(run.learner, checkpointer, run.corpus.tokenizer)
            if state is None:
                source = None
                if config.init_from:
                    source = load_input(config.init_from, "init_from", begun)
                    inputs["init_from"] = source.identity
                state = begin(run, source)
            claim_workdir(workdir, config.to_dict(), inputs)
            course = course_of(run, workdir)
            state = loop.run(run.learner, course, checkpointer, state, teacher_params)
            if is_first():
                seed = of_seed(config.seed, config.num_updates, checkpointer)
                tokens = config.num_updates * course.tokens
                result = of_pretraining(config, from_corpus, seed, tokens)
                write_json(os.path.join(workdir, RESULT_NAME), result)
            say(f"pretrained {config.num_updates} updates: {workdir}")
            return state


def make_run(config: ml_collections.ConfigDict) -> Run:
    """Loads the corpus and builds model, optimiser and mesh.

    Raises: ValueError for a missing corpus, incompatible keys, or a batch that does not split.
    """
    if not config.corpus_dir:
        raise ValueError(
            "corpus_dir is empty: give --config.corpus_dir=DIR, a directory made by "
            "python -m bipft_jax.data.corpus"
        )
    check_together(config)
    corpus = load_corpus(config.corpus_dir)
    corpus.require(config.objective)
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.tensor)
    learner = learner_of(config, corpus.tokenizer.vocab_size, mesh)
    examples = learner.objective.from_corpus.examples(corpus, "train", config.seed, config)
    return Run(config, corpus, examples, learner)


def check_together(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, before anything is loaded, for keys that do not go together."""
    if config.mlm_distillation and not config.teacher:
        raise ValueError("mlm_distillation needs a teacher: give --config.teacher=DIR")
    objective = objective_named(config.objective)
    if config.teacher and objective.from_corpus.make_teacher is None:
        raise ValueError(f"objective {objective.name} has no teacher: leave teacher empty")


def learner_of(
    config: ml_collections.ConfigDict, vocab_size: int, mesh: jax.sharding.Mesh
) -> Learner:
    """Model and optimiser on a mesh, whose devices need not be there; without a teacher.

    Raises: ValueError for incompatible keys, or a model or batch that does not split.
    """
    objective = objective_named(config.objective)
    schedule, decay = staged(
        config.learning_rate,
        config.second_peak,
        config.weight_decay,
        config.warmup_updates,
        config.num_updates,
    )
    model_config = objective.from_corpus.model_config(config, vocab_size)
    sharding.check_model(model_config, mesh)
    sharding.check_batch_size(config.batch_size, config.accumulation, mesh)
    return Learner(
        objective=objective,
        model=objective.model(model_config),
        optimizer=adamw(
            schedule,
            weight_decay=decay,
            clip_norm=config.clip_norm,
            b2=config.adam_b2,
            eps=config.adam_epsilon,
        ),
        schedule=schedule,
        mesh=mesh,
        accumulation=config.accumulation,
    )


def programs(
    config: ml_collections.ConfigDict,
    learner: Learner,
    length: int,
    teacher_params: Params | None = None,
) -> list[Program]:
    """Every program of a run, as the run dispatches them. Needs no corpus, and no devices but those
    that the mesh names.

    Not among them: the programs of the first error of a run that diverges.

    Arguments:
      length: tokens per example.
      teacher_params: shapes, dtypes and shardings, if the learner has a teacher.
    """
    from_corpus, mesh, vocabulary = (
        learner.objective.from_corpus,
        learner.mesh,
        learner.model.config.vocab_size,
    )
    batch = sharding.abstract_batch(mesh, from_corpus.example(length, config), config.batch_size)
    # Of all sequences (0) the number is the corpus's: it then has a batch of the largest size.
    sequences = config.evaluation_sequences or EVALUATION_ROWS * sharding.batch_shards(mesh)
    size = batch_sizes(sequences, mesh)[0]
    held_out = sharding.abstract_batch(mesh, from_corpus.example(length, None), size)
    evaluation = evaluation_program(learner, np.zeros(vocabulary, np.int64))
    return [
        *learner.programs(batch, teacher_params),
        Program("evaluation", evaluation, (learner.abstract_state.params, held_out)),
    ]


def begin(run: Run, source: Source | None) -> TrainState:
    """The state before the first update, from a source or from random parameters."""
    if source is not None:
        verify_tokenizer(source.tokenizer.to_dict(), run.corpus.tokenizer)
        say(f"starting from {source.described()}")
    (batch,) = batches(run, 0, 1)
    prior = run.from_corpus.prior(run.corpus) if run.config.unigram_bias else None
    return first_state(run.learner, run.config.seed, batch, source, prior)


def taught(
    config: ml_collections.ConfigDict, learner: Learner, source: Source
) -> tuple[Learner, Params]:
    """The learner with the teacher from a checkpoint, and the teacher's parameters on the host."""
    require_initialised_scales(source)
    teacher_config = source.config(
        dropout=config.dropout, dtype=config.dtype, compute=config.compute
    )
    teacher, params = learner.objective.from_corpus.make_teacher(
        teacher_config, source.params, learner.model.config, config
    )
    return dataclasses.replace(learner, teacher=teacher), params


def batches(run: Run, first: int, last: int) -> Iterator[dict[str, jax.Array]]:
    """The global batches of the updates `first` to `last` - 1, on the devices."""
    size, mesh = run.config.batch_size, run.learner.mesh
    host_batches = pretraining_batches(
        run.examples,
        size,
        start_batch=first,
        num_batches=last - first,
        rows=sharding.process_rows(mesh, size),
        num_workers=run.config.data_workers,
    )
    for batch in host_batches:
        yield sharding.put_batch(mesh, batch, size)


def evaluation_program(
    learner: Learner, unigram_counts: np.ndarray
) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """(parameters, held-out batch) -> metrics. unigram_counts: of `FromCorpus`."""
    measure = learner.objective.from_corpus.measure(unigram_counts)
    return jax.jit(evaluation_step(learner.objective, learner.model, measure))


def evaluation_of(run: Run) -> Any:
    """The function (parameters, update) -> held-out metrics.

    The function raises FloatingPointError if `best_metric` is not finite, so that a state with NaN
    is never saved as good.
    """
    from_corpus, learner = run.from_corpus, run.learner
    step = evaluation_program(learner, from_corpus.unigram_counts(run.corpus))
    examples = from_corpus.examples(run.corpus, "validation", EVALUATION_SEED, None)
    held_out = HeldOut.of(examples, run.config.evaluation_sequences, learner.mesh)

    def evaluate(params: Params, update: int) -> dict[str, float]:
        metrics = held_out_metrics(from_corpus, run.corpus, step, params, held_out)
        value = metrics[from_corpus.best_metric]
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the held-out {from_corpus.best_metric} is {value} at update {update}. "
                f"{_AFTER_DIVERGENCE}"
            )
        return metrics

    return evaluate


def course_of(run: Run, workdir: str) -> Course:
    """The arguments of the loop."""
    config, learner = run.config, run.learner
    size, length, last = config.batch_size, run.examples.sequence_length, config.num_updates
    tokens = size * length
    model_config = learner.model.config
    heads = run.from_corpus.head_products(model_config, run.from_corpus.example(length, config))
    description = checkpoint_description(
        model_config, learner.objective, config.to_dict(), sequence_length=length
    )
    return Course(
        config=config,
        directory=workdir,
        label="pretrain",
        held_out="validation",
        num_updates=last,
        seed=config.seed,
        batches=functools.partial(batches, run),
        rates={
            "sequences_per_second": size,
            "tokens_per_second": tokens,
            "model_flops_per_second": update_flops(model_config, size, length, heads),
        },
        checkpoint_items={"config": description, "tokenizer": run.corpus.tokenizer.to_dict()},
        evaluates_at=lambda step: step % config.evaluate_every == 0 or step == last,
        evaluate=evaluation_of(run),
        describe_batch=lambda update: (
            f"examples {update * size} to {(update + 1) * size - 1} of the data"
        ),
        after_divergence=_AFTER_DIVERGENCE,
        tokens=tokens,
    )
