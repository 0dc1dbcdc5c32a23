"""How many floating-point operations the mathematics of an update needs."""

from __future__ import annotations

from bipft_jax.models.recipes import BertConfig


def update_flops(config: BertConfig, sequences: int, length: int, head_products: int) -> float:
    """Model FLOPs of one update of `sequences` x `length` tokens, as if nothing were quantised.

    Forward and backward, two operations a multiply-add, the backward pass twice the forward;
    matrix products only (Chowdhery et al. 2022, appendix B), so that recipes of one size are
    measured by one rule. head_products: multiply-adds of pooler and heads for a sequence.
    """
    h, inner, s = config.hidden, config.intermediate, length
    linears = config.layers * (4 * h * h + 2 * h * inner)
    attention = config.layers * 2 * s * h
    return 6.0 * sequences * (s * (linears + attention) + head_products)
