"""Reads a Hugging Face tokenizer.json that describes BERT's uncased WordPiece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The keys and values that describe what `WordPieceTokenizer` does.
_REQUIRED = {
    "model.continuing_subword_prefix": "##",
    "normalizer.type": "BertNormalizer",
    "normalizer.lowercase": True,
    "pre_tokenizer.type": "BertPreTokenizer",
}
_WHERE_GIVEN = {
    "model.type": "WordPiece",
    "model.unk_token": "[UNK]",
    "model.max_input_chars_per_word": 100,
    "normalizer.clean_text": True,
    "normalizer.handle_chinese_chars": True,
    "normalizer.strip_accents": True,
}


def is_of_hugging_face(content: Any) -> bool:
    """Whether the content of a JSON file is a Hugging Face tokenizer of any kind."""
    return isinstance(content, dict) and "model" in content and "kind" not in content


def wordpiece_vocabulary(content: Mapping[str, Any], where: str) -> list[str]:
    """The pieces in the order of their ids, without tokens added after the last one.

    Raises: ValueError naming the key: another kind of tokenizer, one that is cased or splits words
      differently, or ids that are not 0, 1, 2, ...
    """
    for key, wanted in (_WHERE_GIVEN | _REQUIRED).items():
        part, _, name = key.partition(".")
        inner = content.get(part)
        value = inner.get(name) if isinstance(inner, dict) else None
        if value != wanted and not (value is None and key in _WHERE_GIVEN):
            raise ValueError(
                f"{where}: {key} is {value!r}; only BERT's uncased WordPiece is read, which has "
                f"{wanted!r}."
            )
    vocabulary = content["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise ValueError(f"{where}: model.vocab is not an object of pieces and their ids.")
    ids = dict(vocabulary)
    for piece, value in ids.items():
        if type(value) is not int:
            raise ValueError(f"{where}: model.vocab has {value!r} as the id of {piece!r}.")
    last = max(ids.values(), default=-1)
    for token_id, piece in added_tokens(content, where).items():
        if token_id <= last and piece not in ids:  # some files list special pieces only there
            ids[piece] = token_id
    pieces = sorted(ids, key=ids.__getitem__)
    wrong = next((n for n, piece in enumerate(pieces) if ids[piece] != n), None)
    if wrong is not None:
        raise ValueError(
            f"{where}: the ids of model.vocab are not 0, 1, 2, ...: {pieces[wrong]!r} has "
            f"{ids[pieces[wrong]]} where {wrong} is next."
        )
    return pieces


def added_tokens(content: Mapping[str, Any], where: str) -> dict[int, str]:
    """The `added_tokens` of a tokenizer.json by id, including special pieces."""
    listed = content.get("added_tokens") or []
    try:
        return {int(token["id"]): str(token["content"]) for token in listed}
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{where}: added_tokens is not a list of objects with id and content ({error!r})."
        ) from error
