"""Reads and checks the config.json of a Hugging Face directory.

The key "bipft_jax" holds the recipe of a model that this library exported: its `architecture`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bipft_jax.interop.torch_weights import low_ranks, quantizer_names
from bipft_jax.json_text import parse_json
from bipft_jax.models.recipes import DIMENSIONS, RECIPES, BertConfig, config_of, recipe_named

CONFIG_NAME = "config.json"
OWN_TYPE = "bipft_jax"  # the model_type of binary models, and the key that holds the architecture

# `DIMENSIONS` as Hugging Face names them.
DIMENSION_KEYS = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "segment_types": "type_vocab_size",
    "initializer_range": "initializer_range",
    "layer_norm_epsilon": "layer_norm_eps",
}
# The smallest and largest plausible values. Two sentences need two segments.
_RANGE = (1, 2**24)
_RANGES = {"type_vocab_size": (2, 2**24), "num_hidden_layers": (1, 10_000)}
_FRACTIONS = ("initializer_range", "layer_norm_epsilon")

# Keys that choose between kinds of BERT, with the values that our encoder supports; the first is
# the default of a missing key.
_ENCODER_KEYS = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}
_FULL_PRECISION_KEYS = {"hidden_act": ("gelu",)}  # a recipe has its own activations
_OWN_KEYS = {  # of the object under OWN_TYPE, in addition to the dimensions
    "recipe": str,
    "estimator_rank": int,
    "lora_rank": int,
    "full_precision_weights": bool,
}

CLASSIFIER = "classifier.weight"


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of the directory.

    Raises: ValueError naming the file if it is missing, not JSON, or not an object.
    """
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: give a Hugging Face directory") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file of the directory."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_values(
    described: Mapping[str, Any],
    allowed: Mapping[str, tuple[Any, ...]],
    path: Path,
    model: str = "this library's BERT",
) -> None:
    """Raises ValueError naming file, key, value and model for a key whose value is not allowed."""
    for key, values in allowed.items():
        if key in described and described[key] not in values:
            raise ValueError(
                f"{path}: {key} is {described[key]!r}, but {model} has only "
                f"{' or '.join(map(repr, values))}"
            )


def read_config(
    described: Mapping[str, Any],
    recipe: str | None,
    state: Mapping[str, np.ndarray],
    weights: Path,
    path: Path,
) -> BertConfig:
    """The configuration of a model.

    Arguments:
      described: the content of config.json.
      recipe: a name in `RECIPES`, for a file without a recipe; None means "fp".
      state: the arrays of the model under their usual names.
      weights, path: paths of the weights and of config.json, for error messages.

    Raises: ValueError naming the file and the key: another kind of BERT, a value of the wrong type
      or out of range, a recipe that contradicts the file or the arrays.
    """
    require_values(described, _ENCODER_KEYS, path)
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(BertConfig)
        if field.default is not dataclasses.MISSING
    }
    dimensions = {}
    for ours, theirs in DIMENSION_KEYS.items():
        if theirs not in described and ours not in defaults:
            raise ValueError(f"{path} has no {theirs}, so it does not describe a BERT")
        value = described.get(theirs, defaults.get(ours))
        check = fraction if ours in _FRACTIONS else whole_number
        dimensions[ours] = check(value, theirs, path)
    if OWN_TYPE in described:
        switches = _own_switches(described[OWN_TYPE], recipe, dimensions, path)
    else:
        switches = _switches(recipe, state, weights)
    try:
        config = config_of({**switches, **dimensions})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if config.recipe.name == "fp":
        require_values(described, _FULL_PRECISION_KEYS, path)
    return config


def whole_number(value: Any, key: str, path: Path) -> int:
    """The value of a key of config.json. Raises: ValueError naming file and key for another one
    than a plausible size."""
    least, greatest = _RANGES.get(key, _RANGE)
    if type(value) is not int or not least <= value <= greatest:
        raise ValueError(
            f"{path}: {key} is {value!r}, it must be a positive number without a fraction, from "
            f"{least} to {greatest}"
        )
    return value


def fraction(value: Any, key: str, path: Path) -> float:
    """The value of a key of config.json. Raises: ValueError naming file and key for another one
    than a number between 0 and 1."""
    if type(value) not in (int, float) or not 0 < value < 1:
        raise ValueError(f"{path}: {key} is {value!r}, it must be a positive number below 1")
    return value


