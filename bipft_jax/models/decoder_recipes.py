"""Recipes and sizes of decoders, as data: full precision and BitNet in one layout.

The counterpart of `recipes.py`. `DecoderConfig` combines recipe and size with the choices of a run.
"""

from __future__ import annotations

import dataclasses

from bipft_jax.errors import unknown_name
from bipft_jax.quantization.quantizers import AbsMax, MeanBinarizer, TernaryMean

GATES = ("relu2", "silu")  # of the feed-forward layer: names in `models.activations.ACTIVATIONS`
NORM_PLACES = ("block", "linear")
_ROPE_THETA = 10_000.0  # LLaMA's, of the papers


@dataclasses.dataclass(frozen=True)
class DecoderRecipe:
    """The quantizers and the block of a decoder. None means full precision.

    name: the key in `DECODER_RECIPES`.
    weight: of the kernels of a block's seven linears; embedding and head are never quantised.
    linear_input: of the inputs of those linears, except the last of the feed-forward layer, whose
      input has `ffn_output_input`.
    gate: activation function of the feed-forward layer's gate, one of `GATES`.
    norm: "block": a norm before attention and one before the feed-forward layer, and a sub-norm
      before the output linear of each (SubLN); "linear": a norm with a gain of its own in each
      linear, before its input's quantizer (BitNet SPEC 4).
    groups: the number of groups in which kernels, inputs and norms have their own statistics along
      the axes that `tensor` splits (BitNet SPEC 1.3).
    """

    name: str
    weight: MeanBinarizer | TernaryMean | None = None
    linear_input: AbsMax | None = None
    ffn_output_input: AbsMax | None = None
    gate: str = "relu2"
    norm: str = "block"
    groups: int = 1
    embedding = None  # full precision in every recipe

    def __post_init__(self):
        if self.gate not in GATES:
            raise unknown_name("gate", self.gate, GATES)
        if self.norm not in NORM_PLACES:
            raise unknown_name("place of norms", self.norm, NORM_PLACES)
        if self.groups < 1:
            raise ValueError(f"groups is {self.groups}: it must be 1 (none) or more")


