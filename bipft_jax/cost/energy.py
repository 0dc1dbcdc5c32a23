"""Arithmetic energy of matrix products, by BitNet's model (Wang et al. 2023, table 1 and figure 3).

A full-precision product [m, n] x [n, p] costs m n p multiplications and m (n - 1) p additions. One
of few-bit weights costs the same additions, in INT8, and m p + m n multiplications, in FP16, for
its scales. It is a model of arithmetic units: it has no memory traffic and is no measured speed.
For 1-bit activations INT8 additions are an upper bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from bipft_jax.cost.products import Product

_PICO = 1e-12

# Picojoules of one (addition, multiplication), by process node and type.
PICOJOULES: dict[str, dict[str, tuple[float, float]]] = {
    "45nm": {"fp32": (0.9, 3.7), "fp16": (0.4, 1.1), "int8": (0.03, 0.2)},
    "7nm": {"fp32": (0.38, 1.31), "fp16": (0.16, 0.34), "int8": (0.007, 0.07)},
}


@dataclasses.dataclass(frozen=True)
class Energy:
    """Joules of one forward pass."""

    multiplications: float
    additions: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.multiplications + self.additions


def energy(products: Iterable[Product], node: str, precision: str) -> Energy:
    """The energy of products.

    Arguments:
      node: a key of `PICOJOULES`.
      precision: "fp32" or "fp16", of the full-precision products; scales are FP16 (BitNet's model).
    """
    table = PICOJOULES[node]
    multiplications = additions = 0.0
    for product in products:
        m, n, p = product.rows, product.inner, product.columns
        added = product.count * m * (n - 1) * p
        if product.quantised:
            additions += added * table["int8"][0]
            multiplications += product.count * (m * p + m * n) * table["fp16"][1]
        else:
            additions += added * table[precision][0]
            multiplications += product.multiply_adds * table[precision][1]
    return Energy(multiplications * _PICO, additions * _PICO)


@dataclasses.dataclass(frozen=True)
class PublishedSize:
    """A size of BitNet b1; the feed-forward layer is four times as wide as `hidden`."""

    name: str
    hidden: int
    layers: int


PUBLISHED_SIZES = (
    PublishedSize("125M", 768, 12),
    PublishedSize("350M", 1024, 24),
    PublishedSize("760M", 1536, 24),
    PublishedSize("1.3B", 2048, 24),
    PublishedSize("2.7B", 2560, 32),
    PublishedSize("6.7B", 4096, 32),
    PublishedSize("13B", 5120, 40),
    PublishedSize("30B", 7168, 48),
)
PUBLISHED_TOKENS = 512


def published_products(size: PublishedSize, *, quantised: bool) -> Sequence[Product]:
    """The products that the paper counts for 512 tokens: six linears and attention's two, which are
    full precision; without causal saving, embedding and head. quantised: 1-bit weights and 8-bit
    activations in the linears."""
    h, tokens, layers = size.hidden, PUBLISHED_TOKENS, size.layers
    of_linears = {"left_bits": 8, "right_bits": 1} if quantised else {}
    return (
        Product("query, key, value, output", tokens, h, h, 4 * layers, **of_linears),
        Product("feed-forward, first", tokens, h, 4 * h, layers, **of_linears),
        Product("feed-forward, second", tokens, 4 * h, h, layers, **of_linears),
        Product("query x key", tokens, h, tokens, layers),
        Product("probabilities x value", tokens, tokens, h, layers),
    )
