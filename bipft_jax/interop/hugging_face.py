"""Reads and writes models as Hugging Face directories: config.json, vocabulary and weights.

`transformers` loads a full-precision export as a BERT. A binary model gets another model_type,
because a BERT with its latent weights would compute another function.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from bipft_jax.checkpoints.source import Source
from bipft_jax.checkpoints.workdir import absolute
from bipft_jax.data.glue.own_tasks import task_of_run
from bipft_jax.data.tokenizer_json import added_tokens, is_of_hugging_face
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
from bipft_jax.interop.config_file import (
    CONFIG_NAME,
    DIMENSION_KEYS,
    OWN_TYPE,
    nameless_labels,
    read_classes,
    read_config,
    read_labels,
    read_object,
    require_values,
)
from bipft_jax.interop.model_card import heads, model_card
from bipft_jax.interop.torch_weights import (
    WORDS,
    from_state_dict,
    known_unused,
    slots,
    to_state_dict,
    usual_names,
    with_uninitialised_scales,
    without_surplus_rows,
)
from bipft_jax.interop.weight_files import SAFETENSORS_NAME, read_weights
from bipft_jax.models.parameters import check_parameters, named_leaves
from bipft_jax.models.recipes import RECIPES, BertConfig, architecture
from bipft_jax.objectives.classification import classification
from bipft_jax.objectives.mlm_nsp import MLM_NSP

CARD_NAME = "README.md"
VOCABULARY_NAME, SENTENCEPIECE_NAME = "vocab.txt", "spiece.model"
TOKENIZER_CONFIG_NAME, TOKENIZER_NAME = "tokenizer_config.json", "tokenizer.json"
ADDED_TOKENS_NAME = "added_tokens.json"

# Keys that choose between tokenizers, with the values that ours supports; the first is the default
# of a missing key.
_TOKENIZER_KEYS = {
    "do_lower_case": (True,),
    "strip_accents": (None, True),
    "tokenize_chinese_chars": (True,),
    "do_basic_tokenize": (True,),
    "tokenizer_class": (
        "BertTokenizer",
        "BertTokenizerFast",
        "DistilBertTokenizer",
        "DistilBertTokenizerFast",
        "ElectraTokenizer",
        "ElectraTokenizerFast",
        "PreTrainedTokenizerFast",  # tokenizer.json says which
        "TokenizersBackend",
        None,
    ),
}

_POOLER, _MLM, _NSP = "bert.pooler.", "cls.predictions.", "cls.seq_relationship."


def require_empty(directory: str | os.PathLike[str]) -> None:
    """Raises ValueError if the directory is not empty, or is a file."""
    path = absolute(directory)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} is not empty, and nothing is overwritten: name a new directory")


def read_directory(
    directory: str | os.PathLike[str], recipe: str | None = None
) -> tuple[Source, list[str]]:
    """Reads a model from config.json, its vocabulary (vocab.txt, a SentencePiece .model or, without
    them, tokenizer.json) and its weights (`read_weights`).

    Arguments:
      directory: as `transformers`, the references or `write_directory` write it.
      recipe: a name in `RECIPES`, for a directory without a recipe; None means "fp".

    Returns: (the model as step 0 of a workdir, with parameters as float32 NumPy arrays; names of
      arrays that the model does not need). Absent heads, and an absent pooler that no head needs,
      are the source's `missing`. A learned scale of exactly 1, which the references treat as
      uninitialised, becomes NaN, which `calibrate` initialises (SPEC 1.4). Embedding rows beyond
      the vocabulary are cut off; the source's `run` then has their number as "surplus_rows" and the
      tokens added for them as "added_tokens".

    Raises: ValueError naming the file and, if one is wrong, the key or array: a file is missing,
      unreadable or holds more than arrays; an unsupported kind of BERT or tokenizer; an invalid
      value; a vocabulary longer than the embedding; quantizers without a recipe; arrays that do not
      fit or are not finite.
    """
    directory = Path(directory)
    config_path = directory / CONFIG_NAME
    described = read_object(config_path)
    tokenizer, added = _read_tokenizer(directory)
    path, state = read_weights(directory)
    try:
        state = usual_names(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = read_config(described, recipe, state, path, config_path)
    rows = len(np.atleast_1d(state.get(WORDS, np.zeros(config.vocab_size))))
    if config.vocab_size not in (rows, tokenizer.vocab_size) or rows < tokenizer.vocab_size:
        raise ValueError(
            f"{config_path}: vocab_size is {config.vocab_size}, but the vocabulary has "
            f"{tokenizer.vocab_size} pieces and the embedding {rows} rows: they belong to "
            "different models"
        )
    surplus = rows - tokenizer.vocab_size  # from rounding up or from added tokens
    state = without_surplus_rows(state, tokenizer.vocab_size)
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    classes = read_classes(described, state, config_path)
    objective = classification(classes) if classes else MLM_NSP
    absent = _absent(state, classes)
    params, _ = from_state_dict(
        state,
        config,
        objective,
        optional=lambda name: name.startswith(absent),
        source=str(path),
    )
    of_model = {slot.path for slot in slots(config, objective).values()}
    source = Source(
        workdir=str(directory),
        step=0,
        params=params if OWN_TYPE in described else with_uninitialised_scales(params),
        architecture=architecture(config),
        objective=objective,
        tokenizer=tokenizer,
        missing=tuple(sorted(of_model - set(named_leaves(params)))),
        run={
            "program": "import",
            "weights": str(path),
            "recipe": config.recipe.name,
            "labels": read_labels(described, classes, config_path),
            **({"surplus_rows": surplus, "added_tokens": added} if surplus else {}),
        },
    )
    return source, known_unused(state, config, objective)


def write_directory(source: Source, directory: str | os.PathLike[str]) -> None:
    """Writes config.json, tokenizer, model.safetensors and a model card (README.md).

    Arguments:
      source: the model; parameters listed in `missing` are left out.
      directory: created if missing.

    Raises: ValueError if the directory is not empty, if the source lacks parameters not in
      `missing`, or if its shapes do not match its architecture.
    """
    require_empty(directory)
    config = source.config()
    check_parameters(
        source.params,
        source.objective.abstract_params(config),
        allowed_missing=source.missing.__contains__,
        source=f"{source.workdir} (step {source.step})",
    )
    state = to_state_dict(source.params, config, source.objective, source.missing)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(source.tokenizer, config, directory)
    # transformers rejects a file without the framework of its layout.
    safetensors.numpy.save_file(state, directory / SAFETENSORS_NAME, metadata={"format": "pt"})
    _write_json(directory / CONFIG_NAME, _described(source))
    card = model_card(source, transformers_class(source))
    (directory / CARD_NAME).write_text(card, encoding="utf-8")


def transformers_class(source: Source) -> str | None:
    """The class of `transformers` with exactly this model's heads; None if it is no plain BERT."""
    if source.config().recipe != RECIPES["fp"]:
        return None
    if source.objective.outputs:
        return "BertForSequenceClassification"
    match heads(source):
        case ["MLM", "NSP"]:
            return "BertForPreTraining"
        case ["MLM"]:
            return "BertForMaskedLM"
        case ["NSP"]:
            return "BertForNextSentencePrediction"
    return "BertModel"


