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


class CausalAttention(nn.Module):
    """Linears of queries, keys and values, attention, sub-norm and output linear."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """x: [B, S, H], segments: int [B, S] -> [B, S, H]. With `mutable=[ATTENTION_MAPS]` reports
        "probs" [B, heads, S, S]."""
        config, quantizer = self.config, self.config.recipe.linear_input
        of_queries, of_keys = (n * config.head_width for n in (config.heads, config.kv_heads))
        q = linear(config, "query", x, of_queries, quantizer)
        k = linear(config, "key", x, of_keys, quantizer)
        v = linear(config, "value", x, of_keys, quantizer)
        context, probs = causal_attention(config, q, k, v, segments)
        self.sow(ATTENTION_MAPS, "probs", probs)
        context = block_norm(config, "attention_sub_norm", context, config.recipe.groups)
        return linear(config, "attention_output", context, config.hidden, quantizer)


def causal_attention(
    config: DecoderConfig, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Context of every position, from the linears' outputs.

    Arguments:
      q: [B, S, heads * d]. k, v: [B, S, kv_heads * d].
      segments: int [B, S], 0 at padding: a position sees those up to itself that have its number.

    Returns: (context [B, S, heads * d], probabilities [B, heads, S, S]).
    """
    batch, length, _ = q.shape
    width, wide = config.head_width, widened(q.dtype)
    # Counted from the first real token: also left padding gives the positions of no padding.
    positions = jnp.maximum(jnp.cumsum(segments > 0, axis=1) - 1, 0)
    cos, sin = rotation(positions, width, config.rope_theta, q.dtype)
    q, k, v = (checkpoint_name(x, PROJECTION) for x in (q, k, v))
    q_BxSxhxd, k_BxTxkxd, v_BxTxkxd = (x.reshape(batch, length, -1, width) for x in (q, k, v))
    q_BxSxhxd, k_BxTxkxd = rotated(q_BxSxhxd, cos, sin), rotated(k_BxTxkxd, cos, sin)

    q_BxSxkxrxd = q_BxSxhxd.reshape(batch, length, config.kv_heads, -1, width)
    scores_BxkxrxSxT = jnp.einsum(
        "bskrd,btkd->bkrst", q_BxSxkxrxd, k_BxTxkxd, preferred_element_type=wide
    )
    scores_BxkxrxSxT = scores_BxkxrxSxT / jnp.asarray(width**0.5, wide)
    causal_SxT = jnp.tril(jnp.ones((length, length), bool))
    seen_BxSxT = (segments[:, :, None] == segments[:, None]) & causal_SxT[None]
    lowest = jnp.asarray(jnp.finfo(wide).min, wide)
    probs_BxkxrxSxT = nn.softmax(jnp.where(seen_BxSxT[:, None, None], scores_BxkxrxSxT, lowest))
    context_BxSxkxrxd = jnp.einsum(
        "bkrst,btkd->bskrd",
        probs_BxkxrxSxT.astype(q.dtype),
        v_BxTxkxd,
        preferred_element_type=wide,
    ).astype(q.dtype)
    maps = probs_BxkxrxSxT.reshape(batch, config.heads, length, length)
    return context_BxSxkxrxd.reshape(batch, length, -1), maps
