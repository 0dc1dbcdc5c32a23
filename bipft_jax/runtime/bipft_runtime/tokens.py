"""Texts to token ids, as in finetuning: `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bipft_runtime.file import ModelFileError


class Tokens(NamedTuple):
    """One example: ids and segments, int32 [tokens]; cut: whether the text was too long."""

    ids: np.ndarray
    segments: np.ndarray
    cut: bool


class Tokenizer:
    """The tokenizer of a packed file."""

    def __init__(self, content: dict[str, Any]) -> None:
        """content: `tokenizer` of the file's metadata. Raises: ModelFileError if it is none."""
        try:
            kinds = {"wordpiece": _wordpiece, "sentencepiece": _sentencepiece}
            self._encode, ids = kinds[content["kind"]](content)
            self._cls, self._sep = ids("[CLS]"), ids("[SEP]")
        except Exception as error:  # whatever the libraries raise for damaged content
            raise ModelFileError(f"the tokenizer cannot be read ({error})") from error

    def example(self, first: str, second: str | None, max_length: int) -> Tokens:
        """One text, or a pair. Texts that are too long are cut at the end, the longer one first."""
        a = self._encode(first)
        b = [] if second is None else self._encode(second)
        kept_a, kept_b = _kept(len(a), len(b), max_length - (2 if second is None else 3))
        ids = [self._cls, *a[:kept_a], self._sep]
        segments = [0] * len(ids)
        if second is not None:
            ids += [*b[:kept_b], self._sep]
            segments += [1] * (kept_b + 1)
        cut = kept_a < len(a) or kept_b < len(b)
        return Tokens(np.array(ids, np.int32), np.array(segments, np.int32), cut)


def _kept(a: int, b: int, room: int) -> tuple[int, int]:
    """The tokens of each text to keep: the longer one is cut until both are equally long; an odd
    token stays with the one that was longer (the second, if neither was)."""
    if a + b <= room:
        return a, b
    shorter = min(a, b, room // 2)
    longer = room - shorter
    return (longer, shorter) if a > b else (shorter, longer)


def _wordpiece(content: dict[str, Any]) -> tuple[Callable[[str], list[int]], Callable[[str], int]]:
    import tokenizers

    ids = {piece: number for number, piece in enumerate(content["vocabulary"])}
    model = tokenizers.models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return lambda text: backend.encode(text, add_special_tokens=False).ids, ids.__getitem__


def _sentencepiece(content: dict[str, Any]):
    import sentencepiece

    backend = sentencepiece.SentencePieceProcessor()
    backend.LoadFromSerializedProto(base64.b64decode(content["model"], validate=True))
    return backend.EncodeAsIds, backend.PieceToId