def _absent(state: Mapping[str, np.ndarray], classes: int) -> tuple[str, ...]:
    """Name prefixes of heads, and of the pooler, that are absent as a whole. A part with any array
    must have all of them."""
    optional = [_MLM, _NSP]
    if not classes and not any(name.startswith(_NSP) for name in state):
        optional.append(_POOLER)
    return tuple(part for part in optional if not any(name.startswith(part) for name in state))


def _read_tokenizer(directory: Path) -> tuple[Tokenizer, list[str]]:
    """Returns the tokenizer, and the tokens added after its vocabulary."""
    described = {}
    if (directory / TOKENIZER_CONFIG_NAME).exists():
        described = read_object(directory / TOKENIZER_CONFIG_NAME)
        require_values(described, _TOKENIZER_KEYS, directory / TOKENIZER_CONFIG_NAME)
    vocabulary, other = directory / VOCABULARY_NAME, directory / TOKENIZER_NAME
    models = sorted(directory.glob("*.model"))
    if vocabulary.exists():
        tokenizer = load_tokenizer(vocabulary)
        if other.exists():
            _require_same(tokenizer, load_tokenizer(other), vocabulary, other)
    elif len(models) == 1:
        tokenizer = load_tokenizer(models[0])
    elif other.exists() and not models:
        tokenizer = load_tokenizer(other)
    else:
        raise ValueError(
            f"{directory} has no {VOCABULARY_NAME} and {len(models)} SentencePiece .model files"
            f"{'' if models else f' and no {TOKENIZER_NAME}'}: it needs one vocabulary"
        )
    added = {}
    for path, tokens in _added_tokens(directory, described).items():
        for token_id, token in tokens.items():
            if token_id >= tokenizer.vocab_size:
                added[token_id] = token
            elif token_id < 0 or tokenizer.id_to_piece(token_id) != token:
                raise ValueError(
                    f"{path} gives the id {token_id} to {token!r}, which the vocabulary gives to "
                    f"another piece: they belong to different models"
                )
    return tokenizer, [added[token_id] for token_id in sorted(added)]


