"""Prepares a corpus: surveys the text, trains a tokenizer if asked, writes blocks and metadata.

The bytes are a function of the texts and the arguments alone; they do not depend on the number of
processes or on interruptions.
"""

import contextlib
import dataclasses
import hashlib
import heapq
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from bipft_jax.data.corpus import builder as corpus_builder
from bipft_jax.data.corpus.blocks import MINIMUM_SEQUENCE_LENGTH
from bipft_jax.data.corpus.builder import BlockSettings, NumberedDocument, SplitCounts
from bipft_jax.data.corpus.sources import Document, TextSource, open_sources
from bipft_jax.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from bipft_jax.json_text import parse_json
from bipft_jax.paths import replacing, require_local

FORMAT = 2  # of corpus.json; increase it when an old reader would misread the new file
METADATA = "corpus.json"
TOKENIZER = "tokenizer.json"
UNIGRAMS = "unigram.npy"
BLOCKS = "blocks"
TRAIN, VALIDATION = "train", "validation"
OBJECTIVES = ("mlm_nsp", "causal_lm")  # of objectives/table.py, those that learn from a corpus

_UNFINISHED = "unfinished"  # marks a directory as ours until corpus.json exists
# Tokenizers that are trained here, before a colon and the size; and whether they keep the text.
_TRAINED = {"sentencepiece": False, "sentencepiece-cased": True}
_SAMPLE_BYTES = 10_000_000  # of text to train a SentencePiece model on


