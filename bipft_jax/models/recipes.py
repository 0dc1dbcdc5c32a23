"""Recipes (what is quantised, and how) and sizes, as data.

A recipe names the quantizer of every operand of the encoder; a size gives the encoder's dimensions.
`BertConfig` combines the two with the choices of a run (vocabulary, dropout, arithmetic).
"""

from __future__ import annotations

import dataclasses

from bipft_jax.errors import unknown_name
from bipft_jax.quantization.quantizers import (
    ElasticSigned,
    ElasticUnsigned,
    MeanBinarizer,
    Quantizer,
    RowBinarizer,
    SignBinarizer,
    StepBinarizer,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The quantizers of the encoder. None means full precision.

    name: the key in `RECIPES`.
    weight: of the kernels of the six linears of a layer and of the pooler.
    embedding: of the word embedding's lookups (the MLM decoder is tied to the latent embedding).
    linear_input: of the inputs of those linears, except the second feed-forward linear, whose
      input has `ffn_output_input`.
    shifted_input: whether a learned shift is added to a linear's input before quantisation.
    query_key_value: of the queries, keys and values.
    softmax: whether attention applies softmax; without it `attention_probs` quantises the scores.
    attention_probs: of the attention probabilities, the factors of the values.
    ffn_activation, mlm_activation: "gelu" (exact erf form) or "relu".
    pooler: "tanh" (BERT), or "layernorm_residual": tanh(LN(linear(c)) + c) (BiPFT).
    estimator_rank: rank of BiPFT-B's estimators of the residual polynomials, 0 for none.
    lora_rank: rank of full-precision low-rank products added to the outputs of the query, key,
      value and attention output linears, 0 for none (SPEC 2.3, `improve_linear`).
    """

    name: str
    weight: MeanBinarizer | RowBinarizer | None = None
    embedding: MeanBinarizer | RowBinarizer | None = None
    linear_input: Quantizer | None = None
    ffn_output_input: Quantizer | None = None
    shifted_input: bool = False
    query_key_value: Quantizer | None = None
    softmax: bool = True
    attention_probs: Quantizer | None = None
    ffn_activation: str = "gelu"
    mlm_activation: str = "gelu"
    pooler: str = "tanh"
    estimator_rank: int = 0
    lora_rank: int = 0
    groups = 1  # a decoder's recipe may have more

    @property
    def fusible_attention(self) -> bool:
        """Whether `fused_attention.py` supports it: softmax, all operands 1-bit elastic."""
        operands = self.query_key_value, self.attention_probs
        return self.softmax and operands == (ElasticSigned(), ElasticUnsigned())


_BIPFT_A = Recipe(
    "bipft_a",  # the binary baseline (SPEC 2)
    weight=MeanBinarizer(),
    embedding=MeanBinarizer(per_row=True),
    linear_input=ElasticSigned(bits=1),
    ffn_output_input=ElasticSigned(bits=1),
    shifted_input=True,
    query_key_value=ElasticSigned(bits=1),
    attention_probs=ElasticUnsigned(bits=1),
    mlm_activation="relu",
    pooler="layernorm_residual",
)


def _bit(bits: int) -> Recipe:
    """BiT with 1-bit weights and `bits`-bit activations (SPEC 3)."""
    return Recipe(
        f"bit_w1a{bits}",
        weight=MeanBinarizer(),
        embedding=MeanBinarizer(per_row=True),
        linear_input=ElasticSigned(bits),
        ffn_output_input=ElasticUnsigned(bits),
        shifted_input=True,
        query_key_value=ElasticSigned(bits),
        attention_probs=ElasticUnsigned(bits),
        ffn_activation="relu",
        mlm_activation="relu",
    )


_BIBERT = Recipe(
    "bibert",  # SPEC 4
    weight=RowBinarizer(axis=0),  # kernels are [in, out]: a row is the inputs of one output
    embedding=RowBinarizer(axis=1),
    linear_input=SignBinarizer(window_includes_ends=True),
    ffn_output_input=SignBinarizer(window_includes_ends=True),
    query_key_value=SignBinarizer(window_includes_ends=False),
    softmax=False,
    attention_probs=StepBinarizer(),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp"),  # Devlin et al. 2018, BERT
        _BIPFT_A,
        dataclasses.replace(_BIPFT_A, name="bipft_b", estimator_rank=1),  # with estimators
        _bit(1),
        _bit(2),
        _bit(4),
        _BIBERT,
    )
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Dimensions of an encoder; the feed-forward layer is four times as wide as `hidden`."""

    layers: int
    hidden: int
    heads: int


BERT_VOCABULARY = 30522  # pieces of the released uncased models

SIZES: dict[str, Size] = {
    "tiny": Size(layers=2, hidden=128, heads=2),
    "mini": Size(layers=4, hidden=256, heads=4),
    "small": Size(layers=4, hidden=512, heads=8),
    "medium": Size(layers=8, hidden=512, heads=8),
    "minilm": Size(layers=6, hidden=384, heads=12),
    "base": Size(layers=12, hidden=768, heads=12),
    "large": Size(layers=24, hidden=1024, heads=16),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The configuration of all modules; hashable, so that it can be a static argument.

    dropout: probability, of hidden states and of attention probabilities.
    dtype: type of activations, "float32" or "bfloat16"; parameters are float32 (latent weights).
    compute, backward: arithmetic of products of codes and of their gradients
      (`quantization/arithmetic.py`).
    fused_attention: attention as one kernel per pass (`fused_attention.py`), for TPUs.
    remat: name in `models.remat.REMAT_POLICIES`: what a layer keeps for the backward pass.
    scan_layers: True scans one layer over stacked parameters (compiles in the time of one layer);
      False unrolls the scan over the same stacked parameters.
    """

    recipe: Recipe
    vocab_size: int
    layers: int
    hidden: int
    heads: int
    intermediate: int
    max_positions: int = 512
    segment_types: int = 2
    dropout: float = 0.1
    initializer_range: float = 0.02
    layer_norm_epsilon: float = 1e-12
    dtype: str = "float32"
    compute: str = "auto"
    backward: str = "float32"
    fused_attention: bool = False
    remat: str = "none"
    scan_layers: bool = True

    def __post_init__(self):
        if self.hidden % self.heads:
            raise ValueError(f"hidden size {self.hidden} is not a multiple of {self.heads} heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must be 0 or more, and less than 1")
        if self.fused_attention and self.compute == "simulated":
            raise ValueError("fused_attention multiplies codes: compute cannot be 'simulated'")
        if self.fused_attention and not self.recipe.fusible_attention:
            able = ", ".join(name for name, recipe in RECIPES.items() if recipe.fusible_attention)
            raise ValueError(
                f"recipe {self.recipe.name!r} has no fused attention (fused_attention=True): it is "
                f"for softmax of 1-bit operands ({able})"
            )

    @property
    def weights_per_layer(self) -> int:
        """Entries of the kernels of a layer's linears."""
        return 4 * self.hidden**2 + 2 * self.hidden * self.intermediate

    @property
    def split_sizes(self) -> tuple[tuple[str, str, int], ...]:
        """What a device mesh splits: (mesh axis, field, size)."""
        return (
            ("fsdp", "hidden", self.hidden),
            ("tensor", "heads", self.heads),
            ("tensor", "intermediate", self.intermediate),
        )


def recipe_named(
    name: str,
    estimator_rank: int = -1,
    lora_rank: int = 0,
    full_precision_weights: bool = False,
) -> Recipe:
    """The recipe of that name, with BiPFT's switches.

    Arguments:
      estimator_rank: if not negative, overrides the rank of the residual estimators.
      lora_rank: see `Recipe`.
      full_precision_weights: leaves the kernels of the linears unquantised (SPEC 2.3,
        `half_binary`); activations and embedding stay binary.

    Raises: ValueError for an unknown name (with the nearest ones), an estimator rank for a recipe
      without estimators, a negative lora_rank, or full_precision_weights for a recipe whose weights
      are full precision.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    recipe = RECIPES[name]
    if estimator_rank > 0 and not recipe.estimator_rank:
        raise ValueError(f"recipe {name!r} has no residual estimators: leave estimator_rank at -1")
    if lora_rank < 0:
        raise ValueError(f"lora_rank is {lora_rank}: it must be 0 (none) or a rank")
    if full_precision_weights and recipe.weight is None:
        raise ValueError(f"the weights of recipe {name!r} are full precision as they are")
    return dataclasses.replace(
        recipe,
        estimator_rank=recipe.estimator_rank if estimator_rank < 0 else estimator_rank,
        lora_rank=lora_rank,
        weight=None if full_precision_weights else recipe.weight,
    )


def bert_config(recipe: Recipe, size: str, vocab_size: int, **overrides) -> BertConfig:
    """The configuration of one of `SIZES`.

    Raises: ValueError for an unknown size (with the nearest ones).
    """
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    dims = SIZES[size]
    return BertConfig(
        recipe=recipe,
        vocab_size=vocab_size,
        layers=dims.layers,
        hidden=dims.hidden,
        heads=dims.heads,
        intermediate=4 * dims.hidden,
        **overrides,
    )


# The fields of `BertConfig` that, with the arguments of `recipe_named`, belong to the trained
# weights and not to the run.
DIMENSIONS = (
    "vocab_size",
    "layers",
    "hidden",
    "heads",
    "intermediate",
    "max_positions",
    "segment_types",
    "initializer_range",
    "layer_norm_epsilon",
)


def architecture(config: BertConfig) -> dict:
    """The architecture as a checkpoint stores it: JSON values, for `config_of` to read."""
    recipe, original = config.recipe, RECIPES[config.recipe.name]
    return {
        "recipe": recipe.name,
        "estimator_rank": recipe.estimator_rank,
        "lora_rank": recipe.lora_rank,
        "full_precision_weights": recipe.weight != original.weight,
        **{name: getattr(config, name) for name in DIMENSIONS},
    }


def config_of(described: dict, **overrides) -> BertConfig:
    """The `BertConfig` of an `architecture`; overrides: fields that belong to the run."""
    dimensions = {name: described[name] for name in DIMENSIONS}
    switches = {name: value for name, value in described.items() if name not in DIMENSIONS}
    return BertConfig(
        recipe=recipe_named(switches.pop("recipe"), **switches), **dimensions, **overrides
    )
