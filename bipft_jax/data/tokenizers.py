"""Text to token ids: one small interface over BERT's WordPiece and over SentencePiece.

`WordPieceTokenizer` is the uncased BERT tokenizer (Devlin et al. 2019), built from a `vocab.txt`;
released checkpoints need it. `SentencePieceTokenizer` (Kudo and Richardson 2018) is for training
from scratch on your own text, without case or so that decoding gives the text back. A prepared
corpus and every checkpoint contain the whole tokenizer, so that a model is never separated from its
vocabulary.
"""

import abc
import base64
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from bipft_jax.data.tokenizer_json import is_of_hugging_face, wordpiece_vocabulary
from bipft_jax.json_text import parse_json

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_PIECES = (PAD, UNK, CLS, SEP, MASK)

# Words repeat: with about 200,000 words cached, nearly all running text is looked up, several times
# as fast as tokenizing it. A full cache is cleared. Its size is counted in characters, because in
# text without spaces between words, whole sentences are "words".
_MAX_CACHED_CHARACTERS = 2_000_000

SPACE_SIGN = "\u2581"  # in the pieces of SentencePiece
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # its pieces of bytes
# Spaces at both ends and repeated, line ends, case, a compatibility and a rare character.
_HARD_TEXT = "  A b\n\n\tC\r\n \ufb01 \U0001f600 "


