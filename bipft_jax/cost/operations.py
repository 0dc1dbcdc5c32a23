"""Operations of one forward pass, as papers on binary networks count them.

A multiply-add is two operations. One of a w-bit and an a-bit code counts as w * a / 64 of a
full-precision one (XNOR-Net, Rastegari et al. 2016: a 64-bit word holds 64 one-bit products). The
papers count products only; elementwise operations are counted apart here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from bipft_jax.cost.products import FLOAT_BITS, Product, bits
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.recipes import BertConfig

_WORD = 64  # bits

# Operations per element: of the exact GELU erf, two multiplications and an addition; of LayerNorm
# sum, subtraction, square, sum, division, gain and bias; of RMSNorm square, sum, division and gain;
# of softmax scaling, exponential, sum and division; of a rotation two multiplications and an
# addition; of a gate its function (SiLU: exponential, addition, division) and the product.
_PER_ELEMENT = {
    **{"gelu": 4, "relu": 1, "layer_norm": 7, "rms_norm": 4, "softmax": 4, "rotation": 3},
    **{"relu2": 3, "silu": 4},
}


@dataclasses.dataclass(frozen=True)
class Operations:
    """Numbers of operations. full_precision: of products with a float operand. quantised: of
    products of codes, each counted as one. elementwise: all others.

    counted: full_precision + quantised at w * a / 64.
    """

    full_precision: float
    quantised: float
    counted: float
    elementwise: float


def operations(products: Iterable[Product], elementwise: float) -> Operations:
    """Sums of the products of a forward pass."""
    full_precision = quantised = counted = 0.0
    for product in products:
        flops = 2.0 * product.multiply_adds
        if product.quantised:
            quantised += flops
            counted += flops * product.left_bits * product.right_bits / _WORD
        else:
            full_precision += flops
            counted += flops
    return Operations(full_precision, quantised, counted, elementwise)


def elementwise_operations(config: BertConfig | DecoderConfig, length: int) -> int:
    """Operations on single numbers for one sequence of `length` tokens."""
    of_family = _of_decoder if isinstance(config, DecoderConfig) else _of_encoder
    return of_family(config, length)


def _of_encoder(config: BertConfig, length: int) -> int:
    """Additions, multiplications, comparisons and functions of single numbers, for one sequence:
    biases, shifts, quantisation, scales of products of codes, activation, residuals, softmax,
    LayerNorm, embeddings."""
    recipe, h, inner = config.recipe, config.hidden, config.intermediate
    outputs = 5 * h + inner  # channels of the six linears of a layer, a token
    inputs = 5 * h + inner  # of their inputs; query, key and value shift and quantise each its own
    scores = config.heads * length
    per_token = outputs + 2 * h  # biases, residual sums
    per_token += inner * _PER_ELEMENT[recipe.ffn_activation]
    per_token += 2 * h * _PER_ELEMENT["layer_norm"]
    if recipe.softmax:
        per_token += scores * _PER_ELEMENT["softmax"]
    if recipe.shifted_input:
        per_token += inputs
    if bits(recipe.linear_input) < FLOAT_BITS:
        per_token += inputs
    if bits(recipe.weight) < FLOAT_BITS:
        per_token += outputs  # the scale of each product
    if bits(recipe.query_key_value) < FLOAT_BITS:
        per_token += 3 * h + 2 * scores + h  # codes of q, k, v, probabilities; scales of products
    if recipe.estimator_rank:
        per_token += 4 * recipe.estimator_rank + 1 + scores + h  # biases, residuals added
    embeddings = h * (2 + _PER_ELEMENT["layer_norm"])
    pooler = h * (2 + (recipe.pooler == "layernorm_residual") * _PER_ELEMENT["layer_norm"])
    return length * (config.layers * per_token + embeddings) + pooler


def _of_decoder(config: DecoderConfig, length: int) -> int:
    """Norms, quantisation, scales of products of codes, rotation, softmax, gate, residuals."""
    recipe, h, inner = config.recipe, config.hidden, config.intermediate
    of_keys = config.kv_heads * config.head_width
    # Inputs of query, key, value and output linear, of gate, first and last of the feed-forward.
    inputs = 4 * h + 2 * h + inner
    outputs = 2 * h + 2 * of_keys + 2 * inner + h
    normed = 3 * h + inner if recipe.norm == "block" else inputs
    per_token = normed * _PER_ELEMENT["rms_norm"] + 2 * h  # residual sums
    per_token += (h + of_keys) * _PER_ELEMENT["rotation"]
    per_token += config.heads * length * _PER_ELEMENT["softmax"]
    per_token += inner * _PER_ELEMENT[recipe.gate]
    if bits(recipe.linear_input) < FLOAT_BITS:
        per_token += inputs
    if bits(recipe.weight) < FLOAT_BITS:
        per_token += outputs
    return length * (config.layers * per_token + h * _PER_ELEMENT["rms_norm"])
