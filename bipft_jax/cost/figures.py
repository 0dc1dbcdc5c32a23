"""All figures of one model, from its configuration and the shapes of its parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bipft_jax.cost.energy import PICOJOULES, Energy, energy
from bipft_jax.cost.memory import Part, parts
from bipft_jax.cost.operations import Operations, elementwise_operations, operations
from bipft_jax.cost.products import products_of
from bipft_jax.models.bert import SEQUENCE_INPUTS, Bert
from bipft_jax.models.decoder_recipes import DECODER_RECIPES, DecoderConfig
from bipft_jax.models.parameters import Params
from bipft_jax.models.recipes import RECIPES, BertConfig
from bipft_jax.objectives.causal_lm import CAUSAL_LM

ModelConfig = BertConfig | DecoderConfig

PRECISIONS = ("fp32", "fp16")


@dataclasses.dataclass(frozen=True)
class Figures:
    """parts: of the parameters. operations, joules: of one sequence of `length` tokens; joules by
    the precision of the full-precision products and the process node."""

    config: ModelConfig
    length: int
    parts: list[Part]
    operations: Operations
    joules: dict[tuple[str, str], Energy]

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "recipe": self.config.recipe.name,
            "length": self.length,
            "parts": [
                {**dataclasses.asdict(part), "packed_bytes": part.packed_bytes}
                for part in self.parts
            ],
            "operations": dataclasses.asdict(self.operations),
            "joules": {
                f"{precision} {node}": dataclasses.asdict(value)
                for (precision, node), value in self.joules.items()
            },
        }


def figures_of(config: ModelConfig, params: Params, length: int) -> Figures:
    """The figures of a model.

    params: arrays or shapes, as for `memory.parts`. length: tokens of the sequence.

    Raises: ValueError if the model is an encoder with fewer positions.
    """
    if isinstance(config, BertConfig) and length > config.max_positions:
        raise ValueError(
            f"length is {length}, but the model has {config.max_positions} positions: give at most "
            "as many"
        )
    products = products_of(config, length)
    return Figures(
        config=config,
        length=length,
        parts=parts(config, params, length),
        operations=operations(products, elementwise_operations(config, length)),
        joules={
            (precision, node): energy(products, node, precision)
            for precision in PRECISIONS
            for node in PICOJOULES
        },
    )


def twin_of(config: ModelConfig) -> ModelConfig:
    """The full-precision model of the same dimensions."""
    if isinstance(config, DecoderConfig):
        full = DECODER_RECIPES["bitnet_fp"]
        block = dict(gate=config.recipe.gate, norm=config.recipe.norm, groups=config.recipe.groups)
        return dataclasses.replace(config, recipe=dataclasses.replace(full, **block))
    return dataclasses.replace(config, recipe=RECIPES["fp"], fused_attention=False)


def shapes_of(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters of an encoder with its pooler, or of a decoder."""
    if isinstance(config, DecoderConfig):
        return CAUSAL_LM.abstract_params(config)
    ids = [jax.ShapeDtypeStruct((1, 1), jnp.int32)] * len(SEQUENCE_INPUTS)
    model = Bert(config)
    return jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, True), *ids)["params"]
