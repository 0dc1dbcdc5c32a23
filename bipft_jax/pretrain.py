"""Pretraining: the loop from a corpus and a config to checkpoints, read top to bottom.

The order is fixed. Once: claim the workdir, load the corpus, make or restore the state. Then for
every update: next batch, step; every `log_every` updates: write telemetry (read one step late, so
that the device never waits); every `evaluate_every` updates: evaluate on held-out text, save. At
the end WORKDIR/result.json has what the best and the last checkpoint score. A batch, its masks and
its dropout are functions of the seed and the step, so a run that is started again goes on as if it
had not stopped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from bipft_jax.config_keys import check_keys
from bipft_jax.data.corpus import Corpus, load_corpus
from bipft_jax.data.pretraining import PretrainingExamples, pretraining_batches
from bipft_jax.models.attention import ATTENDED_KEYS
from bipft_jax.models.bert import BertForPreTraining
from bipft_jax.models.recipes import bert_config, recipe_named
from bipft_jax.results import RESULT_NAME, of_pretraining
from bipft_jax.training import sharding, weight_statistics
from bipft_jax.training import state as states
from bipft_jax.training import step as steps
from bipft_jax.training.checkpoints import Checkpointer, verify_tokenizer
from bipft_jax.training.distillation import Teacher, make_teacher
from bipft_jax.training.flops import update_flops
from bipft_jax.training.optimizer import adamw, linear_schedule
from bipft_jax.training.processes import interruption, is_first, say
from bipft_jax.training.profiling import profiling
from bipft_jax.training.state import Params, TrainState
from bipft_jax.training.telemetry import Telemetry, ThroughputMeter
from bipft_jax.training.warm_start import (
    Source,
    abstract_params,
    checkpoint_description,
    load_input,
    require_initialised_scales,
    warm_started,
)
from bipft_jax.training.workdir import (
    absolute,
    check_inputs,
    check_workdir,
    claim_workdir,
    owned,
    recorded_inputs,
    write_json,
)

_EVALUATION_SEED = 0  # held-out examples are the same for every run on a corpus
EVALUATION_ROWS = 32  # held-out sequences a shard evaluates at a time, at most

# Selects the best checkpoint: SPEC 2.5's MLM + NSP cross entropy on held-out text.
BEST_METRIC = "loss"

_AFTER_DIVERGENCE = (
    "The checkpoints in the workdir are from before and can be used: start a new --workdir with "
    "--config.init_from=this one and a lower learning_rate or clip_norm"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of; everything here follows from the config and the corpus."""

    config: ml_collections.ConfigDict
    corpus: Corpus
    examples: PretrainingExamples
    model: BertForPreTraining
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    mesh: jax.sharding.Mesh


def train(config: ml_collections.ConfigDict, workdir: str) -> TrainState:
    """Pretrains a model, or goes on with a run that was stopped.

    Arguments:
      config: of `configs/pretrain.py`.
      workdir: receives checkpoints, metrics.jsonl, TensorBoard files, config.json, inputs.json and,
        at the end, result.json.

    Returns: the final state, as it was saved.

    Raises: ValueError with what to change, for a corpus, checkpoint, teacher, workdir or config
      that does not fit or is not what the run was begun with, or a workdir that another job has;
      FloatingPointError when losses or gradients are no longer finite. SystemExit (0) after
      SIGTERM, when the state has been saved.
    """
    check_keys(config, "pretrain")
    workdir = str(absolute(workdir))
    check_workdir(workdir, config.to_dict())
    with owned(workdir):
        run = make_run(config)
        inputs, begun = {"corpus_dir": run.corpus.identity}, recorded_inputs(workdir)
        check_inputs(workdir, inputs)
        checkpointer = Checkpointer(
            workdir, keep_every=config.keep_every, best_metric=BEST_METRIC, best_mode="min"
        )
        with interruption(), checkpointer, sharding.on(run.mesh):
            teacher = teacher_params = None
            if config.teacher:
                source = load_input(config.teacher, "teacher", begun)
                inputs["teacher"] = source.identity
                teacher, teacher_params = place_teacher(run, source)
            state = restored_state(run, checkpointer)
            if state is None:
                source = None
                if config.init_from:
                    source = load_input(config.init_from, "init_from", begun)
                    inputs["init_from"] = source.identity
                state = first_state(run, source)
            claim_workdir(workdir, config.to_dict(), inputs)
            return _loop(run, workdir, checkpointer, state, teacher, teacher_params)


