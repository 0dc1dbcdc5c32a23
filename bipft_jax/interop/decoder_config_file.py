"""Reads and writes the config.json of Hugging Face's `BitNetForCausalLM`.

Its class is the decoder in full precision. A `quantization_config` replaces the linears:

===============  ==========  ===========================================================
`linear_class`   mode        the weights of the linears
===============  ==========  ===========================================================
`autobitlinear`  `online`    latent; quantised as b1.58 at every call
`autobitlinear`  `offline`   packed 2-bit codes; `weight_scale` multiplies
`bitlinear`      `offline`   packed 2-bit codes; `weight_scale` divides
===============  ==========  ===========================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bipft_jax.interop.bitnet_weights import WEIGHT_SCALES
from bipft_jax.interop.config_file import fraction, require_values, whole_number
from bipft_jax.interop.family import Storage
from bipft_jax.models.decoder_recipes import (
    GATES,
    DecoderConfig,
    decoder_recipe_named,
)

LOADER = "BitNetForCausalLM"
MODEL_TYPE = "bitnet"
SEQUENCE_LENGTH_KEY = "max_position_embeddings"
TERNARY, FULL_PRECISION = "bitnet_b158", "bitnet_fp"  # the recipes that the class has

DECODER = "this library's BitNet"
# Fields of `DecoderConfig` as Hugging Face names them.
_SIZES = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}
# The same, with the values that the class has where a key is missing.
_FRACTIONS = {
    "initializer_range": ("initializer_range", 0.02),
    "norm_epsilon": ("rms_norm_eps", 1e-5),
}
_GATE, _TIED, _THETA = ("hidden_act", "relu2"), ("tie_word_embeddings", False), 500_000.0

# Keys that choose between kinds of decoder, with the values that ours supports.
_KEYS = {
    "architectures": (None, [LOADER]),
    "attention_bias": (None, False),
    "attention_dropout": (None, 0),
    "rope_scaling": (None, {"rope_type": "default"}),
    _GATE[0]: GATES,
    _TIED[0]: (True, False),
}
_QUANTIZATION = "quantization_config"
_QUANTIZATION_KEYS = {
    "quant_method": ("bitnet",),
    "linear_class": tuple(WEIGHT_SCALES),
    "quantization_mode": ("online", "offline"),
    "use_rms_norm": (False,),
    "modules_to_not_convert": (None, ["lm_head"]),
}


def read_decoder_config(
    described: Mapping[str, Any], recipe: str | None, path: Path
) -> tuple[DecoderConfig, str]:
    """The configuration of a decoder, and the class of its packed weights ("": they are latent).

    Arguments:
      described: the content of config.json.
      recipe: the name of a decoder's recipe, for a file without `quantization_config`; None means
        full precision.
      path: of config.json, for error messages.

    Raises: ValueError naming the file and the key: another kind of decoder, a missing size, a value
      of the wrong type or out of range, or a recipe that contradicts the file.
    """
    require_values(described, _KEYS, path, DECODER)
    for key in _SIZES.values():
        if key not in described:
            raise ValueError(f"{path} has no {key}, so it does not describe a BitNet")
    given = dict(described)
    if given["num_key_value_heads"] is None:
        given["num_key_value_heads"] = given["num_attention_heads"]
    sizes = {ours: whole_number(given[key], key, path) for ours, key in _SIZES.items()}
    fractions = {
        ours: fraction(described.get(key, default), key, path)
        for ours, (key, default) in _FRACTIONS.items()
    }
    name, packed = _quantised(described.get(_QUANTIZATION), recipe, path)
    rope_theta = _rope_theta(described, path)
    try:
        config = DecoderConfig(
            recipe=decoder_recipe_named(name, gate=described.get(*_GATE)),
            tied=described.get(*_TIED),
            rope_theta=rope_theta,
            **sizes,
            **fractions,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    require_values(described, {"head_dim": (None, config.head_width)}, path, "a head of this size")
    return config, packed


def _quantised(described: Any, recipe: str | None, path: Path) -> tuple[str, str]:
    """(the recipe's name, the class of packed weights or "")."""
    if described is None:
        return recipe or FULL_PRECISION, ""
    if not isinstance(described, dict) or "quant_method" not in described:
        raise ValueError(f"{path}: {_QUANTIZATION} is {described!r}, without a quant_method")
    require_values(described, _QUANTIZATION_KEYS, path, f"a {_QUANTIZATION} of {DECODER}")
    if recipe not in (None, TERNARY):
        raise ValueError(
            f"{path} has a {_QUANTIZATION}, so the recipe is {TERNARY}, not {recipe}: leave the "
            "recipe out"
        )
    if "linear_class" not in described:  # the default of transformers is easily not meant
        raise ValueError(
            f"{path}: {_QUANTIZATION} has no linear_class, which says what weight_scale means: "
            f"{' or '.join(WEIGHT_SCALES)}"
        )
    packed, mode = described["linear_class"], described.get("quantization_mode", "offline")
    if mode == "offline":
        return TERNARY, packed
    if packed == "bitlinear":
        raise ValueError(
            f"{path}: linear_class is 'bitlinear', whose weights are packed, but quantization_mode "
            "is 'online'"
        )
    return TERNARY, ""


def _rope_theta(described: Mapping[str, Any], path: Path) -> float:
    """From rope_parameters (transformers 5) or rope_theta."""
    parameters = described.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: rope_parameters is {parameters!r}, it must be an object")
    require_values(parameters, {"rope_type": ("default",)}, path, DECODER)
    if unknown := parameters.keys() - {"rope_type", "rope_theta"}:
        raise ValueError(
            f"{path}: rope_parameters has {', '.join(sorted(unknown))}, which {DECODER} lacks"
        )
    values = [at["rope_theta"] for at in (parameters, described) if "rope_theta" in at]
    for value in values:
        if type(value) not in (int, float) or not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{path}: rope_theta is {value!r}, it must be a number above 0")
    if len(set(values)) > 1:
        raise ValueError(
            f"{path}: rope_theta is {values[1]!r}, and {values[0]!r} in rope_parameters"
        )
    return float(values[0]) if values else _THETA


def decoder_described(config: DecoderConfig, storage: Storage) -> dict[str, Any]:
    """The content of config.json, without tokens.

    Raises: ValueError naming what the class cannot say: the recipe, groups, or norms in linears; or
      packed weights of a recipe without.
    """
    recipe = config.recipe
    for key, value, allowed in (
        ("recipe", recipe.name, (TERNARY, FULL_PRECISION)),
        ("decoder.groups", recipe.groups, (1,)),
        ("decoder.norm", recipe.norm, ("block",)),
    ):
        if value not in allowed:
            raise ValueError(
                f"{key} is {value!r}, but transformers' {LOADER} has only "
                f"{' or '.join(map(repr, allowed))}: such a model cannot be exported"
            )
    if storage.packed and recipe.weight is None:
        raise ValueError(f"recipe {recipe.name} has no quantised weights, which could be packed")
    quantised = {
        "quant_method": "bitnet",
        "linear_class": storage.packed or "autobitlinear",
        "quantization_mode": "offline" if storage.packed else "online",
    }
    return {
        "model_type": MODEL_TYPE,
        "architectures": [LOADER],
        **{key: getattr(config, ours) for ours, key in _SIZES.items()},
        **{key: getattr(config, ours) for ours, (key, _) in _FRACTIONS.items()},
        _GATE[0]: recipe.gate,
        _TIED[0]: config.tied,
        "rope_theta": config.rope_theta,
        "dtype": storage.dtype,
        **({} if recipe.weight is None else {_QUANTIZATION: quantised}),
    }