DECODER_RECIPES: dict[str, DecoderRecipe] = {
    recipe.name: recipe
    for recipe in (
        DecoderRecipe("bitnet_fp"),  # their full-precision twin
        DecoderRecipe(
            "bitnet_b158",  # Ma et al. 2024, arXiv:2402.17764
            weight=TernaryMean(),
            linear_input=AbsMax(),
            ffn_output_input=AbsMax(),
        ),
        DecoderRecipe(
            "bitnet_b1",  # Wang et al. 2023, arXiv:2310.11453
            weight=MeanBinarizer(),
            linear_input=AbsMax(),
            ffn_output_input=AbsMax(),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class DecoderSize:
    """Dimensions of a decoder, and the base of its rotary embedding's wavelengths."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    rope_theta: float = _ROPE_THETA


def _size(layers: int, hidden: int, heads: int) -> DecoderSize:
    """Intermediate: 8/3 of hidden, so that the three matrices of the gated feed-forward layer have
    the parameters of two matrices of four times hidden; a multiple of 4."""
    return DecoderSize(layers, hidden, hidden * 8 // 3 // 4 * 4, heads, heads)


DECODER_SIZES: dict[str, DecoderSize] = {
    "tiny": _size(layers=2, hidden=128, heads=2),
    "mini": _size(layers=4, hidden=256, heads=4),
    "small": _size(layers=4, hidden=512, heads=8),
    # Of launch/bitnet_scaling.sh: heads of 16 channels for a CPU, of 64 for a GPU.
    "2x48": _size(layers=2, hidden=48, heads=3),
    "3x64": _size(layers=3, hidden=64, heads=4),
    "4x96": _size(layers=4, hidden=96, heads=6),
    "5x128": _size(layers=5, hidden=128, heads=8),
    "6x160": _size(layers=6, hidden=160, heads=10),
    "4x192": _size(layers=4, hidden=192, heads=3),
    "6x256": _size(layers=6, hidden=256, heads=4),
    "8x384": _size(layers=8, hidden=384, heads=6),
    "10x512": _size(layers=10, hidden=512, heads=8),
    "12x640": _size(layers=12, hidden=640, heads=10),
    # The sizes of the b1 paper; b1.58's 1.3b is the same.
    "125m": _size(layers=12, hidden=768, heads=12),
    "350m": _size(layers=24, hidden=1024, heads=16),
    "760m": _size(layers=24, hidden=1536, heads=16),
    "1.3b": _size(layers=24, hidden=2048, heads=32),
    "2.7b": _size(layers=32, hidden=2560, heads=32),
    "6.7b": _size(layers=32, hidden=4096, heads=32),
    "13b": _size(layers=40, hidden=5120, heads=40),
    "30b": _size(layers=48, hidden=7168, heads=56),
    # Of the b1.58 paper.
    "700m": DecoderSize(layers=24, hidden=1536, intermediate=4096, heads=24, kv_heads=24),
    "3b": DecoderSize(layers=26, hidden=3200, intermediate=8640, heads=32, kv_heads=32),
    "3.9b": DecoderSize(layers=26, hidden=3200, intermediate=12800, heads=32, kv_heads=32),
    # Of the released model.
    "2b": DecoderSize(
        layers=30, hidden=2560, intermediate=6912, heads=20, kv_heads=5, rope_theta=500_000.0
    ),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The configuration of a decoder's modules; hashable, so that it can be a static argument.

    kv_heads: heads of keys and values, each of which serves heads / kv_heads heads of queries.
    tied: whether the head is the embedding.
    rope_theta: base of the rotary embedding's wavelengths.
    dtype, compute, backward, remat, scan_layers: as in `recipes.BertConfig`.

    Raises: ValueError for dimensions that do not divide.
    """

    recipe: DecoderRecipe
    vocab_size: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    tied: bool = True
    rope_theta: float = _ROPE_THETA
    initializer_range: float = 0.02
    norm_epsilon: float = 1e-5
    dtype: str = "float32"
    compute: str = "auto"
    backward: str = "float32"
    remat: str = "none"
    scan_layers: bool = True

    def __post_init__(self):
        groups = self.recipe.groups
        for whole, part, name in (
            (self.hidden, self.heads, f"hidden size {self.hidden} is not a multiple of the heads"),
            (self.heads, self.kv_heads, f"{self.heads} heads are no multiple of the kv_heads"),
            (self.kv_heads, groups, f"{self.kv_heads} kv_heads are no multiple of the groups"),
            (
                self.intermediate,
                groups,
                f"intermediate size {self.intermediate} is not a multiple of the groups",
            ),
        ):
            if whole % part:
                raise ValueError(f"{name}, {part}")
        if self.head_width % 2:
            raise ValueError(
                f"a head is {self.head_width} wide (hidden {self.hidden} / heads {self.heads}): "
                "the rotary embedding needs an even width"
            )

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def weights_per_layer(self) -> int:
        """Entries of the kernels of a layer's linears."""
        of_keys = self.kv_heads * self.head_width
        return self.hidden * (2 * self.hidden + 2 * of_keys + 3 * self.intermediate)

    @property
    def split_sizes(self) -> tuple[tuple[str, str, int], ...]:
        """What a device mesh splits: (mesh axis, field, size). A group is never split: its
        statistics would cross the network."""
        sizes = (
            ("fsdp", "hidden", self.hidden),
            ("tensor", "kv_heads", self.kv_heads),
            ("tensor", "intermediate", self.intermediate),
        )
        groups = self.recipe.groups
        return (*sizes, ("tensor", "groups", groups)) if groups > 1 else sizes


def decoder_recipe_named(
    name: str, gate: str = "", norm: str = "", groups: int = 1
) -> DecoderRecipe:
    """The recipe of that name, with another block if `gate` or `norm` is not empty.

    Raises: ValueError for an unknown name (with the nearest ones).
    """
    if name not in DECODER_RECIPES:
        raise unknown_name("recipe", name, DECODER_RECIPES)
    recipe = DECODER_RECIPES[name]
    return dataclasses.replace(
        recipe, gate=gate or recipe.gate, norm=norm or recipe.norm, groups=groups
    )


def decoder_config(recipe: DecoderRecipe, size: str, vocab_size: int, **overrides) -> DecoderConfig:
    """The configuration of one of `DECODER_SIZES`; overrides: other fields of `DecoderConfig`.

    Raises: ValueError for an unknown size (with the nearest ones).
    """
    if size not in DECODER_SIZES:
        raise unknown_name("size", size, DECODER_SIZES)
    fields = dataclasses.asdict(DECODER_SIZES[size]) | overrides
    return DecoderConfig(recipe=recipe, vocab_size=vocab_size, **fields)


# The fields of recipe and configuration that, with the recipe's name, belong to the trained weights
# and not to the run.
_OF_RECIPE = ("gate", "norm", "groups")
_OF_CONFIG = (
    "vocab_size",
    "layers",
    "hidden",
    "intermediate",
    "heads",
    "kv_heads",
    "tied",
    "rope_theta",
    "initializer_range",
    "norm_epsilon",
)
DIMENSIONS = (*_OF_RECIPE, *_OF_CONFIG)


def architecture(config: DecoderConfig) -> dict:
    """The architecture as a checkpoint stores it: JSON values, for `config_of` to read."""
    return {
        "recipe": config.recipe.name,
        **{name: getattr(config.recipe, name) for name in _OF_RECIPE},
        **{name: getattr(config, name) for name in _OF_CONFIG},
    }


def config_of(described: dict, **overrides) -> DecoderConfig:
    """The `DecoderConfig` of an `architecture`; overrides: fields that belong to the run."""
    block = {name: described[name] for name in _OF_RECIPE}
    recipe = decoder_recipe_named(described["recipe"], **block)
    fields = {name: described[name] for name in _OF_CONFIG}
    return DecoderConfig(recipe=recipe, **fields, **overrides)
