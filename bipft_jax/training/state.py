"""The state of a run, and how its parameters come to be: random, warm-started, calibrated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from bipft_jax.models.parameters import Params, is_scale, named_leaves


@struct.dataclass
class TrainState:
    """step: int32 scalar, batches seen; params: float32; opt_state: the optimiser's;
    skipped_in_row: int32 scalar, how many of the latest batches made no update, because their loss
    or gradient was not finite."""

    step: jax.Array
    params: Params
    opt_state: Any
    skipped_in_row: jax.Array


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    # Two arrays, because both are donated.
    step, skipped_in_row = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, params, optimizer.init(params), skipped_in_row)


def abstract_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a state, from those (or the arrays) of its parameters."""
    return jax.eval_shape(lambda p: new_state(p, optimizer), params)


@jax.jit
def _finite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def not_finite(tree: Any) -> list[str]:
    """The names of the leaves that have a NaN or an infinity."""
    return [name for name, ok in named_leaves(jax.device_get(_finite(tree))).items() if not ok]


def require_finite(params: Params) -> None:
    """Raises FloatingPointError, with the parameter's name, if one has a NaN or an infinity: such a
    state is not to be saved."""
    bad = not_finite(params)
    if bad:
        raise FloatingPointError(
            f"{bad[0]} and {len(bad) - 1} other parameters are not finite: this state is not "
            "saved. The checkpoints before can be used"
        )


def initial_params(
    model: nn.Module, key: jax.Array, *inputs: jax.Array, places: Any = None
) -> Params:
    """Randomly initialised parameters; learned scales are NaN until `calibrate`. They depend on the
    key alone.

    Arguments:
      inputs: any that the model takes.
      places: a sharding for each parameter, where it is made; None for the key's device.
    """
    with jax.debug_nans(False):  # scales are born NaN
        return initialization(model, places)(key, *inputs)


def initialization(model: nn.Module, places: Any = None) -> Callable[..., Params]:
    """The program of `initial_params`. Nothing but parameters leaves it, so that the compiler drops
    the forward pass with which Flax makes them."""
    return jax.jit(lambda key, *inputs: model.init(key, *inputs)["params"], out_shardings=places)


def calibrate(model: nn.Module, params: Params, *inputs: jax.Array) -> Params:
    """Gives every scale that is still NaN its value from one batch, dropout off (SPEC 1.4).

    Scales that have a value keep it, and nothing else changes. Layers are calibrated in order: a
    layer sees its predecessors already quantised.

    Arguments:
      model: called as model(*inputs), deterministic by default.
      inputs: a real batch, the *global* one under several devices.

    Raises: FloatingPointError if a scale comes out NaN or infinite (a batch with such values).
    """
    flat = flatten_dict(params)
    if not any(is_scale(path) for path in flat):
        return params
    apply = jax.jit(lambda p, *x: model.apply({"params": p}, *x, mutable=["calibration"])[1])
    scales = flatten_dict(apply(params, *inputs)["calibration"])
    bad = ["/".join(path) for path, scale in scales.items() if not jnp.isfinite(scale).all()]
    if bad:
        raise FloatingPointError(f"calibration gave non-finite scales: {', '.join(bad)}")
    return unflatten_dict({**flat, **scales})
