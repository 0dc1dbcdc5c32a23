"""Models as Hugging Face directories, in and out: config.json, vocabulary and weights.

A full-precision model is written so that `transformers` loads it as a BERT. A binary one gets
another model_type, because a BERT of its latent weights would be another function. What says the
recipe again is the key "bipft_jax" of config.json, the `architecture` of the model.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from bipft_jax.data.glue import TASKS
from bipft_jax.data.tokenizers import (
    CLS,
    MASK,
    PAD,
    SEP,
    UNK,
    SentencePieceTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    load_tokenizer,
)
from bipft_jax.interop.model_card import heads, model_card
from bipft_jax.interop.torch_weights import (
    from_state_dict,
    known_unused,
    low_ranks,
    quantizer_names,
    slots,
    to_state_dict,
    usual_names,
    with_uninitialised_scales,
)
from bipft_jax.interop.weight_files import SAFETENSORS_NAME, read_weights
from bipft_jax.models.recipes import (
    DIMENSIONS,
    RECIPES,
    BertConfig,
    architecture,
    config_of,
    recipe_named,
)
from bipft_jax.training.parameters import check_parameters, named_leaves
from bipft_jax.training.warm_start import Source, abstract_params
from bipft_jax.training.workdir import absolute

OWN_TYPE = "bipft_jax"  # the model_type of binary models, and the key that holds the architecture
CONFIG_NAME, CARD_NAME = "config.json", "README.md"
VOCABULARY_NAME, SENTENCEPIECE_NAME = "vocab.txt", "spiece.model"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

# `DIMENSIONS` as Hugging Face names them.
_DIMENSIONS = {
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
# Keys that choose between kinds of BERT, with the values that our encoder and tokenizer have; a
# file without the key means the first.
_ENCODER_KEYS = {
    "model_type": ("bert", OWN_TYPE),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "tie_word_embeddings": (True,),
}
_FULL_PRECISION_KEYS = {"hidden_act": ("gelu",)}  # a recipe has its own activations
_TOKENIZER_KEYS = {
    "do_lower_case": (True,),
    "strip_accents": (None, True),
    "tokenize_chinese_chars": (True,),
}

_SMALLEST = BertConfig(RECIPES["fp"], 1, 1, 1, 1, 1)  # any: for the keys that describe a model

_POOLER, _MLM, _NSP = "bert.pooler.", "cls.predictions.", "cls.seq_relationship."
_DECODER, _WORDS = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
_CLASSIFIER = "classifier.weight"


def require_empty(directory: str | os.PathLike[str]) -> None:
    """Raises ValueError if the directory has anything in it, or is a file."""
    path = absolute(directory)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} is not empty, and nothing is overwritten: name a new directory")


def read_directory(
    directory: str | os.PathLike[str], recipe: str | None = None
) -> tuple[Source, list[str]]:
    """A model from config.json, vocab.txt or a SentencePiece .model, and model.safetensors or else
    pytorch_model.bin.

    Arguments:
      directory: as `transformers`, the references or `write_directory` write it.
      recipe: a name in `RECIPES`, for a directory that does not say its own; None means "fp".

    Returns: (the model as step 0 of a workdir, its parameters float32 NumPy arrays; names of arrays
      that the model does not use and that need not be used). Absent heads, and an absent pooler
      that no head needs, are the source's `missing`. A learned scale that the references left at
      exactly 1, which they never used as such, is NaN: `calibrate` gives it a value (SPEC 1.4).

    Raises: ValueError naming the file, and the key or array where that is what is wrong: a file is
      missing or unreadable or holds more than arrays, a kind of BERT that this library does not
      have, a vocabulary of another size, quantizers without a recipe, or arrays that do not fit.
    """
    directory = Path(directory)
    described = _read_json(directory / CONFIG_NAME)
    _require(described, _ENCODER_KEYS, directory / CONFIG_NAME)
    tokenizer = _read_tokenizer(directory)
    path, state = read_weights(directory)
    state = usual_names(state)
    config = _config(described, _recipe(described, recipe, state, path), directory / CONFIG_NAME)
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{directory / CONFIG_NAME}: vocab_size is {config.vocab_size}, but the vocabulary has "
            f"{tokenizer.vocab_size} pieces: the two belong to different models"
        )
    classes = _classes(described, state, directory / CONFIG_NAME)
    if {_DECODER, _WORDS} <= set(state) and not np.array_equal(state[_DECODER], state[_WORDS]):
        raise ValueError(
            f"{path}: {_DECODER} is not {_WORDS}, and this library's MLM head has the two tied"
        )
    absent = _absent(state, classes)
    params, _ = from_state_dict(
        state,
        config,
        classes,
        optional=lambda name: name.startswith(absent),
        source=str(path),
    )
    of_model = {slot.path for slot in slots(config, classes).values()}
    source = Source(
        workdir=str(directory),
        step=0,
        params=params if OWN_TYPE in described else with_uninitialised_scales(params),
        architecture=architecture(config),
        classes=classes,
        tokenizer=tokenizer,
        missing=tuple(sorted(of_model - set(named_leaves(params)))),
        run={
            "program": "import",
            "weights": str(path),
            "recipe": config.recipe.name,
            "labels": _named_labels(described, classes),
        },
    )
    return source, known_unused(state, config, classes)


def write_directory(source: Source, directory: str | os.PathLike[str]) -> None:
    """Writes config.json, tokenizer, model.safetensors and a model card (README.md).

    Arguments:
      source: parameters that are its `missing` are left out.
      directory: made if missing.

    Raises: ValueError if the directory is not empty, or the source lacks other parameters than
      those or has other shapes than its architecture.
    """
    require_empty(directory)
    config = source.config()
    check_parameters(
        source.params,
        abstract_params(config, source.classes),
        allowed_missing=source.missing.__contains__,
        source=f"{source.workdir} (step {source.step})",
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(source.tokenizer, config, directory)
    state = to_state_dict(source.params, config, source.classes, source.missing)
    # transformers refuses a file that does not say which framework's layout it has.
    safetensors.numpy.save_file(state, directory / SAFETENSORS_NAME, metadata={"format": "pt"})
    _write_json(directory / CONFIG_NAME, _described(source))
    card = model_card(source, transformers_class(source))
    (directory / CARD_NAME).write_text(card, encoding="utf-8")


def transformers_class(source: Source) -> str | None:
    """The class of `transformers` that has exactly this model's heads; None for a model that is no
    ordinary BERT."""
    if source.config().recipe != RECIPES["fp"]:
        return None
    if source.classes:
        return "BertForSequenceClassification"
    match heads(source):
        case ["MLM", "NSP"]:
            return "BertForPreTraining"
        case ["MLM"]:
            return "BertForMaskedLM"
        case ["NSP"]:
            return "BertForNextSentencePrediction"
    return "BertModel"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: give a Hugging Face directory") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def _require(
    described: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], path: Path
) -> None:
    for key, values in allowed.items():
        if key in described and described[key] not in values:
            raise ValueError(
                f"{path}: {key} is {described[key]!r}, but this library's BERT has only "
                f"{' or '.join(map(repr, values))}"
            )


def _recipe(
    described: Mapping[str, Any],
    named: str | None,
    state: Mapping[str, np.ndarray],
    path: Path,
) -> dict[str, Any]:
    """The arguments of `recipe_named`, the name as "recipe"."""
    if OWN_TYPE in described:
        own = described[OWN_TYPE]
        if not isinstance(own, dict) or set(own) != set(architecture(_SMALLEST)):
            raise ValueError(
                f"{path.parent / CONFIG_NAME}: {OWN_TYPE} is not what this library writes there, "
                f"an object with {', '.join(architecture(_SMALLEST))}"
            )
        own = {key: value for key, value in own.items() if key not in DIMENSIONS}
        if named not in (None, own["recipe"]):
            raise ValueError(
                f"{path.parent / CONFIG_NAME} says that the recipe is {own['recipe']}, not "
                f"{named}: leave the recipe out"
            )
        return own
    recipe = recipe_named(named or "fp")
    quantized = quantizer_names(state)
    if recipe.name == "fp" and quantized:
        raise ValueError(
            f"{path} has parameters of quantizers, such as {quantized[0]}, so it is not full "
            "precision: name its recipe (--recipe), one of "
            f"{', '.join(name for name in RECIPES if name != 'fp')}"
        )
    estimator_rank, lora_rank = low_ranks(state)
    if not (recipe.estimator_rank and estimator_rank):
        estimator_rank = -1  # the recipe's: arrays that are too many or too few are then named
    return {"recipe": recipe.name, "estimator_rank": estimator_rank, "lora_rank": lora_rank}


def _config(described: Mapping[str, Any], recipe: Mapping[str, Any], path: Path) -> BertConfig:
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(BertConfig)
        if field.default is not dataclasses.MISSING
    }
    dimensions = {}
    for ours, theirs in _DIMENSIONS.items():
        if theirs not in described and ours not in defaults:
            raise ValueError(f"{path} has no {theirs}, so it does not describe a BERT")
        value = described[theirs] if theirs in described else defaults[ours]
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{path}: {theirs} is {value!r}, it must be a positive number")
        dimensions[ours] = value
    config = config_of({**recipe, **dimensions})
    if config.recipe.name == "fp":
        _require(described, _FULL_PRECISION_KEYS, path)
    return config


def _classes(described: Mapping[str, Any], state: Mapping[str, np.ndarray], path: Path) -> int:
    """Outputs of the classifier, 0 without one."""
    if _CLASSIFIER not in state:
        return 0
    named = described.get("architectures") or ["BertForSequenceClassification"]
    if not any(name.endswith("ForSequenceClassification") for name in named):
        raise ValueError(
            f"{path}: architectures is {named}, but the only classifier that this library has is "
            "that of BertForSequenceClassification"
        )
    return len(state[_CLASSIFIER])


def _absent(state: Mapping[str, np.ndarray], classes: int) -> tuple[str, ...]:
    """Beginnings of the names of heads, and of a pooler, that the model does without. Of a part
    that is there at all, everything must be there."""
    optional = [_MLM, _NSP]
    if not classes and not any(name.startswith(_NSP) for name in state):
        optional.append(_POOLER)
    return tuple(part for part in optional if not any(name.startswith(part) for name in state))


def _read_tokenizer(directory: Path) -> Tokenizer:
    if (directory / TOKENIZER_CONFIG_NAME).exists():
        path = directory / TOKENIZER_CONFIG_NAME
        _require(_read_json(path), _TOKENIZER_KEYS, path)
    if (directory / VOCABULARY_NAME).exists():
        return load_tokenizer(directory / VOCABULARY_NAME)
    models = sorted(directory.glob("*.model"))
    if len(models) != 1:
        raise ValueError(
            f"{directory} has no {VOCABULARY_NAME} and {len(models)} SentencePiece .model files: "
            "it needs one vocabulary"
        )
    return load_tokenizer(models[0])


def _write_tokenizer(tokenizer: Tokenizer, config: BertConfig, directory: Path) -> None:
    match tokenizer:
        case SentencePieceTokenizer():
            model = base64.b64decode(tokenizer.to_dict()["model"])
            (directory / SENTENCEPIECE_NAME).write_bytes(model)
        case WordPieceTokenizer():
            pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
            text = "".join(f"{piece}\n" for piece in pieces)
            (directory / VOCABULARY_NAME).write_text(text, encoding="utf-8", newline="\n")
            _write_json(
                directory / TOKENIZER_CONFIG_NAME,
                {
                    "tokenizer_class": "BertTokenizer",
                    **{key: values[0] for key, values in _TOKENIZER_KEYS.items()},
                    "model_max_length": config.max_positions,
                    "pad_token": PAD,
                    "unk_token": UNK,
                    "cls_token": CLS,
                    "sep_token": SEP,
                    "mask_token": MASK,
                },
            )


def _described(source: Source) -> dict[str, Any]:
    """What config.json holds."""
    config, own_class = source.config(), transformers_class(source)
    described = {
        "model_type": "bert" if own_class else OWN_TYPE,
        **{theirs: getattr(config, ours) for ours, theirs in _DIMENSIONS.items()},
        "pad_token_id": source.tokenizer.pad_id,
        OWN_TYPE: source.architecture,
    }
    if own_class:
        described |= {
            "architectures": [own_class],
            "hidden_act": config.recipe.ffn_activation,
            "position_embedding_type": "absolute",
        }
    if source.classes:
        labels = _labels(source)
        regression = source.classes == 1
        described |= {
            "problem_type": "regression" if regression else "single_label_classification",
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
        }
    return described


def _labels(source: Source) -> list[str]:
    """The label names of the task that the run's configuration names, else Hugging Face's own."""
    task = TASKS.get(source.run.get("task"))
    if task is not None and task.label_names is not None:
        return list(task.label_names)
    return source.run.get("labels") or _nameless_labels(source.classes)


def _nameless_labels(classes: int) -> list[str]:
    return [f"LABEL_{number}" for number in range(classes)]


def _named_labels(described: Mapping[str, Any], classes: int) -> list[str]:
    """The labels of a classifier by its outputs, empty where config.json gives them no names."""
    names = described.get("id2label") or {}
    labels = [str(names.get(str(number))) for number in range(classes)] if names else []
    return labels if labels != _nameless_labels(classes) else []


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
