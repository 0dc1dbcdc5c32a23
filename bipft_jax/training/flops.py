"""Model FLOPs of an update."""

from __future__ import annotations

from bipft_jax.models.recipes import BertConfig


def update_flops(config: BertConfig, sequences: int, length: int, head_products: int) -> float:
    """Model FLOPs of one update of `sequences` x `length` tokens, as if nothing were quantised.

    Counts matrix products only, forward and backward: two FLOPs per multiply-add, the backward
    pass twice the forward (Chowdhery et al. 2022, appendix B). Recipes of one size thus have equal
    model FLOPs. head_products: multiply-adds of pooler and heads per sequence.
    """
    h, inner, s = config.hidden, config.intermediate, length
    linears = config.layers * (4 * h * h + 2 * h * inner)
    attention = config.layers * 2 * s * h
    return 6.0 * sequences * (s * (linears + attention) + head_products)
