"""Binary self-attention, with low-rank estimators of the binarisation residual polynomials.

Dimension letters: B batch, S queries, T keys, h heads, d head width, r estimator rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from bipft_jax.models.dropout import Dropout
from bipft_jax.models.fused_attention import DropoutWords, Residuals, Scales, fused_attention
from bipft_jax.models.layers import binary_dense, dense_initializer, learned_scale, low_rank
from bipft_jax.models.recipes import BertConfig
from bipft_jax.quantization.arithmetic import widened
from bipft_jax.quantization.binary_dot import binary_dot_general
from bipft_jax.quantization.encoded import quantize

# The checkpoint name of queries, keys and values, for policies of `jax.checkpoint`.
PROJECTION = "projection"

# With `mutable=[STATISTICS]` attention reports ATTENDED_KEYS: the number of keys whose probability
# is not quantised to 0, averaged over tokens and heads. Under a nearly uniform softmax no
# probability reaches the threshold, and the context is silently 0.
STATISTICS = "statistics"
ATTENDED_KEYS = "attended_keys"

# With `mutable=[ATTENTION_MAPS]` attention reports "scores", scaled but not masked, and "probs",
# the factors of the values: both [B, h, S, T].
ATTENTION_MAPS = "attention_maps"


class SelfAttention(nn.Module):
    """Context of every position: softmax(q k^T / sqrt(d) + mask) v, quantised as the recipe says.

    With estimators (BiPFT-B), Q = Qb + dQ and K = Kb + dK give the scores the residual
    Qb dK^T + dQ Kb^T + dQ dK^T, modelled by four rank-r full-precision maps of the layer's input
    and shared by all heads, and V's residual by one rank-1 map shared by heads and channels
    (SPEC 2.2, steps 2 to 6).
    """

    config: BertConfig

    @nn.compact
    def __call__(self, x_BxSxH: jax.Array, mask_BxT: jax.Array, deterministic: bool):
        """x: [B, S, H]; mask: [B, S], 1 at real tokens -> context [B, S, H].

        Raises: ValueError for shapes that `fused_attention`, if configured, does not support.
        """
        config, recipe = self.config, self.config.recipe
        dtype = jnp.dtype(config.dtype)
        batch, length, _ = x_BxSxH.shape
        head_width = config.hidden // config.heads

        def projection(name: str) -> jax.Array:
            y = binary_dense(config, config.hidden, recipe.linear_input, name)(x_BxSxH)
            if recipe.lora_rank:
                y = y + low_rank(config, f"{name}_lora")(x_BxSxH)
            self.sow("intermediates", f"{name}_projection", y)
            return checkpoint_name(y, PROJECTION)

        q_BxSxH, k_BxTxH, v_BxTxH = map(projection, ("query", "key", "value"))
        quantizer = recipe.query_key_value
        query_scale = learned_scale(self, "query_scale", quantizer, q_BxSxH)
        key_scale = learned_scale(self, "key_scale", quantizer, k_BxTxH)
        value_scale = learned_scale(self, "value_scale", quantizer, v_BxTxH)

        def estimator(name: str, rank: int) -> jax.Array:
            dense = nn.Dense(
                rank,
                dtype=dtype,
                kernel_init=dense_initializer(config.initializer_range),
                name=f"{name}_estimator",
            )
            return dense(x_BxSxH)

        residual_BxSxT = dv_BxTx1 = None
        if recipe.estimator_rank:
            rank = recipe.estimator_rank
            dq, dk = estimator("query_residual", rank), estimator("key_residual", rank)
            q, k = estimator("query", rank), estimator("key", rank)
            residual_BxSxT = (q + dq) @ dk.swapaxes(1, 2) + dq @ k.swapaxes(1, 2)
            dv_BxTx1 = estimator("value_residual", 1)

        dropout = Dropout(config.dropout)
        reported = ("calibration", STATISTICS, ATTENTION_MAPS)
        if config.fused_attention and not any(map(self.is_mutable_collection, reported)):
            residuals = None
            if residual_BxSxT is not None:
                residuals = Residuals(residual_BxSxT, dv_BxTx1[..., 0])
            words = dropout.words((batch, config.heads, length, length), deterministic)
            return fused_attention(
                q_BxSxH,
                k_BxTxH,
                v_BxTxH,
                mask_BxT,
                Scales(
                    query_scale,
                    key_scale,
                    value_scale,
                    learned_scale(self, "probs_scale", recipe.attention_probs),
                ),
                residuals,
                words and DropoutWords(*words),
                heads=config.heads,
                dropout=config.dropout,
                backward=config.backward,
            )

        scores_BxhxSxT = binary_dot_general(
            q_BxSxH,
            k_BxTxH,
            (((3,), (3,)), ((0, 1), (0, 1))),
            lhs_quantizer=quantizer,
            rhs_quantizer=quantizer,
            lhs_scale=query_scale,
            rhs_scale=key_scale,
            lhs_heads=config.heads,
            rhs_heads=config.heads,
            compute=config.compute,
            backward=config.backward,
        )
        if residual_BxSxT is not None:
            scores_BxhxSxT = scores_BxhxSxT + residual_BxSxT[:, None]
        # float32 or wider up to the codes of the probabilities, as in the fused kernel: a softmax
        # in bfloat16 flips about 1 % of these codes.
        wide = widened(dtype)
        scores_BxhxSxT = scores_BxhxSxT.astype(wide) / jnp.asarray(head_width**0.5, wide)
        self.sow(ATTENTION_MAPS, "scores", scores_BxhxSxT)
        bias_BxT = (1 - mask_BxT).astype(wide) * jnp.finfo(wide).min
        probs_BxhxSxT = scores_BxhxSxT + bias_BxT[:, None, None, :]
        if recipe.softmax:
            probs_BxhxSxT = nn.softmax(probs_BxhxSxT)
        probs_BxhxSxT = dropout(probs_BxhxSxT, deterministic)

        prob_scale = learned_scale(self, "probs_scale", recipe.attention_probs, probs_BxhxSxT)
        if recipe.attention_probs is not None and self.is_mutable_collection(STATISTICS):
            on_BxhxSxT = quantize(probs_BxhxSxT, prob_scale, recipe.attention_probs) > 0
            of_tokens = on_BxhxSxT & (mask_BxT[:, None, :, None] > 0)
            tokens = config.heads * jnp.sum(mask_BxT, dtype=jnp.float32)
            attended = jnp.sum(of_tokens, dtype=jnp.float32) / tokens
            self.variable(STATISTICS, ATTENDED_KEYS, lambda: attended).value = attended
        if self.is_mutable_collection(ATTENTION_MAPS):
            multiplied = probs_BxhxSxT
            if recipe.attention_probs is not None:
                multiplied = quantize(multiplied, prob_scale, recipe.attention_probs)
            self.sow(ATTENTION_MAPS, "probs", multiplied)
        if recipe.attention_probs is None:
            probs_BxhxSxT = probs_BxhxSxT.astype(dtype)
        context_BxhxSxd = binary_dot_general(
            probs_BxhxSxT,
            v_BxTxH,
            (((3,), (2,)), ((0, 1), (0, 1))),
            lhs_quantizer=recipe.attention_probs,
            rhs_quantizer=quantizer,
            lhs_scale=prob_scale,
            rhs_scale=value_scale,
            rhs_heads=config.heads,
            compute=config.compute,
            backward=config.backward,
        ).astype(dtype)
        if dv_BxTx1 is not None:
            quantised = quantize(probs_BxhxSxT, prob_scale, recipe.attention_probs).astype(dtype)
            context_BxhxSxd = context_BxhxSxd + jnp.einsum("bhst,btu->bhsu", quantised, dv_BxTx1)
        return context_BxhxSxd.transpose(0, 2, 1, 3).reshape(batch, length, config.hidden)
