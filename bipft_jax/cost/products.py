"""The matrix products of one forward pass, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.recipes import BertConfig
from bipft_jax.quantization.quantizers import Quantizer, TernaryMean

FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True)
class Product:
    """`count` products [rows, inner] x [inner, columns].

    left_bits, right_bits: of the codes of the operands; `FLOAT_BITS` for full precision.
    """

    name: str
    rows: int
    inner: int
    columns: int
    count: int = 1
    left_bits: int = FLOAT_BITS
    right_bits: int = FLOAT_BITS

    @property
    def multiply_adds(self) -> int:
        """Of all `count` products together."""
        return self.count * self.rows * self.inner * self.columns

    @property
    def quantised(self) -> bool:
        """Whether both operands are codes."""
        return FLOAT_BITS not in (self.left_bits, self.right_bits)


def bits(quantizer: Quantizer | None) -> int:
    """The bits of a quantizer's codes as they are stored; those without the attribute have one."""
    if quantizer is None:
        return FLOAT_BITS
    return 2 if isinstance(quantizer, TernaryMean) else getattr(quantizer, "bits", 1)


def products_of(config: BertConfig | DecoderConfig, length: int) -> list[Product]:
    """The products of one sequence of `length` tokens."""
    of_family = decoder_products if isinstance(config, DecoderConfig) else encoder_products
    return list(of_family(config, length))


def encoder_products(config: BertConfig, length: int) -> Iterator[Product]:
    """The products of one sequence of `length` tokens, embeddings to pooler, without heads.

    The estimators of BiPFT-B multiply in full precision (SPEC 2.2). Attention counts as one product
    of the hidden width, whatever its number of heads.
    """
    recipe, s, h, inner = config.recipe, length, config.hidden, config.intermediate
    layers, weight = config.layers, bits(config.recipe.weight)
    inputs, ffn_inputs = bits(recipe.linear_input), bits(recipe.ffn_output_input)
    qkv, probs = bits(recipe.query_key_value), bits(recipe.attention_probs)
    yield Product("query, key, value", s, h, h, 3 * layers, inputs, weight)
    yield Product("query x key", s, h, s, layers, qkv, qkv)
    yield Product("probabilities x value", s, s, h, layers, probs, qkv)
    yield Product("attention output", s, h, h, layers, inputs, weight)
    yield Product("feed-forward, first", s, h, inner, layers, inputs, weight)
    yield Product("feed-forward, second", s, inner, h, layers, ffn_inputs, weight)
    if rank := recipe.estimator_rank:
        yield Product("estimators", s, h, 4 * rank + 1, layers)
        yield Product("residual of the scores", s, rank, s, 2 * layers)
        yield Product("residual of the values", s, s, config.heads, layers)
    if rank := recipe.lora_rank:
        yield Product("low-rank, down", s, h, rank, 4 * layers)
        yield Product("low-rank, up", s, rank, h, 4 * layers)
    yield Product("pooler", 1, h, h, 1, inputs, weight)


def decoder_products(config: DecoderConfig, length: int) -> Iterator[Product]:
    """The products of the blocks of a decoder, without embedding and head.

    Attention's two products are full precision (BitNet SPEC 4), and count as one product of the
    hidden width each, without what the causal mask could save.
    """
    recipe, s, h, inner, layers = (
        config.recipe,
        length,
        config.hidden,
        config.intermediate,
        config.layers,
    )
    weight, inputs = bits(recipe.weight), bits(recipe.linear_input)
    of_keys = config.kv_heads * config.head_width
    yield Product("query", s, h, h, layers, inputs, weight)
    yield Product("key, value", s, h, of_keys, 2 * layers, inputs, weight)
    yield Product("query x key", s, h, s, layers)
    yield Product("probabilities x value", s, s, h, layers)
    yield Product("attention output", s, h, h, layers, inputs, weight)
    yield Product("feed-forward, gate and first", s, h, inner, 2 * layers, inputs, weight)
    ffn_inputs = bits(recipe.ffn_output_input)
    yield Product("feed-forward, last", s, inner, h, layers, ffn_inputs, weight)
