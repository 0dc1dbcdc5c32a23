"""Weights quantised once, for a model that is applied many times with the same parameters: without
training, or to the micro-batches of an update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.layers import BINARY_LINEARS, KEPT, in_groups
from bipft_jax.models.parameters import Params, is_stacked, named_leaves
from bipft_jax.quantization.binary_dot import kept_for_backward
from bipft_jax.quantization.quantizers import Quantizer


def of_kernels(
    params: Params,
    quantizer: Quantizer | None,
    groups: int,
    function: Callable[[jax.Array, Quantizer], Any],
) -> dict[str, Any]:
    """`function(kernel, quantizer)` of every quantised kernel by its path, layer by layer along the
    leading axis of stacked kernels; empty for full precision.

    Arguments:
      groups: of the recipe: the kernel's grouped axis is split in two, and the quantizer is that of
        the groups.
    """
    results = {}
    for path, kernel in named_leaves(params).items():
        linear, leaf = path.split("/")[-2:] if "/" in path else ("", path)
        if quantizer is None or leaf != "kernel" or linear not in BINARY_LINEARS:
            continue

        def of_layer(one: jax.Array, linear: str = linear) -> Any:
            return function(*in_groups(linear, one, quantizer, groups))

        results[path] = (jax.vmap(of_layer) if is_stacked(path) else of_layer)(kernel)
    return results


def taking_values(config: DecoderConfig) -> DecoderConfig:
    """The configuration of a model that multiplies `quantised_once` parameters as they are. It
    gives the same results up to the rounding of float32; inputs are quantised as before."""
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, weight=None))


def quantised_once(params: Params, config: DecoderConfig) -> Params:
    """The parameters with the values of quantised kernels in the kernels' places."""

    def value(kernel: jax.Array, quantizer: Quantizer) -> jax.Array:
        return quantizer.encode(kernel).value(kernel.dtype)

    flat = named_leaves(params)
    values = of_kernels(params, config.recipe.weight, config.recipe.groups, value)
    reshaped = {path: x.reshape(flat[path].shape) for path, x in values.items()}
    return unflatten_dict({**flat, **reshaped}, sep="/")


def kept_weights(params: Params, quantizer: Quantizer | None, groups: int = 1) -> dict[str, Any]:
    """The collection `KEPT`, with which a model takes the codes of its weights from there: the
    quantised kernels in its parameters then only receive their gradients."""

    def kept(kernel: jax.Array, quantizer: Quantizer) -> Any:
        return kept_for_backward(kernel, None, quantizer)

    residuals = of_kernels(params, quantizer, groups, kept)
    return {KEPT: unflatten_dict(residuals, sep="/")} if residuals else {}
