"""The initial state of a run, and the order of precedence of its sources."""

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
from bipft_jax.training.learner import Learner
from bipft_jax.training.state import TrainState

# Where a parameter's initial value comes from, in order of precedence:
# 1. a checkpoint in the workdir (`restored`): the run resumes, and nothing below applies;
# 2. `init_from`: every parameter that the source's architecture also has;
# 3. the prior: a value known from the corpus, such as word frequencies;
# 4. the seed: random values; scales without a value are calibrated on the first batch.


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
    """The state before the first update. Call it inside `sharding.on(learner.mesh)`. Every array is
    created with its sharding: no device ever holds more than its part.

    Arguments:
      seed: of the random parameters.
      batch: a global batch on the mesh, to calibrate scales on.
      source: None to start from random parameters.
      prior: parameters that replace entries of the top level of the tree.

    Raises: ValueError for a source that does not fit.
    """
    mesh, model = learner.mesh, learner.model
    params = random_params(learner, seed) | sharding.put(mesh, prior or {})
    if source is not None:
        source = source._replace(params=sharding.put(mesh, source.params))
        params = warm_started(params, model.config, learner.objective, source)
    params = states.calibrate(model, params, *learner.objective.model_inputs(batch))
    return learner.begin(params)


def random_params(learner: Learner, seed: int) -> Params:
    """Random parameters, a function of the seed alone, not of batch or mesh; scales are NaN."""
    inputs = [np.zeros(ids.shape, ids.dtype) for ids in learner.smallest_inputs]
    key = jax.random.key(seed)
    return states.initial_params(learner.model, key, *inputs, places=learner.places.params)
