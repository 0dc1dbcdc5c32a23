"""Norms and linears of a decoder's block, where its recipe has them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bipft_jax.models.axes import splits_inputs
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.layers import BinaryDense
from bipft_jax.models.normalization import RMSNorm
from bipft_jax.quantization.quantizers import Quantizer


def rms_norm(config: DecoderConfig, name: str, groups: int = 1) -> RMSNorm:
    """The decoder's RMSNorm."""
    return RMSNorm(config.norm_epsilon, jnp.dtype(config.dtype), groups, name=name)


def block_norm(config: DecoderConfig, name: str, x: jax.Array, groups: int = 1) -> jax.Array:
    """The norm of x, if the recipe's norms are in the block; else x."""
    return rms_norm(config, name, groups)(x) if config.recipe.norm == "block" else x


def linear(
    config: DecoderConfig, name: str, x: jax.Array, features: int, quantizer: Quantizer | None
) -> jax.Array:
    """x: [..., in] -> [..., features] by the recipe's linear, after its own norm if the recipe's
    norms are in the linears; quantizer: the recipe's, of the linear's input."""
    groups = config.recipe.groups
    if config.recipe.norm == "linear":
        x = rms_norm(config, f"{name}_norm", groups if splits_inputs(name) else 1)(x)
    dense = BinaryDense(
        features,
        config.recipe.weight,
        quantizer,
        shifted_input=False,
        compute=config.compute,
        backward=config.backward,
        initializer_range=config.initializer_range,
        dtype=jnp.dtype(config.dtype),
        use_bias=False,
        groups=groups,
        name=name,
    )
    return dense(x)