def _require_same(ours: Tokenizer, theirs: Tokenizer, path: Path, other: Path) -> None:
    if ours.fingerprint == theirs.fingerprint:
        return
    pieces, others = ([t.id_to_piece(i) for i in range(t.vocab_size)] for t in (ours, theirs))
    for number, (piece, another) in enumerate(itertools.zip_longest(pieces, others)):
        if piece != another:
            raise ValueError(
                f"{path} and {other.name} contradict each other: the id {number} is {piece!r} in "
                f"the one and {another!r} in the other. Remove the one that is not the model's"
            )
    raise ValueError(f"{path} and {other.name} are of different kinds: remove one of them")


def _added_tokens(directory: Path, described: Mapping[str, Any]) -> dict[Path, dict[int, str]]:
    """The added tokens of each file by id; some repeat pieces of the vocabulary."""
    tokens = {}
    try:
        path = directory / TOKENIZER_CONFIG_NAME
        decoder = described.get("added_tokens_decoder") or {}
        tokens[path] = {int(number): token["content"] for number, token in decoder.items()}
        path = directory / ADDED_TOKENS_NAME
        if path.exists():
            tokens[path] = {int(number): token for token, number in read_object(path).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not list added tokens by id ({error!r})") from error
    path = directory / TOKENIZER_NAME
    if path.exists() and is_of_hugging_face(content := read_object(path)):
        tokens[path] = added_tokens(content, str(path))
    return tokens


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
    """The content of config.json."""
    config, own_class = source.config(), transformers_class(source)
    described = {
        "model_type": "bert" if own_class else OWN_TYPE,
        **{theirs: getattr(config, ours) for ours, theirs in DIMENSION_KEYS.items()},
        "pad_token_id": source.tokenizer.pad_id,
        OWN_TYPE: source.architecture,
    }
    if own_class:
        described |= {
            "architectures": [own_class],
            "hidden_act": config.recipe.ffn_activation,
            "position_embedding_type": "absolute",
        }
    if source.objective.outputs:
        labels = _labels(source)
        regression = source.objective.outputs == 1
        described |= {
            "problem_type": "regression" if regression else "single_label_classification",
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
        }
    return described


def _labels(source: Source) -> list[str]:
    """The label names of the task in the run's record, else Hugging Face's default names."""
    task = task_of_run(source.run)
    if task is not None and task.label_names is not None:
        return list(task.label_names)
    return source.run.get("labels") or nameless_labels(source.objective.outputs)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