@dataclasses.dataclass(frozen=True)
class CorpusRequest:
    """What to prepare; see `python -m bipft_jax.data.corpus --help`.

    Attributes:
      input: globs, `tfds:...` or an embedded corpus (see `sources`), for training.
      tokenizer: a tokenizer file, `sentencepiece:VOCAB_SIZE` or `sentencepiece-cased:VOCAB_SIZE`.
      validation_input: as `input`; if empty, `validation_fraction` of the documents is held out.
      validation_fraction: between 0 and 1, exclusive.
      sequence_length: of an example, special pieces included.
      short_sequence_probability: probability that a block's target length is random.
      seed: seed of the short blocks and of the choice of held-out documents.
    """

    input: Sequence[str]
    tokenizer: str
    validation_input: Sequence[str] = ()
    validation_fraction: float = 0.01
    sequence_length: int = 128
    short_sequence_probability: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; it must be between 0 and 1."
            )
        if not 0 <= self.short_sequence_probability <= 1:
            raise ValueError(
                "short_sequence_probability is "
                f"{self.short_sequence_probability}; it must be from 0 to 1."
            )
        if self.sequence_length < MINIMUM_SEQUENCE_LENGTH:
            raise ValueError(
                f"sequence_length is {self.sequence_length}; it must be at least "
                f"{MINIMUM_SEQUENCE_LENGTH}."
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative.")


def prepare_corpus(
    request: CorpusRequest, output: str | os.PathLike[str], num_processes: int
) -> bool:
    """Prepares `output` and returns True, or False if it is already prepared as requested.

    Raises:
      ValueError: for unreadable or unusable text, a tokenizer that cannot be loaded or trained, an
        output directory that holds something else, or a URL such as gs://.
    """
    require_local({**vars(request), "output": output})
    output = Path(output)
    if num_processes < 1:
        raise ValueError(f"The number of processes is {num_processes}; it must be at least 1.")
    train_sources = open_sources(request.input)
    validation_sources = open_sources(request.validation_input)
    trained = trained_tokenizer(request.tokenizer)
    tokenizer = load_tokenizer(request.tokenizer) if trained is None else None

    identity = _identity(request, train_sources, validation_sources, tokenizer)
    _check_disjoint(train_sources, validation_sources, identity)
    if _is_prepared(output, identity):
        return False
    _claim(output)

    survey = _Survey(train_sources, validation_sources, request, trained is not None)
    if trained is not None:
        tokenizer = train_sentencepiece(survey.sample(), *trained)
    settings = BlockSettings(
        request.sequence_length, request.short_sequence_probability, request.seed
    )
    splits = _write_blocks(survey, tokenizer, settings, output / BLOCKS, num_processes)

    tokenizer.save(output / TOKENIZER)
    np.save(output / UNIGRAMS, splits[TRAIN].unigrams)
    metadata = {
        "format": FORMAT,
        "identity": identity,
        **_served(tokenizer),
        "inputs": [source.name for source in train_sources],
        "validation_inputs": [source.name for source in validation_sources],
        "splits": {name: _split_metadata(counts) for name, counts in splits.items()},
        "file_sizes": file_sizes(output / BLOCKS),
    }
    with replacing(output / METADATA) as temporary:
        temporary.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (output / _UNFINISHED).unlink()
    return True


def file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file of a directory, by name."""
    return {path.name: path.stat().st_size for path in sorted(directory.glob("*"))}


class _Survey:
    """A first pass over all text, cheap compared with tokenization.

    It fails early on unreadable text, counts the bytes for the progress bar, chooses the held-out
    documents, and samples the text that a tokenizer is trained on.
    """

    def __init__(
        self,
        train_sources: Sequence[TextSource],
        validation_sources: Sequence[TextSource],
        request: CorpusRequest,
        take_sample: bool,
    ):
        self._train_sources = train_sources
        self._validation_sources = validation_sources
        self._limit = request.validation_fraction * 2**64
        self._seed = request.seed
        self._hold_out = not validation_sources
        self._forced: frozenset[int] = frozenset()
        self._sample = _Sample()
        self.total_bytes = 0

        smallest: list[tuple[int, int]] = []  # hash and number of documents, at most two
        self.num_held_out = 0
        documents = (document for source in train_sources for document in source.documents())
        with _progress("reading") as bar:
            for number, document in enumerate(documents):
                self.total_bytes += document.num_bytes
                bar.update(document.num_bytes)
                if self._is_held_out(number, document):
                    self.num_held_out += 1
                elif take_sample:
                    self._sample.add(number, document)
                if document.held_out is None:
                    smallest = heapq.nsmallest(2, [*smallest, (self._hash(number), number)])
            for source in validation_sources:
                for document in source.documents():
                    self.total_bytes += document.num_bytes
                    bar.update(document.num_bytes)
        if self._hold_out and self.num_held_out < 2:
            # Too few documents for the fraction; next-sentence pairs need two.
            self._forced = frozenset(n for hash_, n in smallest if hash_ >= self._limit)
            self.num_held_out += len(self._forced)

    def documents(self) -> Iterator[NumberedDocument]:
        """All documents, numbered, with their splits.

        Raises: ValueError if the text changed since the first pass.
        """
        number = read_bytes = 0
        for source in self._train_sources:
            for document in source.documents():
                read_bytes += document.num_bytes
                if not self._is_held_out(number, document):
                    yield NumberedDocument(number, TRAIN, document)
                elif self._hold_out:
                    yield NumberedDocument(number, VALIDATION, document)
                number += 1
        for source in self._validation_sources:
            for document in source.documents():
                read_bytes += document.num_bytes
                if document.held_out is not False:
                    yield NumberedDocument(number, VALIDATION, document)
                number += 1
        if read_bytes != self.total_bytes:
            raise ValueError(
                f"The text changed while it was being prepared: it had {self.total_bytes:,} bytes "
                f"first, {read_bytes:,} then. Prepare it again when nothing writes to it any more."
            )

    def sample(self) -> list[str]:
        """Paragraphs of the train split, evenly spread over it."""
        return [text for number, text in self._sample.items if number not in self._forced]

    def _is_held_out(self, number: int, document: Document) -> bool:
        if document.held_out is not None:
            return document.held_out
        if not self._hold_out:
            return False
        return number in self._forced or self._hash(number) < self._limit

    def _hash(self, number: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}:{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


class _Sample:
    """Every k-th paragraph of a stream, k doubling whenever the sample gets too large."""

    def __init__(self) -> None:
        self.items: list[tuple[int, str]] = []
        self._stride = 1
        self._seen = 0
        self._bytes = 0

    def add(self, number: int, document: Document) -> None:
        for paragraph in document.text.split("\n"):
            if self._seen % self._stride == 0:
                self.items.append((number, paragraph))
                self._bytes += len(paragraph)
            self._seen += 1
            if self._bytes > _SAMPLE_BYTES and len(self.items) > 1:
                self.items = self.items[::2]
                self._stride *= 2
                self._bytes = sum(len(text) for _, text in self.items)


def _write_blocks(
    survey: _Survey,
    tokenizer: Tokenizer,
    settings: BlockSettings,
    directory: Path,
    num_processes: int,
) -> dict[str, SplitCounts]:
    splits = {
        split: SplitCounts(np.zeros(tokenizer.vocab_size, np.int64))
        for split in (TRAIN, VALIDATION)
    }
    directory.mkdir()
    encoded = corpus_builder.encode_documents(
        survey.documents(), tokenizer, settings, num_processes
    )
    # English has slightly more than four bytes per token, and blocks are not quite full.
    expected_records = survey.total_bytes // (4 * settings.sequence_length)
    with (
        corpus_builder.DatasetWriter(directory, expected_records) as writer,
        contextlib.closing(encoded),
        _progress("tokenizing", survey.total_bytes) as bar,
    ):
        for parts in encoded:
            for split, part in parts.items():
                writer.write(split, part.records)
                splits[split].add(part.counts)
                bar.update(part.counts.raw_bytes)
        _check_usable(splits, survey.num_held_out)
        writer.finish(
            "Sentence-aligned blocks of documents for BERT pretraining, made by "
            "bipft_jax.data.corpus."
        )
    return splits


def _check_usable(splits: dict[str, SplitCounts], num_held_out: int) -> None:
    for split, counts in splits.items():
        if counts.documents >= 2:
            continue
        message = (
            f"The {split} split has {counts.documents} usable documents and needs at least 2: "
            "next-sentence prediction takes its negatives from a second document."
        )
        if counts.skipped:
            message += (
                f" {counts.skipped} documents have fewer than two sentences, such as "
                f"{', '.join(counts.skipped_at)}."
            )
        if num_held_out:
            message += (
                f" {num_held_out} documents of the input were held out for validation: give other "
                "text as --validation_input, or at least four documents."
            )
        raise ValueError(message + " In .txt files a blank line separates documents.")


def _split_metadata(counts: SplitCounts) -> dict[str, Any]:
    return {
        "blocks": counts.blocks,
        "documents": counts.documents,
        "sentences": counts.sentences,
        "tokens": counts.tokens,
        "unknown_tokens": counts.unknown_tokens,
        "same_document_probability": counts.squared_blocks / counts.blocks**2,
        "raw_bytes": counts.raw_bytes,
        "text_bytes": counts.text_bytes,
        "split_sentences": counts.split_sentences,
        "skipped_documents": counts.skipped,
        "skipped_at": counts.skipped_at,
    }


def trained_tokenizer(tokenizer: str) -> tuple[int, bool] | None:
    """(N, whether it keeps the text) of `sentencepiece:N` or `sentencepiece-cased:N`; None for a
    file. Raises: ValueError for an N that is no size."""
    kind, colon, size = tokenizer.partition(":")
    if not colon or kind not in _TRAINED:
        return None
    if not size.isdecimal() or int(size) == 0:
        raise ValueError(
            f"The tokenizer {tokenizer!r} needs a vocabulary size, as in '{kind}:8192'."
        )
    return int(size), _TRAINED[kind]


def _served(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the corpus is good for: names of objectives, and why not of others."""
    if not tokenizer.keeps_text:
        return {"objectives": list(OBJECTIVES), "objectives_reason": ""}
    return {
        "objectives": ["causal_lm"],
        "objectives_reason": "its tokenizer keeps case, spaces and line ends, which the sentences "
        "of an encoder's tasks do not have: for mlm_nsp prepare the text with "
        "--tokenizer sentencepiece:VOCAB_SIZE or vocab.txt",
    }


def _check_disjoint(
    train: Sequence[TextSource], validation: Sequence[TextSource], identity: Mapping[str, Any]
) -> None:
    """Raises ValueError for a text in both training and validation input, and warns of one that is
    twice in the training input. Compares contents, not names."""
    names: dict[str, str] = {}
    for source, content in zip(train, identity["input"], strict=True):
        if content in names:
            logging.warning(
                "%s has the same content as %s: it is in the corpus twice",
                source.name,
                names[content],
            )
        names.setdefault(content, source.name)
    for source, content in zip(validation, identity["validation_input"], strict=True):
        if content in names:
            also = f" (there as {names[content]})" if names[content] != source.name else ""
            raise ValueError(f"{source.name} is given both for training{also} and for validation.")


def _identity(
    request: CorpusRequest,
    train_sources: Sequence[TextSource],
    validation_sources: Sequence[TextSource],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Everything that determines the bytes of the result; compared before a directory is reused."""
    identity: dict[str, Any] = {
        "input": [source.fingerprint() for source in train_sources],
        "validation_input": [source.fingerprint() for source in validation_sources],
        "tokenizer": tokenizer.fingerprint if tokenizer else request.tokenizer,
        "sequence_length": request.sequence_length,
        "short_sequence_probability": request.short_sequence_probability,
        "seed": request.seed,
    }
    if not validation_sources:
        identity["validation_fraction"] = request.validation_fraction
    return identity


def read_metadata(directory: Path) -> dict[str, Any]:
    """Reads `corpus.json`. Raises ValueError if it is damaged or of another format."""
    path = directory / METADATA
    try:
        metadata = parse_json(path.read_bytes())
        written = metadata["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: damaged ({error!r}): delete the directory and prepare the corpus again."
        ) from error
    if written != FORMAT:
        raise ValueError(
            f"{path}: format {written}, this version reads and writes {FORMAT}: prepare the corpus "
            "again, in another directory."
        )
    return metadata


def _is_prepared(output: Path, identity: dict[str, Any]) -> bool:
    """Whether `output` holds this corpus. Raises ValueError if it holds a different one."""
    if not (output / METADATA).is_file():
        return False
    recorded = read_metadata(output)["identity"]
    if recorded == identity:
        return True
    differences = []
    for key in sorted(recorded.keys() | identity.keys()):
        old, new = recorded.get(key), identity.get(key)
        if old != new:
            if key in ("input", "validation_input"):
                differences.append(f"the files or contents of --{key}")
            else:
                differences.append(f"--{key} (there {old}, now {new})")
    raise ValueError(
        f"{output} already holds a corpus prepared differently: {'; '.join(differences)}. "
        "Choose another --output, or delete that directory."
    )


def _claim(output: Path) -> None:
    """Marks the directory as ours and removes the blocks of an interrupted preparation.

    Raises: ValueError if it is not empty and not from an interrupted preparation.
    """
    marker = output / _UNFINISHED
    if output.exists() and not marker.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no corpus; choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text("The preparation of this corpus is running or was interrupted.\n")
    if (output / BLOCKS).exists():
        shutil.rmtree(output / BLOCKS)


def _progress(description: str, total_bytes: int | None = None) -> tqdm.tqdm:
    return tqdm.tqdm(
        desc=description, total=total_bytes, unit="B", unit_scale=True, mininterval=1.0, leave=False
    )