class Tokenizer(abc.ABC):
    """Maps text to ids in [0, vocab_size) and back; knows BERT's five special pieces.

    `encode` never adds special pieces and never produces the id of [CLS], [SEP], [MASK] or [PAD]:
    a literal "[MASK]" in running text is ordinary text. `[PAD]` always has id 0, so that
    zero-filled arrays are padded arrays.
    """

    keeps_text = False  # whether decoding ids without special ones gives back every text exactly

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids."""

    @abc.abstractmethod
    def id_to_piece(self, token_id: int) -> str:
        """The vocabulary entry with this id. Raises ValueError outside [0, vocab_size)."""

    @abc.abstractmethod
    def piece_to_id(self, piece: str) -> int | None:
        """The id of a vocabulary entry, or None if there is no such entry."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special pieces."""

    @abc.abstractmethod
    def _decode_ordinary(self, ids: list[int]) -> str:
        """The text of ids without special ones."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, object]:
        """A self-contained, JSON-serialisable description; `tokenizer_from_dict` is its inverse."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without special pieces."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text; special pieces appear as `[MASK]` etc., and spacing may differ."""
        parts = []
        for special, run in itertools.groupby(map(int, ids), key=self.special_ids.__contains__):
            if special:
                parts.extend(self.id_to_piece(token_id) for token_id in run)
            else:
                parts.append(self._decode_ordinary(list(run)))
        return " ".join(part for part in parts if part)

    @property
    def pad_id(self) -> int:
        return 0

    @property
    def unk_id(self) -> int:
        return self._special[UNK]

    @property
    def cls_id(self) -> int:
        return self._special[CLS]

    @property
    def sep_id(self) -> int:
        return self._special[SEP]

    @property
    def mask_id(self) -> int:
        return self._special[MASK]

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of the five special pieces."""
        return self._special_ids

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer's content: equal only for identical tokenizers."""
        return self._fingerprint

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dict()` as a JSON file; `load_tokenizer` reads it."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding="utf-8")

    def _finish_construction(self, where: str) -> None:
        """Looks up the special pieces and computes the fingerprint; constructors call it last."""
        self._special = {piece: self.piece_to_id(piece) for piece in SPECIAL_PIECES}
        missing = [piece for piece, token_id in self._special.items() if token_id is None]
        if missing:
            raise ValueError(f"{where}: the vocabulary lacks the special pieces {missing}.")
        if self._special[PAD] != 0:
            raise ValueError(f"{where}: [PAD] has id {self._special[PAD]}; it must have id 0.")
        self._special_ids = frozenset(self._special.values())
        content = json.dumps(self.to_dict(), sort_keys=True).encode()
        self._fingerprint = hashlib.sha256(content).hexdigest()

    def _check_id(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"Token id {token_id} is outside [0, {self.vocab_size}).")
        return int(token_id)


class WordPieceTokenizer(Tokenizer):
    """BERT's uncased WordPiece: lower case, accents stripped, greedy longest match per word."""

    def __init__(self, vocabulary: Sequence[str], where: str = "WordPiece vocabulary"):
        """Arguments:
          vocabulary: the pieces in the order of their ids, as in BERT's `vocab.txt`.
          where: source of the vocabulary, such as its file, for error messages.

        Raises:
          ValueError: for a duplicate or missing special piece, [PAD] not first, or a cased
            vocabulary.
        """
        self._pieces = list(vocabulary)
        self._ids = {piece: token_id for token_id, piece in enumerate(self._pieces)}
        if len(self._ids) != len(self._pieces):
            raise ValueError(f"{where}: {_first_duplicate(self._pieces)}")
        cased = [piece for piece in self._pieces if piece[:1] != "[" and piece != piece.lower()]
        if len(cased) > 0.01 * len(self._pieces):
            raise ValueError(
                f"{where}: {len(cased)} pieces have capital letters, such as {cased[0]!r}; "
                "only uncased vocabularies are supported."
            )
        self._finish_construction(where)
        model = tokenizers.models.WordPiece(
            vocab=self._ids, unk_token=UNK, max_input_chars_per_word=100
        )
        # No special token is registered with the library, so that "[MASK]" stays text.
        self._backend = tokenizers.Tokenizer(model)
        self._backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        self._backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        self._backend.decoder = tokenizers.decoders.WordPiece()
        self._word_ids: dict[str, list[int]] = {}
        self._cached_characters = 0

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "WordPieceTokenizer":
        """Reads BERT's `vocab.txt`: one piece a line, the line number is the id."""
        with open(path, encoding="utf-8-sig", newline="\n") as lines:
            try:
                pieces = [line.rstrip("\r\n") for line in lines]
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not a UTF-8 text file ({error}).") from error
        while pieces and not pieces[-1]:
            pieces.pop()  # a blank line at the end is no piece
        return cls(pieces, where=str(path))

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def id_to_piece(self, token_id: int) -> str:
        return self._pieces[self._check_id(token_id)]

    def piece_to_id(self, piece: str) -> int | None:
        return self._ids.get(piece)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # BERT first splits at every space, so each word can be looked up alone.
        known = self._word_ids
        encoded = []
        for text in texts:
            words = text.split(" ")
            try:
                encoded.append([token for word in words for token in known[word]])
            except KeyError:
                self._learn(words)
                encoded.append([token for word in words for token in known[word]])
        return encoded

    def _learn(self, words: list[str]) -> None:
        known = self._word_ids
        if self._cached_characters > _MAX_CACHED_CHARACTERS:
            known.clear()
            self._cached_characters = 0
        for word in words:
            if word not in known:
                known[word] = self._backend.encode(word, add_special_tokens=False).ids
                self._cached_characters += len(word)

    def _decode_ordinary(self, ids: list[int]) -> str:
        for token_id in ids:
            self._check_id(token_id)
        return self._backend.decode(ids, skip_special_tokens=False)

    def to_dict(self) -> dict[str, object]:
        return {"kind": "wordpiece", "vocabulary": self._pieces}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model whose pieces include the five special ones, [PAD] with id 0."""

    def __init__(self, model: bytes, where: str = "SentencePiece model"):
        """Arguments:
          model: the serialised model, i.e. the bytes of a `.model` file.
          where: source of the model, such as its file, for error messages.

        Raises:
          ValueError: if it is no SentencePiece model or lacks the special pieces.
        """
        self._model = bytes(model)
        self._backend = sentencepiece.SentencePieceProcessor()
        try:
            self._backend.LoadFromSerializedProto(self._model)
        except RuntimeError as error:
            raise ValueError(f"{where}: not a SentencePiece model ({error}).") from error
        self._finish_construction(where)
        has_bytes = all(self._backend.IsByte(self._backend.PieceToId(b)) for b in _BYTES)
        self.keeps_text = has_bytes and self.decode(self.encode(_HARD_TEXT)) == _HARD_TEXT
        for piece in (PAD, CLS, SEP, MASK):
            if not self._backend.IsControl(self._special[piece]):
                raise ValueError(
                    f"{where}: {piece} is not a control symbol, so it could come out of running "
                    "text; train the model with it among control_symbols."
                )

    @property
    def vocab_size(self) -> int:
        return self._backend.GetPieceSize()

    def id_to_piece(self, token_id: int) -> str:
        return self._backend.IdToPiece(self._check_id(token_id))

    def piece_to_id(self, piece: str) -> int | None:
        # The library returns the unknown id for a missing piece.
        token_id = self._backend.PieceToId(piece)
        return token_id if self._backend.IdToPiece(token_id) == piece else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._backend.EncodeAsIds(list(texts), num_threads=1)
        if self.keeps_text:
            for number, text in enumerate(texts):
                if SPACE_SIGN in text:
                    encoded[number] = self._with_signs(text)
        return encoded

    def _with_signs(self, text: str) -> list[int]:
        """The ids of a text with U+2581, by which the library means a space: its bytes instead."""
        first, *others = self._backend.EncodeAsIds(text.split(SPACE_SIGN))
        sign = [self._backend.PieceToId(_BYTES[byte]) for byte in SPACE_SIGN.encode()]
        return first + [token for ids in others for token in [*sign, *ids]]

    def _decode_ordinary(self, ids: list[int]) -> str:
        return self._backend.DecodeIds([self._check_id(token_id) for token_id in ids])

    def to_dict(self) -> dict[str, object]:
        return {"kind": "sentencepiece", "model": base64.b64encode(self._model).decode("ascii")}


def tokenizer_from_dict(content: dict[str, object], where: str = "tokenizer") -> Tokenizer:
    """The inverse of `Tokenizer.to_dict`. Raises ValueError, naming `where`, for anything else."""
    kind = content.get("kind") if isinstance(content, dict) else None
    try:
        if kind == "wordpiece":
            pieces = content["vocabulary"]
            if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
                raise ValueError(f"{where}: 'vocabulary' is not a list of pieces.")
            return WordPieceTokenizer(pieces, where=where)
        if kind == "sentencepiece":
            try:
                model = base64.b64decode(content["model"], validate=True)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: 'model' is not in base64 ({error}).") from error
            return SentencePieceTokenizer(model, where=where)
    except KeyError as error:
        raise ValueError(f"{where}: the key {error} of a {kind} tokenizer is missing.") from error
    raise ValueError(f"{where}: 'kind' is {kind!r}, expected 'wordpiece' or 'sentencepiece'.")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer file of any supported kind, recognised by its suffix.

    `.json`: written by `Tokenizer.save`, or Hugging Face's for an uncased WordPiece; `.txt`: BERT's
    vocabulary; `.model`: SentencePiece.

    Raises:
      ValueError: for another suffix, or a file that does not match its suffix.
      FileNotFoundError: if the file does not exist.
    """
    path = Path(path)
    if path.suffix == ".txt":
        return WordPieceTokenizer.from_file(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), where=str(path))
    if path.suffix == ".json":
        try:
            content = parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error}).") from error
        if is_of_hugging_face(content):
            return WordPieceTokenizer(wordpiece_vocabulary(content, str(path)), where=str(path))
        return tokenizer_from_dict(content, where=str(path))
    raise ValueError(
        f"{path}: a tokenizer is a vocab.txt, a tokenizer.json saved by this library or Hugging "
        "Face's of an uncased WordPiece, or a SentencePiece .model file."
    )


# Options of SentencePiece's training by whether the tokenizer keeps the text. Without: as uncased
# BERT. With: no normalisation, and bytes for rare characters, so that nothing is unknown.
_OPTIONS: dict[bool, dict[str, Any]] = {
    False: {"normalization_rule_name": "nmt_nfkc_cf"},
    True: {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "user_defined_symbols": ["\n"],
    },
}


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, keeps_text: bool = False
) -> SentencePieceTokenizer:
    """Trains a SentencePiece unigram model; the same texts give the same bytes.

    Arguments:
      texts: sentences or paragraphs, all held in memory: for a large corpus, pass a sample.
      vocab_size: number of ids, special pieces included, and 256 of bytes if it keeps the text.
      keeps_text: as of `Tokenizer`; else case is folded and white space normalised.

    Raises:
      ValueError: if there is no text, or too little for this vocabulary size.
    """
    model = io.BytesIO()
    lines = _short_lines(texts)
    first = next(lines, None)
    if first is None:
        raise ValueError("There is no text to train a SentencePiece model on.")
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece=PAD,
            unk_piece=UNK,
            control_symbols=[CLS, SEP, MASK],
            # Training sums in this many parts: a fixed number gives the same result on every
            # machine.
            num_threads=8,
            minloglevel=2,
            **_OPTIONS[keeps_text],
        )
    except (RuntimeError, OSError) as error:
        reason = re.sub(r"^.*?\] ?", "", str(error)).strip() or str(error)
        raise ValueError(
            f"Cannot train a SentencePiece model of {vocab_size} pieces on this text: {reason}"
        ) from error
    return SentencePieceTokenizer(model.getvalue())


def _short_lines(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts at spaces into lines within 4,192 bytes; SentencePiece drops longer ones."""
    for text in map(str.strip, texts):
        while len(text) > 1000:
            cut = text.rfind(" ", 0, 1000)
            cut = 1000 if cut <= 0 else cut
            yield text[:cut]
            text = text[cut:].lstrip(" ")
        if text:
            yield text


def _first_duplicate(pieces: Sequence[str]) -> str:
    first_line: dict[str, int] = {}
    for line, piece in enumerate(pieces, start=1):
        if piece in first_line:
            return f"line {line} repeats {piece!r} of line {first_line[piece]}."
        first_line[piece] = line
    raise AssertionError("no duplicate")