def make_run(config: ml_collections.ConfigDict) -> Run:
    """Loads the corpus and builds model, optimiser and mesh.

    Raises: ValueError for a missing corpus, keys that do not go together, or a batch that does not
      split.
    """
    if not config.corpus_dir:
        raise ValueError(
            "corpus_dir is empty: give --config.corpus_dir=DIR, a directory made by "
            "python -m bipft_jax.data.corpus"
        )
    if config.mlm_distillation and not config.teacher:
        raise ValueError("mlm_distillation needs a teacher: give --config.teacher=DIR")
    recipe = recipe_named(
        config.recipe, config.estimator_rank, config.lora_rank, config.full_precision_weights
    )
    schedule = linear_schedule(config.learning_rate, config.warmup_updates, config.num_updates)
    corpus = load_corpus(config.corpus_dir)
    model_config = bert_config(
        recipe,
        config.size,
        corpus.tokenizer.vocab_size,
        dropout=config.dropout,
        dtype=config.dtype,
        compute=config.compute,
        backward=config.backward,
        fused_attention=config.fused_attention,
        scan_layers=config.scan_layers,
        remat=config.remat,
    )
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.tensor)
    sharding.check_model(model_config, mesh)
    sharding.check_batch_size(config.batch_size, config.accumulation, mesh)
    return Run(
        config=config,
        corpus=corpus,
        examples=PretrainingExamples.from_corpus(
            corpus, "train", seed=config.seed, masking_rate=config.masking_rate
        ),
        model=BertForPreTraining(model_config),
        schedule=schedule,
        optimizer=adamw(
            schedule,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            eps=config.adam_epsilon,
        ),
        mesh=mesh,
    )


def restored_state(run: Run, checkpointer: Checkpointer) -> TrainState | None:
    """The state of the newest usable checkpoint; None if there is none."""
    params = abstract_params(run.model.config, 0)
    abstract = sharding.placed(run.mesh, states.abstract_state(params, run.optimizer))
    restored = checkpointer.restore_latest(abstract, tokenizer=run.corpus.tokenizer)
    return None if restored is None else restored[0]


def first_state(run: Run, source: Source | None) -> TrainState:
    """The state before the first update: parameters random or taken from the source, scales from
    the first batch. Every array is made, or put, where it belongs: none is whole on a device that
    keeps a part."""
    config, tokenizer = run.config, run.corpus.tokenizer
    params = random_params(run)
    if config.unigram_bias:
        bias = states.log_frequencies(run.corpus.unigram_counts)
        params |= sharding.put(run.mesh, {"mlm_bias": bias})
    if source is not None:
        verify_tokenizer(source.tokenizer.to_dict(), tokenizer)
        source = source._replace(params=sharding.put(run.mesh, source.params))
        params = warm_started(params, run.model.config, 0, source)
        say(f"starting from {source.described()}")
    (batch,) = _batches(run, first=0, last=1)
    params = states.calibrate(run.model, params, *[batch[name] for name in steps.INPUTS])
    places = sharding.placements(run.mesh, states.abstract_state(params, run.optimizer))
    return jax.jit(lambda p: states.new_state(p, run.optimizer), out_shardings=places)(params)


def random_params(run: Run) -> Params:
    """Of the config's seed, whatever the batch and the mesh; scales are NaN."""
    places = sharding.placements(run.mesh, abstract_params(run.model.config, 0))
    ids = np.zeros((sharding.batch_shards(run.mesh), 1), np.int32)  # a batch that can be split
    inputs = [ids] * len(steps.INPUTS)
    key = jax.random.key(run.config.seed)
    return states.initial_params(run.model, key, *inputs, places=places)


def place_teacher(run: Run, source: Source) -> tuple[Teacher, Params]:
    """The full-precision teacher of a checkpoint, and its parameters on the devices."""
    config = run.config
    verify_tokenizer(source.tokenizer.to_dict(), run.corpus.tokenizer)
    require_initialised_scales(source)
    teacher_config = source.config(
        dropout=config.dropout, dtype=config.dtype, compute=config.compute
    )
    teacher, params = make_teacher(
        teacher_config,
        source.params,
        run.model.config,
        dropout=config.teacher_dropout,
        mlm_weight=config.mlm_distillation,
    )
    if not teacher.has_nsp:
        say(f"the teacher {config.teacher} has no NSP head: the NSP soft loss is off")
    return teacher, sharding.put(run.mesh, params)


