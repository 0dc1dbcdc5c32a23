"""Weights quantised once, for a model that is applied many times and not trained."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.layers import BINARY_LINEARS, in_groups
from bipft_jax.models.parameters import Params, path_name


def taking_values(config: DecoderConfig) -> DecoderConfig:
    """The configuration of a model that multiplies `quantised_once` parameters as they are. It
    gives the same results up to the rounding of float32; inputs are quantised as before."""
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, weight=None))


def quantised_once(params: Params, config: DecoderConfig) -> Params:
    """The parameters with the values of quantised kernels in the kernels' places."""
    recipe = config.recipe
    if recipe.weight is None:
        return params

    def value(path, leaf: jax.Array) -> jax.Array:
        *_, module, name = path_name(path).split("/")
        if name != "kernel" or module not in BINARY_LINEARS:
            return leaf

        def of_layer(kernel: jax.Array) -> jax.Array:
            split, quantizer = in_groups(module, kernel, recipe.weight, recipe.groups)
            return quantizer.encode(split).value(kernel.dtype).reshape(kernel.shape)

        return jax.vmap(of_layer)(jnp.asarray(leaf))  # kernels are stacked by layers

    return jax.tree_util.tree_map_with_path(value, params)
