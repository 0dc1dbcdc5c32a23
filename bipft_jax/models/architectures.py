"""Architectures of encoders and decoders as checkpoints store them: JSON values."""

from __future__ import annotations

from bipft_jax.models import decoder_recipes, recipes
from bipft_jax.models.decoder_recipes import DECODER_RECIPES, DecoderConfig
from bipft_jax.models.recipes import BertConfig


def architecture(config: BertConfig | DecoderConfig) -> dict:
    """The architecture, for `config_of` to read."""
    if isinstance(config, DecoderConfig):
        return decoder_recipes.architecture(config)
    return recipes.architecture(config)


def config_of(described: dict, **overrides) -> BertConfig | DecoderConfig:
    """The configuration of an `architecture`; overrides: fields that belong to the run."""
    if is_decoder(described):
        return decoder_recipes.config_of(described, **overrides)
    return recipes.config_of(described, **overrides)


def is_decoder(described: dict) -> bool:
    """Whether an `architecture` is a decoder's."""
    return described["recipe"] in DECODER_RECIPES


def dimensions(described: dict) -> tuple[str, ...]:
    """The keys of an `architecture` that a warm start may not change."""
    return decoder_recipes.DIMENSIONS if is_decoder(described) else recipes.DIMENSIONS
