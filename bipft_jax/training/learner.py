"""A model that learns: its optimiser, its mesh, and every program that a run dispatches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from bipft_jax.models.parameters import Params
from bipft_jax.objectives.objective import Batch, Objective, Teacher
from bipft_jax.training import sharding, weight_statistics
from bipft_jax.training import state as states
from bipft_jax.training import step as steps
from bipft_jax.training.state import TrainState


class Program(NamedTuple):
    """A jitted function of a run and the arguments it gets there: `jax.ShapeDtypeStruct`s, with a
    sharding where the run gives one, and static arguments as they are."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def lowered(self, mesh: Mesh) -> jax.stages.Lowered:
        """The program, ready to be compiled for the devices of the mesh."""
        with sharding.on(mesh):
            return self.function.lower(*self.arguments)


@dataclasses.dataclass(frozen=True)
class Learner:
    """A model with its optimiser and its jitted programs, compiled once for all courses.

    schedule: the optimiser's learning rate by update. accumulation: micro-batches per update.
    teacher: its parameters are an argument of `run`.
    """

    objective: Objective
    model: nn.Module
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    accumulation: int = 1
    teacher: Teacher | None = None

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        params = self.objective.abstract_params(self.model.config)
        return sharding.placed(self.mesh, states.abstract_state(params, self.optimizer))

    @property
    def places(self) -> TrainState:
        """A sharding for each array of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @property
    def smallest_inputs(self) -> list[jax.ShapeDtypeStruct]:
        """Of the model, for the smallest batch that splits over the mesh."""
        ids = jax.ShapeDtypeStruct((sharding.batch_shards(self.mesh), 1), jnp.int32)
        return [ids] * len(self.objective.inputs)

    @functools.cached_property
    def begin(self) -> Callable[[Params], TrainState]:
        """parameters -> the state before the first update."""
        return jax.jit(
            lambda params: states.new_state(params, self.optimizer), out_shardings=self.places
        )

    @functools.cached_property
    def update(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """(state, teacher's parameters, seed, batch, dropout) -> (state, metrics); donates the
        state."""
        whole = sharding.replicated(self.mesh)
        return jax.jit(
            steps.update(self.objective, self.model, self.optimizer, **self._options),
            in_shardings=(self.places, None, whole, sharding.batch_sharding(self.mesh)),
            out_shardings=(self.places, whole),
            donate_argnums=0,
            static_argnums=4,
        )

    @functools.cached_property
    def gradients(self) -> Callable[..., tuple[Params, dict[str, jax.Array]]]:
        """(gradients, metrics), from the arguments of `update`; donates nothing."""
        gradients_of = steps.gradients(self.objective, self.model, **self._options)
        return jax.jit(gradients_of, static_argnums=4)

    @functools.cached_property
    def codes(self) -> Callable[[Params], dict[str, jax.Array]]:
        """parameters -> the codes of their binary weights."""
        recipe = self.model.config.recipe
        return jax.jit(
            lambda params: weight_statistics.binary_codes(params, recipe.weight, recipe.groups)
        )

    @functools.cached_property
    def statistics(self) -> Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
        """(codes before, state) -> (codes now; flips, zeros, scales and `skipped_in_row`). One
        program, because the dispatch of a small program costs more than its computation."""

        def values_of(before: dict[str, jax.Array], state: TrainState):
            now = self.codes(state.params)
            return now, {
                "skipped_in_row": jnp.copy(state.skipped_in_row),  # the state is donated
                **weight_statistics.flip_ratios(before, now),
                **weight_statistics.zero_ratios(now, self.model.config.recipe.weight),
                **weight_statistics.scales(state.params),
            }

        return jax.jit(values_of)

    @functools.cached_property
    def add(self) -> Callable[[Any, Any], Any]:
        """The sum of two dictionaries of metrics; donates the first."""
        return jax.jit(lambda total, new: jax.tree.map(jnp.add, total, new), donate_argnums=0)

    def programs(self, batch: Batch, teacher_params: Params | None = None) -> list[Program]:
        """Every program of a run without its evaluation, in the order of their first dispatch.

        Arguments:
          batch: shapes, dtypes and shardings of a global batch.
          teacher_params: shapes, dtypes and shardings of the parameters of `teacher`.
        """
        state, params = self.abstract_state, self.abstract_state.params
        seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(self.mesh))
        arguments = (state, teacher_params, seed, batch, True)
        with sharding.on(self.mesh):
            key = jax.eval_shape(lambda: jax.random.key(0))
            codes = self.codes.eval_shape(params)
            metrics = self.update.eval_shape(*arguments)[1]
        parameters = states.initialization(self.model, self.places.params)
        made = [Program("parameters", parameters, (key, *self.smallest_inputs))]
        if states.has_scales(params):
            calibration = states.calibration(self.model)
            made.append(
                Program("calibration", calibration, (params, *self.objective.model_inputs(batch)))
            )
        return [
            *made,
            Program("state", self.begin, (params,)),
            Program("codes", self.codes, (params,)),
            Program("update", self.update, arguments),
            Program("sum of metrics", self.add, (metrics, metrics)),
            Program("statistics", self.statistics, (codes, state)),
            Program("finite", states.finite, (params,)),
        ]

    @property
    def _options(self) -> dict[str, Any]:
        return {"accumulation": self.accumulation, "teacher": self.teacher}
