"""The training loop. Pretraining and each stage of each seed of finetuning run it with their own
`Course`.

Every iteration does the following, in this order, which is documented only here:

1. take the next batch, already on the devices, and dispatch the update;
2. fetch and write the pending log point, one update late, so that the devices never wait;
3. every `log_every` updates, after the last one and at a stop, dispatch a new log point: mean
   metrics, learning rate, flips of quantised weights, zeros among ternary ones, learned scales;
   means and flips are since the one before;
4. if the course evaluates here, fetch the pending log point, evaluate the held-out data, and save
   the state with the scores;
5. if a stop was requested, fetch the pending log point, save the state, and end the process.

`jax.transfer_guard` forbids implicit transfers during the loop.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from bipft_jax.checkpoints.manager import Checkpointer
from bipft_jax.models.parameters import Params
from bipft_jax.objectives.objective import Batch
from bipft_jax.processes import interruption
from bipft_jax.training import sharding
from bipft_jax.training import state as states
from bipft_jax.training import step as steps
from bipft_jax.training.learner import Learner
from bipft_jax.training.profiling import profiling
from bipft_jax.training.state import TrainState
from bipft_jax.training.telemetry import Telemetry, ThroughputMeter


@dataclasses.dataclass(frozen=True)
class Course:
    """One run of the loop: its batches, its evaluation, its files.

    config: the loop reads `log_every`, `max_skipped_updates` and `profile_steps`.
    directory: receives metrics.jsonl, TensorBoard files and traces.
    label, held_out: names of the run and of the held-out split in progress lines.
    num_updates: in all. seed: of dropout.
    batches: (first, last) -> global batches of the updates from `first` to `last` - 1, on the mesh.
    rates: the `per_step` of `ThroughputMeter`.
    checkpoint_items: `config` and `tokenizer` of its checkpoints.
    evaluates_at: number of finished updates -> whether to evaluate and save now.
    evaluate: (parameters, number of finished updates) -> held-out scores; raises
      FloatingPointError for a state that must not be saved.
    dropout: index of an update, from 0 -> whether the student uses dropout.
    describe_batch: index of an update, from 0 -> text that describes its batch in an error message.
    after_divergence: advice for a run whose updates are not finite.
    tokens: of one update, padding included; None if updates differ.
    """

    config: ml_collections.ConfigDict
    directory: str | os.PathLike[str]
    label: str
    held_out: str
    num_updates: int
    seed: int
    batches: Callable[[int, int], Iterator[Batch]]
    rates: Mapping[str, float]
    checkpoint_items: Mapping[str, Mapping[str, Any]]
    evaluates_at: Callable[[int], bool]
    evaluate: Callable[[Params, int], dict[str, float]]
    describe_batch: Callable[[int], str]
    after_divergence: str
    dropout: Callable[[int], bool] = lambda update: True
    tokens: int | None = None


def run(
    learner: Learner,
    course: Course,
    checkpointer: Checkpointer,
    state: TrainState,
    teacher_params: Params | None = None,
) -> TrainState:
    """Trains from a state to the course's last update. Call it inside `sharding.on(learner.mesh)`.

    Arguments:
      state: donated.
      teacher_params: of `learner.teacher`, on the mesh.

    Returns: the final state, as it was saved.

    Raises: FloatingPointError once losses or gradients stay non-finite; SystemExit (0) after
      SIGTERM, once the state is saved.
    """
    config, last = course.config, course.num_updates
    start = step = int(state.step)
    meter = ThroughputMeter(total_steps=last, per_step=course.rates)
    seed = sharding.put(learner.mesh, np.int32(course.seed))
    codes = learner.codes(state.params)
    totals, counted = None, 0  # sums of metrics since the last log point
    unread: tuple[int, int, dict[str, Any], dict[str, Any]] | None = None  # the pending log point

    with (
        Telemetry(
            course.directory,
            name=course.label,
            start_step=start,
            total_steps=last,
            tokens_per_step=course.tokens,
            shown=learner.objective.shown,
        ) as telemetry,
        profiling(config.profile_steps, os.path.join(course.directory, "profile")) as profile,
        interruption() as interrupted,
        jax.transfer_guard("disallow"),
    ):

        def read() -> None:
            nonlocal unread
            if unread is None:
                return
            (at, count, sums, values), unread = jax.device_get(unread), None
            skipped = values.pop("skipped_in_row")
            with jax.transfer_guard("allow"):  # the schedule puts `at` on a device
                rate = learner.schedule(at - 1)
            with np.errstate(invalid="ignore"):  # NaN if all updates were skipped
                means = steps.mean_metrics(sums, count)
            telemetry.log(at, {**means, "learning_rate": rate, **values, **meter.rates(at)})
            limit = config.max_skipped_updates
            # The state may be one update further, and that update may have been finite.
            if skipped >= limit and jax.device_get(state.skipped_in_row) >= limit:
                with jax.transfer_guard("allow"):
                    raise FloatingPointError(
                        _diverged(learner, course, state, teacher_params, seed, batch)
                    )

        def save(scores: dict[str, float] | None = None) -> None:
            states.require_finite(state.params)
            checkpointer.save(step, state, **course.checkpoint_items, metrics=scores)

        profile.after(step, state)
        for batch in course.batches(start, last):
            dropout = course.dropout(step)
            state, metrics = learner.update(state, teacher_params, seed, batch, dropout)
            step += 1
            profile.after(step, state)
            totals = metrics if totals is None else learner.add(totals, metrics)
            counted += 1
            read()
            if step == start + 1:
                jax.block_until_ready(state.step)
                meter.restart(step)
            stopping = interrupted.requested() and step < last
            if step % config.log_every == 0 or step == last or stopping:
                codes, values = learner.statistics(codes, state)
                unread, totals, counted = (step, counted, totals, values), None, 0
            if course.evaluates_at(step):
                read()
                jax.block_until_ready(state.step)
                meter.rates(step)  # ends the training interval
                with jax.transfer_guard("allow"):
                    scores = course.evaluate(state.params, step)
                    telemetry.log(step, scores, split=course.held_out)
                    save(scores)
                meter.restart(step)
            if stopping:
                read()
                with jax.transfer_guard("allow"):
                    interrupted.stop(step, checkpointer, save)
    checkpointer.wait()
    return state


def _diverged(
    learner: Learner,
    course: Course,
    state: TrainState,
    teacher_params: Params | None,
    seed: jax.Array,
    batch: Batch,
) -> str:
    """The error message for a run whose updates are all skipped; batch: that of the latest."""
    step, skipped = int(state.step), int(state.skipped_in_row)
    before, dropout = state.replace(step=state.step - 1), course.dropout(step - 1)
    gradients, metrics = learner.gradients(before, teacher_params, seed, batch, dropout)
    if bad := states.not_finite(gradients):
        where = f"the gradient of {states.first_of(bad)}"
    else:
        where = "the norm of the gradient" if np.isfinite(metrics["loss"]) else "the loss"
    return (
        f"{skipped} updates in a row were skipped, from update {step - skipped + 1} on: {where} is "
        f"not finite at update {step} ({course.describe_batch(step - 1)}). "
        f"{course.after_divergence}"
    )
