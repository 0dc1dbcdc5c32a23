"""Bytes of a model's parameters by part: as floats, as papers on binary BERT count, as bits.

The parts come from the model's own parameters (shapes only), so they hold for every recipe, size
and head. A binarised matrix needs one bit a weight and its scales; zero codes, which a trained
model has none of or few, are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from bipft_jax.cost.products import FLOAT_BITS, bits
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.layers import BINARY_LINEARS
from bipft_jax.models.parameters import Params, is_scale, named_leaves
from bipft_jax.models.recipes import BertConfig

_FLOAT = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters of one kind. bits: of a stored weight. scales: number of scales of the codes.
    unread: parameters that a packed file leaves out."""

    name: str
    parameters: int
    bits: int = FLOAT_BITS
    scales: int = 0
    unread: int = 0

    @property
    def float_bytes(self) -> int:
        """As float32."""
        return _FLOAT * self.parameters

    @property
    def packed_bytes(self) -> float:
        """As a packed file stores it: codes as bits, everything else in float32."""
        return (self.parameters - self.unread) * self.bits / 8 + _FLOAT * self.scales


LINEARS, WORDS, POSITIONS, SEGMENTS = "linears", "word embedding", "positions", "segments"
BIASES, NORMS, SHIFTS, SCALES = "biases", "LayerNorms", "shifts", "learned scales"
ESTIMATORS, HEADS = "estimators, low-rank products", "heads"
_ORDER = (LINEARS, WORDS, POSITIONS, SEGMENTS, BIASES, NORMS, SHIFTS, SCALES, ESTIMATORS, HEADS)
_BERT = (LINEARS, WORDS, POSITIONS, SEGMENTS, BIASES, NORMS)  # what full-precision BERT has, too


def parts(config: BertConfig | DecoderConfig, params: Params, length: int) -> list[Part]:
    """The parts of a model.

    params: of a decoder, of `Bert`, or of a model with heads that has it as `bert`; arrays or
      shapes. length: tokens of the longest text of a packed file, which has no positions beyond.
    """
    encoder, heads = params, {}
    if "bert" in params:
        encoder = params["bert"]
        heads = {name: tree for name, tree in params.items() if name != "bert"}
    sums = {name: Part(name, 0) for name in _ORDER}
    kinds = [(leaf, *_kind(path, config)) for path, leaf in named_leaves(encoder).items()]
    kinds += [(leaf, HEADS, None) for leaf in named_leaves(heads).values()]
    for leaf, name, quantizer in kinds:
        before = sums[name]
        sums[name] = Part(
            name,
            before.parameters + leaf.size,
            bits(quantizer),
            before.scales + _scales(leaf, quantizer) * config.recipe.groups,
            leaf.size - length * leaf.shape[1] if name == POSITIONS else 0,
        )
    return [part for part in sums.values() if part.parameters]


def _kind(path: str, config: BertConfig | DecoderConfig) -> tuple[str, Any]:
    """The part that a parameter of encoder or decoder belongs to, and its quantizer."""
    module, leaf = path.split("/")[-2:]
    if module in BINARY_LINEARS and leaf == "kernel":
        return LINEARS, config.recipe.weight
    if module == "words":
        return WORDS, config.recipe.embedding
    if module in (POSITIONS, SEGMENTS):
        return module, None
    if module == "head":
        return HEADS, None
    if leaf == "input_shift":
        return SHIFTS, None
    if is_scale(path):
        return SCALES, None
    if module in BINARY_LINEARS:
        return BIASES, None
    return (NORMS if module.endswith("norm") else ESTIMATORS), None


def _scales(leaf: Any, quantizer: Any) -> int:
    """The number of scales of a quantised matrix, or stack of the layers' matrices."""
    if quantizer is None:
        return 0
    stack, shape = leaf.shape[: leaf.ndim - 2], leaf.shape[leaf.ndim - 2 :]
    matrix = jax.ShapeDtypeStruct(shape, leaf.dtype)
    encoded = jax.eval_shape(lambda x: quantizer.encode(x, None), matrix)
    return math.prod(stack) * math.prod(encoded.scale.shape)


def bits_of_every_matrix(all_parts: list[Part]) -> float:
    """Bytes if every matrix and table had the bits of the linears, and biases were float32: the
    convention of the 13.4 MB that papers on binary BERT base print."""
    of = {part.name: part for part in all_parts}
    matrices = sum(of[name].parameters for name in (LINEARS, WORDS, POSITIONS, SEGMENTS))
    return matrices * of[LINEARS].bits / 8 + of[BIASES].float_bytes


def bits_of_binary_matrices(all_parts: list[Part]) -> float:
    """Bytes with the codes' bits for binarised weights and float32 for the rest of what BERT has;
    what only binary models have (shifts, scales, estimators) is left out: 15.0 MiB and 28 times for
    base."""
    return sum(part.parameters * part.bits / 8 for part in all_parts if part.name in _BERT)


def bits_of_quantised_matrices(all_parts: list[Part]) -> float:
    """Bytes with the codes' bits for quantised weights, and float32 for their scales and all other
    parameters."""
    return sum(part.parameters * part.bits / 8 + _FLOAT * part.scales for part in all_parts)
