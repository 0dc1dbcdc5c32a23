"""Reads and writes the tokenizer files of a Hugging Face directory."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from bipft_jax.interop.config_file import read_object, require_values, write_object
from bipft_jax.interop.sentencepiece_json import library_tokenizer

VOCABULARY_NAME, SENTENCEPIECE_NAME = "vocab.txt", "spiece.model"
TOKENIZER_CONFIG_NAME, TOKENIZER_NAME = "tokenizer_config.json", "tokenizer.json"
ADDED_TOKENS_NAME = "added_tokens.json"

_OF_JSON = "PreTrainedTokenizerFast"  # tokenizer.json says which
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
        _OF_JSON,
        "TokenizersBackend",
        None,
    ),
}


def read_tokenizer(directory: Path) -> tuple[Tokenizer, list[str]]:
    """Reads vocab.txt, a SentencePiece .model or, without them, tokenizer.json.

    Returns: the tokenizer, and the tokens added after its vocabulary.

    Raises: ValueError naming the file, and the key if one is wrong: none or several vocabularies, a
      tokenizer of another kind, files that contradict each other.
    """
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


def write_tokenizer(tokenizer: Tokenizer, longest: int | None, directory: Path) -> None:
    """Writes vocab.txt, or a SentencePiece model and the tokenizer.json that `transformers` reads
    instead; and tokenizer_config.json.

    longest: tokens of the longest text for the model; None if that is not known.
    """
    described = {"tokenizer_class": _OF_JSON}
    match tokenizer:
        case SentencePieceTokenizer():
            model = base64.b64decode(tokenizer.to_dict()["model"])
            (directory / SENTENCEPIECE_NAME).write_bytes(model)
            library_tokenizer(model).save(str(directory / TOKENIZER_NAME))
        case WordPieceTokenizer():
            pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
            text = "".join(f"{piece}\n" for piece in pieces)
            (directory / VOCABULARY_NAME).write_text(text, encoding="utf-8", newline="\n")
            described = {key: values[0] for key, values in _TOKENIZER_KEYS.items()}
    write_object(
        directory / TOKENIZER_CONFIG_NAME,
        {
            **described,
            **({} if longest is None else {"model_max_length": longest}),
            "pad_token": PAD,
            "unk_token": UNK,
            "cls_token": CLS,
            "sep_token": SEP,
            "mask_token": MASK,
        },
    )


def transformers_tokenizer(tokenizer: Tokenizer) -> str:
    """The class of `transformers` that reads what `write_tokenizer` wrote."""
    wordpiece = isinstance(tokenizer, WordPieceTokenizer)
    return _TOKENIZER_KEYS["tokenizer_class"][0] if wordpiece else _OF_JSON
