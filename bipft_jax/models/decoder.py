"""The decoder: blocks of causal attention and a gated feed-forward layer (BitNet SPEC 5)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bipft_jax.models.activations import ACTIVATIONS
from bipft_jax.models.attention import ATTENTION_MAPS
from bipft_jax.models.axes import BATCH, constrained
from bipft_jax.models.causal_attention import CACHE, CausalAttention
from bipft_jax.models.decoder_layers import block_norm, linear, rms_norm
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.layers import KEPT, BinaryEmbed, dense_initializer, logits_dtype
from bipft_jax.models.remat import saved

# Keys of a batch that the decoder takes, in this order.
CAUSAL_INPUTS = ("input_ids", "segment_ids")


class DecoderOutput(NamedTuple):
    """The output of `Decoder`: logits [B, S, vocab] of the next token."""

    logits: jax.Array


class GatedFeedForward(nn.Module):
    """The product of a gate and a linear of the input, sub-norm and output linear."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, S, H] -> [B, S, H]."""
        config, recipe = self.config, self.config.recipe
        gate = linear(config, "ffn_gate", x, config.intermediate, recipe.linear_input)
        inner = linear(config, "ffn_input", x, config.intermediate, recipe.linear_input)
        inner = ACTIVATIONS[recipe.gate](gate) * inner
        inner = block_norm(config, "ffn_sub_norm", inner, recipe.groups)
        return linear(config, "ffn_output", inner, config.hidden, recipe.ffn_output_input)


class DecoderLayer(nn.Module):
    """Attention and feed-forward layer, each added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array, start: jax.Array | None = None):
        """x: [B, S, H]; segments, start: as for `CausalAttention` -> (y, None): carry and output of
        the scan."""
        config = self.config
        a = block_norm(config, "attention_norm", x)
        x = x + CausalAttention(config, name="attention")(a, segments, start)
        b = block_norm(config, "ffn_norm", x)
        x = x + GatedFeedForward(config, name="feed_forward")(b)
        return constrained(x, BATCH, None, None), None


class Decoder(nn.Module):
    """Embedding, blocks, norm and head; embedding and head are full precision."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, input_ids, segment_ids, deterministic: bool = True, start=None
    ) -> DecoderOutput:
        """Logits of the token after each position.

        Arguments:
          input_ids: int [B, S].
          segment_ids: int [B, T], 0 at padding. A position sees the positions up to itself with its
            own number, so one number for all means a sequence that attention sees as one.
          deterministic: for the interface of `Objective`: a decoder has no dropout.
          start: None for a whole context, S = T; else int32 [], the place of input_ids in it
            (`CausalAttention`).
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        words = BinaryEmbed(
            config.vocab_size,
            config.hidden,
            None,
            config.initializer_range,
            dtype,
            padded=False,
            name="words",
        )
        x = constrained(words(input_ids), BATCH, None, None)
        x = self._layers(x, segment_ids, start)
        x = rms_norm(config, "final_norm")(x)
        if config.tied:
            return DecoderOutput(words.attend(x))
        head = nn.Dense(
            config.vocab_size,
            use_bias=False,
            dtype=dtype,
            kernel_init=dense_initializer(config.initializer_range),
            name="head",
        )
        return DecoderOutput(head(x).astype(logits_dtype(dtype)))

    def _layers(self, x: jax.Array, segments: jax.Array, start: jax.Array | None) -> jax.Array:
        """All layers; their parameters are stacked along a leading [layers] axis."""
        config, layer = self.config, DecoderLayer
        policy = saved(config.remat, config.recipe)
        if policy is not None:
            layer = nn.remat(layer, policy=policy, prevent_cse=not config.scan_layers)
        scanned = nn.scan(
            layer,
            variable_axes=dict.fromkeys(
                ("params", "intermediates", ATTENTION_MAPS, CACHE, KEPT), 0
            ),
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
            unroll=1 if config.scan_layers else config.layers,
        )
        return scanned(config, name="layers")(x, segments, start)[0]