def evaluate(step_fn, params: Params, batches: Iterable[dict[str, jax.Array]]) -> dict[str, float]:
    """Held-out metrics: losses (nats), MLM accuracy and perplexity over all masked tokens, NSP
    accuracy over all sequences, what `attended_keys` reports, and accuracy and perplexity of always
    predicting by word frequency (`unigram_`).

    batches: taken one after another, so that the devices hold two at most.
    """
    results = []
    for batch in batches:
        results.append(step_fn(params, batch))
        jax.block_until_ready(results[-2:-1])
    results = jax.device_get(results)

    def mean(name: str, weight: str) -> float:
        weights = np.array([r[weight] for r in results], np.float64)
        values = np.array([r[name] for r in results], np.float64)
        return float(np.sum(values * weights) / np.sum(weights))

    mlm_loss = mean("mlm_loss", "masked_tokens")
    nsp_loss = mean("nsp_loss", "sequences")
    return {
        "loss": mlm_loss + nsp_loss,
        "mlm_loss": mlm_loss,
        "mlm_accuracy": mean("mlm_accuracy", "masked_tokens"),
        "mlm_perplexity": float(np.exp(mlm_loss)),
        "nsp_loss": nsp_loss,
        "nsp_accuracy": mean("nsp_accuracy", "sequences"),
        **{name: mean(name, "sequences") for name in results[0] if name.startswith(ATTENDED_KEYS)},
        "unigram_accuracy": mean("unigram_accuracy", "masked_tokens"),
        "unigram_perplexity": float(np.exp(mean("unigram_loss", "masked_tokens"))),
    }


def _batches(run: Run, *, first: int, last: int):
    """Global batches number first to last - 1, on the devices."""
    size = run.config.batch_size
    host_batches = pretraining_batches(
        run.examples,
        size,
        start_batch=first,
        num_batches=last - first,
        rows=sharding.process_rows(run.mesh, size),
        num_workers=run.config.data_workers,
    )
    for batch in host_batches:
        yield sharding.put_batch(run.mesh, batch, size)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out batches of a run: the first examples of the validation split, the same ones for
    every run on a corpus, masked as BERT's whatever the rate in training.

    Used are `evaluation_sequences` of them (0, or more than there are: one epoch), less what is
    left over when they are dealt evenly to the mesh's `data` x `fsdp` shards: 1,024 are the same
    1,024 on every mesh of 1, 2, 4, ... 1,024 shards. A shard gets at least one, and
    `EVALUATION_ROWS` at most of a batch.

    batches: the rows of each that this process holds, and how many the whole batch has.
    """

    mesh: jax.sharding.Mesh
    batches: list[tuple[dict[str, np.ndarray], int]]

    @classmethod
    def of(cls, run: Run) -> HeldOut:
        """Makes this process's rows."""
        examples = PretrainingExamples.from_corpus(run.corpus, "validation", seed=_EVALUATION_SEED)
        wanted = min(run.config.evaluation_sequences or len(examples), len(examples))
        shards = sharding.batch_shards(run.mesh)
        used = max(wanted // shards, 1) * shards
        batches = []
        for first in range(0, used, EVALUATION_ROWS * shards):
            size = min(EVALUATION_ROWS * shards, used - first)
            batches.append((examples.at(first + sharding.process_rows(run.mesh, size)), size))
        return cls(run.mesh, batches)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        """Global batches, each put on the devices when it is asked for."""
        for batch, size in self.batches:
            yield sharding.put_batch(self.mesh, batch, size)


def _require_finite(loss: float, step: int) -> None:
    """So that a state with NaN is never saved as good."""
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the held-out loss is {loss} at update {step}. {_AFTER_DIVERGENCE}"
        )


def _diverged(run: Run, state: TrainState, teacher_params, batch, gradients_of) -> str:
    """The message of a run that makes no updates any more; batch: the latest, whose update was
    skipped."""
    step, skipped, size = int(state.step), int(state.skipped_in_row), run.config.batch_size
    before = state.replace(step=state.step - 1)
    gradients, _ = jax.jit(gradients_of)(before, teacher_params, batch)
    bad = states.not_finite(gradients)
    where = f"the gradient of {bad[0]} and {len(bad) - 1} others" if bad else "the loss"
    return (
        f"{skipped} updates in a row were skipped, from update {step - skipped + 1} on: {where} is "
        f"not finite at update {step} (examples {(step - 1) * size} to {step * size - 1} of the "
        f"data). {_AFTER_DIVERGENCE}"
    )


