"""Causal self-attention with rotary positions and grouped queries; its products are float.

Dimension letters: B batch, S queries, T keys, k heads of keys and values, r queries per such head,
d head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from bipft_jax.models.attention import ATTENTION_MAPS, PROJECTION
from bipft_jax.models.decoder_layers import block_norm, linear
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.rope import rotated, rotation
from bipft_jax.quantization.arithmetic import widened

CACHE = "cache"  # the collection of keys and values of earlier calls


class CausalAttention(nn.Module):
    """Linears of queries, keys and values, attention, sub-norm and output linear."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, segments: jax.Array, start: jax.Array | None = None
    ) -> jax.Array:
        """x: [B, S, H] -> [B, S, H]. With `mutable=[ATTENTION_MAPS]` reports "probs"
        [B, heads, S, T].

        Arguments:
          segments: int [B, T], 0 at padding. A position sees those up to itself that have its
            number.
          start: None if x is the whole context (S = T); else the place of x in it, and `CACHE`,
            which must be mutable, has keys and values of the places before.
        """
        config, quantizer = self.config, self.config.recipe.linear_input
        batch, length, _ = x.shape
        of_queries, of_keys = (n * config.head_width for n in (config.heads, config.kv_heads))
        projections = (
            linear(config, "query", x, of_queries, quantizer),
            linear(config, "key", x, of_keys, quantizer),
            linear(config, "value", x, of_keys, quantizer),
        )
        q, k, v = (
            checkpoint_name(y, PROJECTION).reshape(batch, length, -1, config.head_width)
            for y in projections
        )
        # Counted from the first real token: also left padding gives the positions of no padding.
        positions = jnp.maximum(jnp.cumsum(segments > 0, axis=1) - 1, 0)
        places = jnp.arange(length)
        own_segments = segments
        if start is not None:
            places = places + start
            positions, own_segments = positions[:, places], segments[:, places]
        cos, sin = rotation(positions, config.head_width, config.rope_theta, x.dtype)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if start is not None:
            k, v = (
                self._cached("keys", k, segments, start),
                self._cached("values", v, segments, start),
            )
        causal_SxT = places[:, None] >= jnp.arange(segments.shape[1])[None]
        seen = (own_segments[:, :, None] == segments[:, None]) & causal_SxT[None]
        context, probs = attended(q, k, v, seen)
        self.sow(ATTENTION_MAPS, "probs", probs)
        context = block_norm(config, "attention_sub_norm", context, config.recipe.groups)
        return linear(config, "attention_output", context, config.hidden, quantizer)

    def _cached(self, name: str, new: jax.Array, segments: jax.Array, start: jax.Array):
        """All keys or values of the context, the new ones written at their place."""
        shape = (*segments.shape, *new.shape[2:])
        kept = self.variable(CACHE, name, lambda: jnp.zeros(shape, new.dtype))
        kept.value = jax.lax.dynamic_update_slice_in_dim(kept.value, new, start, axis=1)
        return kept.value


def attended(
    q_BxSxhxd: jax.Array, k_BxTxkxd: jax.Array, v_BxTxkxd: jax.Array, seen_BxSxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(d)) v over the keys that are seen, in float32 or wider up to the
    probabilities. Queries share the heads of keys in order: i // (heads / kv_heads).

    Returns: (context [B, S, heads * d], probabilities [B, heads, S, T]).
    """
    batch, length, heads, width = q_BxSxhxd.shape
    wide, kv_heads = widened(q_BxSxhxd.dtype), k_BxTxkxd.shape[2]
    q_BxSxkxrxd = q_BxSxhxd.reshape(batch, length, kv_heads, -1, width)
    scores_BxkxrxSxT = jnp.einsum(
        "bskrd,btkd->bkrst", q_BxSxkxrxd, k_BxTxkxd, preferred_element_type=wide
    )
    scores_BxkxrxSxT = scores_BxkxrxSxT / jnp.asarray(width**0.5, wide)
    lowest = jnp.asarray(jnp.finfo(wide).min, wide)
    probs_BxkxrxSxT = nn.softmax(jnp.where(seen_BxSxT[:, None, None], scores_BxkxrxSxT, lowest))
    context_BxSxkxrxd = jnp.einsum(
        "bkrst,btkd->bskrd",
        probs_BxkxrxSxT.astype(q_BxSxhxd.dtype),
        v_BxTxkxd,
        preferred_element_type=wide,
    ).astype(q_BxSxhxd.dtype)
    maps = probs_BxkxrxSxT.reshape(batch, heads, length, -1)
    return context_BxSxkxrxd.reshape(batch, length, -1), maps
