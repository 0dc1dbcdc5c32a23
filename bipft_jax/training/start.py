"""The state that a run begins with, and what takes precedence."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from bipft_jax.checkpoints.manager import Checkpointer
from bipft_jax.checkpoints.source import Source, warm_started
from bipft_jax.data.tokenizers import Tokenizer
from bipft_jax.models.parameters import Params
from bipft_jax.training import sharding
from bipft_jax.training import state as states
from bipft_jax.training.loop import Learner
from bipft_jax.training.state import TrainState

# In order of precedence, what a parameter begins as:
# 1. a checkpoint in the workdir (`restored`): the run goes on from there, nothing below is read;
# 2. `init_from`: every parameter that the source's architecture has too;
# 3. the prior: a value that is known from the corpus, such as word frequencies;
# 4. random numbers of the seed; scales that nothing above gave a value, from the first batch.


def restored(
    learner: Learner, checkpointer: Checkpointer, tokenizer: Tokenizer
) -> TrainState | None:
    """The state of the newest usable checkpoint; None if there is none."""
    found = checkpointer.restore_latest(learner.abstract_state, tokenizer=tokenizer)
    return None if found is None else found[0]


def first_state(
    learner: Learner,
    seed: int,
    batch: Mapping[str, jax.Array],
    source: Source | None,
    prior: Params | None = None,
) -> TrainState:
    """The state before the first update, inside of `sharding.on(learner.mesh)`. Every array is
    made, or put, where it belongs: none is whole on a device that keeps a part.

    Arguments:
      seed: of the random parameters.
      batch: a global one, on the mesh, from which scales get their first value.
      source: None to start from random parameters.
      prior: by their path in the first level of the parameters.

    Raises: ValueError for a source that does not fit.
    """
    mesh, model = learner.mesh, learner.model
    params = random_params(learner, seed) | sharding.put(mesh, prior or {})
    if source is not None:
        source = source._replace(params=sharding.put(mesh, source.params))
        params = warm_started(params, model.config, learner.objective, source)
    params = states.calibrate(model, params, *learner.objective.of(batch))
    begin = jax.jit(lambda p: states.new_state(p, learner.optimizer), out_shardings=learner.places)
    return begin(params)


def random_params(learner: Learner, seed: int) -> Params:
    """They depend on the seed alone, not on batch or mesh; scales are NaN."""
    ids = np.zeros((sharding.batch_shards(learner.mesh), 1), np.int32)  # a batch that can be split
    inputs = [ids] * len(learner.objective.inputs)
    key = jax.random.key(seed)
    return states.initial_params(learner.model, key, *inputs, places=learner.places.params)