def _loop(
    run: Run,
    workdir: str,
    checkpointer: Checkpointer,
    state: TrainState,
    teacher: Teacher | None,
    teacher_params: Params | None,
) -> TrainState:
    config, model_config = run.config, run.model.config
    places = sharding.placements(run.mesh, state)
    how = {"seed": config.seed, "accumulation": config.accumulation, "teacher": teacher}
    update = jax.jit(
        steps.pretraining_step(run.model, run.optimizer, **how),
        in_shardings=(places, None, sharding.batch_sharding(run.mesh)),
        out_shardings=(places, sharding.replicated(run.mesh)),
        donate_argnums=0,
    )
    log_frequencies = states.log_frequencies(run.corpus.unigram_counts)
    evaluation_step = jax.jit(steps.evaluation_step(run.model, log_frequencies))
    codes_of = jax.jit(lambda p: weight_statistics.binary_codes(p, model_config.recipe.weight))
    statistics = jax.jit(
        lambda before, after, p: {
            **weight_statistics.flip_ratios(before, after),
            **weight_statistics.scales(p),
        }
    )
    add = jax.jit(lambda total, new: jax.tree.map(jnp.add, total, new), donate_argnums=0)

    held_out = HeldOut.of(run)

    start = step = int(state.step)
    last = config.num_updates
    length, predictions = run.examples.sequence_length, run.examples.max_predictions
    meter = ThroughputMeter(
        total_steps=last,
        per_step={
            "sequences_per_second": config.batch_size,
            "tokens_per_second": config.batch_size * length,
            "model_flops_per_second": update_flops(
                model_config, config.batch_size, length, predictions
            ),
        },
    )
    description = checkpoint_description(model_config, 0, config.to_dict())
    tokenizer = run.corpus.tokenizer.to_dict()
    codes = codes_of(state.params)
    totals, counted = None, 0  # sums of metrics since the last log point
    unread: tuple[int, dict[str, Any]] | None = None  # a log point still on the device

    with (
        Telemetry(workdir, name="pretrain", start_step=start, total_steps=last) as telemetry,
        profiling(config.profile_steps, os.path.join(workdir, "profile")) as profile,
        interruption() as interrupted,
    ):

        def read() -> None:
            nonlocal unread
            if unread is None:
                return
            (at, values), unread = jax.device_get(unread), None
            skipped_in_row = values.pop("skipped_in_row")
            telemetry.log(at, {**values, **meter.rates(at)})
            limit = config.max_skipped_updates
            # The state is an update further, which may have been a good one.
            if skipped_in_row >= limit and int(state.skipped_in_row) >= limit:
                gradients_of = steps.pretraining_gradients(run.model, **how)
                raise FloatingPointError(_diverged(run, state, teacher_params, batch, gradients_of))

        def save(metrics: dict[str, float] | None = None) -> None:
            states.require_finite(state.params)
            checkpointer.save(step, state, config=description, tokenizer=tokenizer, metrics=metrics)

        profile.after(step, state)
        for batch in _batches(run, first=start, last=last):
            state, metrics = update(state, teacher_params, batch)
            step += 1
            profile.after(step, state)
            totals = metrics if totals is None else add(totals, metrics)
            counted += 1
            read()
            if step == start + 1:
                jax.block_until_ready(state.step)
                meter.restart(step)
            stopping = interrupted.requested() and step < last
            if step % config.log_every == 0 or step == last or stopping:
                new_codes = codes_of(state.params)
                unread = (
                    step,
                    {
                        **steps.mean_metrics(totals, counted),
                        "skipped_in_row": jnp.copy(state.skipped_in_row),  # the state is donated
                        "learning_rate": run.schedule(step - 1),
                        **statistics(codes, new_codes, state.params),
                    },
                )
                codes, totals, counted = new_codes, None, 0
            if step % config.evaluate_every == 0 or step == last:
                read()
                jax.block_until_ready(state.step)
                meter.rates(step)  # up to here it was training
                results = evaluate(evaluation_step, state.params, held_out)
                _require_finite(results["loss"], step)
                telemetry.log(step, results, split="validation")
                save(results)
                meter.restart(step)
            if stopping:
                read()
                interrupted.stop(step, checkpointer, save)
    checkpointer.wait()
    if is_first():
        best = checkpointer.best_step()
        found = {"best_update": best, "best": checkpointer.metrics(best)}
        found |= {"last": checkpointer.metrics(last)}
        write_json(os.path.join(workdir, RESULT_NAME), of_pretraining(config, BEST_METRIC, found))
    say(f"pretrained {step} updates: {workdir}")
    return state
