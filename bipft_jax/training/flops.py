"""Model FLOPs of an update."""

from __future__ import annotations

from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.recipes import BertConfig


def update_flops(
    config: BertConfig | DecoderConfig, sequences: int, length: int, head_products: int
) -> float:
    """Model FLOPs of one update of `sequences` x `length` tokens, as if nothing were quantised.

    Counts matrix products only, forward and backward: two FLOPs per multiply-add, the backward
    pass twice the forward (Chowdhery et al. 2022, appendix B). Recipes of one size thus have equal
    model FLOPs. head_products: multiply-adds of pooler and heads per sequence.
    """
    s = length
    linears = config.layers * config.weights_per_layer
    attention = config.layers * 2 * s * config.hidden
    return 6.0 * sequences * (s * (linears + attention) + head_products)
