"""The train state: its creation, random initialisation and the calibration of scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """step: int32 scalar, batches seen; params: float32; opt_state: the optimiser's state;
    skipped_in_row: int32 scalar, number of consecutive latest updates that were skipped because
    their loss or gradient was not finite."""

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
def finite(tree: Any) -> Any:
    """For each leaf, whether it has no NaN and no infinity."""
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def not_finite(tree: Any) -> list[str]:
    """The names of the leaves that have a NaN or an infinity."""
    return [name for name, ok in named_leaves(jax.device_get(finite(tree))).items() if not ok]


def require_finite(params: Params) -> None:
    """Raises FloatingPointError, with the parameter's name, if one has a NaN or an infinity: such a
    state must not be saved."""
    bad = not_finite(params)
    if bad:
        raise FloatingPointError(
            f"not finite: {first_of(bad)}. This state is not saved. The checkpoints before can be "
            "used"
        )


def require_wide(params: Params) -> None:
    """Raises ValueError if latent weights are narrower than float32. An update changes a weight by
    about the learning rate; bfloat16 rounds a change of less than 1 / 512 of the weight away, so
    most weights would never change. Needs no values."""
    narrow = [
        f"{name} ({leaf.dtype})"
        for name, leaf in named_leaves(params).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
    ]
    if narrow:
        raise ValueError(
            f"latent weights must be float32, but {first_of(narrow)}: small updates would be lost "
            "in rounding. Keep the parameters in float32; dtype='bfloat16' of the model's "
            "configuration computes activations in bfloat16"
        )


def first_of(names: Sequence[str]) -> str:
    """The first name and how many others, for a message."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} others"


def initial_params(
    model: nn.Module, key: jax.Array, *inputs: jax.Array, places: Any = None
) -> Params:
    """Randomly initialised parameters, a function of the key alone; learned scales are NaN until
    `calibrate`.

    Arguments:
      inputs: any that the model takes.
      places: a sharding for each parameter; None for the key's device.
    """
    with jax.debug_nans(False):  # scales are initialised to NaN
        return initialization(model, places)(key, *inputs)


def initialization(model: nn.Module, places: Any = None) -> Callable[..., Params]:
    """The program of `initial_params`. It returns parameters only, so the compiler drops the
    forward pass of Flax's `init`."""
    return jax.jit(lambda key, *inputs: model.init(key, *inputs)["params"], out_shardings=places)


def calibrate(model: nn.Module, params: Params, *inputs: jax.Array) -> Params:
    """Initialises every scale that is NaN from one batch, dropout off (SPEC 1.4).

    Other scales and parameters do not change. Layers are calibrated in order: the inputs of a layer
    come from calibrated, quantised layers.

    Arguments:
      model: called as model(*inputs), deterministic by default.
      inputs: a real batch, the *global* one under several devices.

    Raises: FloatingPointError if the batch gives a scale that is NaN or infinite.
    """
    if not has_scales(params):
        return params
    scales = flatten_dict(calibration(model)(params, *inputs))
    bad = ["/".join(path) for path, scale in scales.items() if not jnp.isfinite(scale).all()]
    if bad:
        raise FloatingPointError(f"calibration gave non-finite scales: {', '.join(bad)}")
    return unflatten_dict({**flatten_dict(params), **scales})


def calibration(model: nn.Module) -> Callable[..., Params]:
    """The program of `calibrate`: (parameters, inputs) -> the scales, as parameters."""

    def scales(params: Params, *inputs: jax.Array) -> Params:
        return model.apply({"params": params}, *inputs, mutable=["calibration"])[1]["calibration"]

    return jax.jit(scales)


def has_scales(params: Params) -> bool:
    """Whether the model has learned scales."""
    return any(is_scale(path) for path in flatten_dict(params))