def _own_switches(
    own: Any, named: str | None, dimensions: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The arguments of `recipe_named`, with the name as "recipe", from this library's own key."""
    keys = (*_OWN_KEYS, *DIMENSIONS)
    if (
        not isinstance(own, dict)
        or set(own) != set(keys)
        or any(type(own[key]) is not kind for key, kind in _OWN_KEYS.items())
    ):
        raise ValueError(
            f"{path}: {OWN_TYPE} is not what this library writes there, an object with "
            f"{', '.join(keys)}"
        )
    for ours, value in dimensions.items():
        if own[ours] != value:
            raise ValueError(
                f"{path}: {DIMENSION_KEYS[ours]} is {value!r}, but {OWN_TYPE} says that {ours} is "
                f"{own[ours]!r}"
            )
    if named not in (None, own["recipe"]):
        raise ValueError(
            f"{path} says that the recipe is {own['recipe']}, not {named}: leave the recipe out"
        )
    return {key: own[key] for key in _OWN_KEYS}


def _switches(named: str | None, state: Mapping[str, np.ndarray], weights: Path) -> dict[str, Any]:
    """The arguments of `recipe_named`, with the name as "recipe", inferred from the arrays."""
    recipe = recipe_named(named or "fp")
    quantized = quantizer_names(state)
    if recipe.name == "fp" and quantized:
        raise ValueError(
            f"{weights} has parameters of quantizers, such as {quantized[0]}, so it is not full "
            "precision: name its recipe (--recipe), one of "
            f"{', '.join(name for name in RECIPES if name != 'fp')}"
        )
    estimator_rank, lora_rank = low_ranks(state)
    if not (recipe.estimator_rank and estimator_rank):
        estimator_rank = -1  # the recipe's; surplus or missing arrays then raise an error
    return {"recipe": recipe.name, "estimator_rank": estimator_rank, "lora_rank": lora_rank}


def read_classes(described: Mapping[str, Any], state: Mapping[str, np.ndarray], path: Path) -> int:
    """The number of outputs of the classifier; 0 without one.

    Raises: ValueError for a classifier other than BERT's for sequences, or one that is missing.
    """
    named = described.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{path}: architectures is {named!r}, it must be a list of names")
    classifies = any(name.endswith("ForSequenceClassification") for name in named)
    if CLASSIFIER not in state:
        if classifies:
            raise ValueError(
                f"{path}: architectures is {named}, but the weights have no {CLASSIFIER}"
            )
        return 0
    if named and not classifies:
        raise ValueError(
            f"{path}: architectures is {named}, but the only classifier that this library has is "
            "that of BertForSequenceClassification"
        )
    classes = len(np.atleast_1d(state[CLASSIFIER]))
    for key, expected in {
        "num_labels": classes,
        "problem_type": "regression" if classes == 1 else "single_label_classification",
    }.items():
        if described.get(key) not in (None, expected):
            raise ValueError(
                f"{path}: {key} is {described[key]!r}, it must be {expected!r} for a classifier of "
                f"{classes} outputs"
            )
    return classes


def nameless_labels(classes: int) -> list[str]:
    """Hugging Face's default names of outputs."""
    return [f"LABEL_{number}" for number in range(classes)]


def read_labels(described: Mapping[str, Any], classes: int, path: Path) -> list[str]:
    """The label names of a classifier's outputs, in order; empty if config.json does not name them.

    Raises: ValueError if id2label or label2id does not name each output, or if they differ.
    """
    if not classes:
        return []
    by_number, by_name = (described.get(key) or {} for key in ("id2label", "label2id"))
    for key, names in (("id2label", by_number), ("label2id", by_name)):
        if not isinstance(names, dict):
            raise ValueError(f"{path}: {key} is {names!r}, it must be an object")
    by_label = {str(number): name for name, number in by_name.items()}
    lists = [
        _labels(names, key, classes, path)
        for key, names in (("id2label", by_number), ("label2id", by_label))
        if names
    ]
    named = [labels for labels in lists if labels != nameless_labels(classes)]
    if len(named) == 2 and named[0] != named[1]:
        raise ValueError(
            f"{path}: id2label and label2id contradict each other: {', '.join(named[0])} and "
            f"{', '.join(named[1])}"
        )
    return named[0] if named else []


def _labels(names: Mapping[str, Any], key: str, classes: int, path: Path) -> list[str]:
    numbers = [str(number) for number in range(classes)]
    if set(names) != set(numbers):
        raise ValueError(
            f"{path}: {key} has the numbers {', '.join(names)}, but the classifier has {classes} "
            "outputs, from 0"
        )
    labels = [names[number] for number in numbers]
    if not all(isinstance(label, str) and label for label in labels):
        raise ValueError(f"{path}: {key} is {names!r}: each output must have a name")
    if len({label.casefold() for label in labels}) != classes:
        raise ValueError(f"{path}: {key} gives two outputs one name: {', '.join(labels)}")
    return labels
