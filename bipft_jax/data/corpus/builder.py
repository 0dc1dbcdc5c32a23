"""Turns documents into a TFDS dataset of blocks: tokenization in workers, shards on disk.

Shards are written as records arrive, and TFDS's metadata at the end
(`tfds.folder_dataset.write_metadata`). A `GeneratorBasedBuilder` would hold a whole split in memory
before it writes the first shard, and would encode all records in one process. The result is an
ordinary TFDS dataset that `tfds.builder_from_directory` reads.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer

from bipft_jax.data.corpus.blocks import pack_document
from bipft_jax.data.corpus.sentences import cut_document, split_document
from bipft_jax.data.corpus.sources import Document
from bipft_jax.data.tokenizers import Tokenizer, tokenizer_from_dict

DATASET_NAME = "blocks"
# The time to read one record grows with the records in its shard (7 us for 1,000, 30 us for 10,000,
# 350 us for 200,000, with array_record 0.8.6); every shard being read is also an open file.
_SMALLEST_SHARD = 10_000
_MOST_SHARDS = 500
_BATCH_BYTES = 500_000  # raw text sent to a worker at once


def block_features() -> tfds.features.FeaturesDict:
    """The features of a record: one block of one document."""
    return tfds.features.FeaturesDict(
        {
            "document": tfds.features.Tensor(shape=(), dtype=np.int64),
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "sentence_lengths": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        }
    )


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """Everything that determines the blocks, besides the text and the tokenizer."""

    sequence_length: int
    short_sequence_probability: float
    seed: int


@dataclasses.dataclass
class SplitCounts:
    """Counts of one split or of a part of it; parts add up.

    Attributes:
      documents: documents with at least one block, `text_bytes` their UTF-8 text; `skipped` counts
        those with none, for lack of two sentences, and `skipped_at` locates the first few.
      unigrams: int64[vocab_size], how often each id occurs.
      squared_blocks: the sum over documents of the square of their number of blocks.
    """

    unigrams: np.ndarray
    blocks: int = 0
    documents: int = 0
    sentences: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    split_sentences: int = 0
    squared_blocks: int = 0
    skipped: int = 0
    raw_bytes: int = 0
    text_bytes: int = 0
    skipped_at: list[str] = dataclasses.field(default_factory=list)

    NUM_NAMED = 5

    def add(self, other: "SplitCounts") -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        del self.skipped_at[self.NUM_NAMED :]


@dataclasses.dataclass(frozen=True)
class NumberedDocument:
    """A document, its number in the whole corpus and the split it belongs to."""

    number: int
    split: str
    document: Document


@dataclasses.dataclass
class EncodedPart:
    """Serialised records and counts of a batch's documents that belong to one split."""

    counts: SplitCounts
    records: list[bytes] = dataclasses.field(default_factory=list)


class BlockEncoder:
    """Maps documents to serialised records; a pure function of settings and documents."""

    def __init__(self, tokenizer: Tokenizer, settings: BlockSettings):
        self._tokenizer = tokenizer
        self._settings = settings
        self._features = block_features()
        self._serializer = example_serializer.ExampleSerializer(
            self._features.get_serialized_info()
        )

    def __call__(self, batch: list[NumberedDocument]) -> dict[str, EncodedPart]:
        """Encodes consecutive documents; returns the part of each split."""
        parts: dict[str, EncodedPart] = {}
        for item in batch:
            if item.split not in parts:
                unigrams = np.zeros(self._tokenizer.vocab_size, np.int64)
                parts[item.split] = EncodedPart(SplitCounts(unigrams))
            self._encode(item, parts[item.split])
        for part in parts.values():
            part.counts.unknown_tokens = int(part.counts.unigrams[self._tokenizer.unk_id])
        return parts

    def _encode(self, item: NumberedDocument, part: EncodedPart) -> None:
        counts = part.counts
        counts.raw_bytes += item.document.num_bytes
        sentences_of = cut_document if self._tokenizer.keeps_text else split_document
        encoded = self._tokenizer.encode_batch(sentences_of(item.document.text))
        sentences = [ids for ids in encoded if ids]  # invisible characters encode to no token
        blocks, num_split = pack_document(
            sentences,
            self._settings.sequence_length,
            self._settings.short_sequence_probability,
            np.random.default_rng([self._settings.seed, item.number]),
        )
        if not blocks:
            counts.skipped += 1
            if len(counts.skipped_at) < SplitCounts.NUM_NAMED:
                counts.skipped_at.append(item.document.where)
            return
        tokens = np.array([token for block in blocks for token in block.tokens], np.int32)
        counts.blocks += len(blocks)
        counts.documents += 1
        counts.text_bytes += item.document.num_bytes
        counts.sentences += len(sentences)
        counts.tokens += len(tokens)
        counts.split_sentences += num_split
        counts.squared_blocks += len(blocks) ** 2
        np.add.at(counts.unigrams, tokens, 1)
        end = 0
        for block in blocks:
            start, end = end, end + len(block.tokens)
            record = self._features.encode_example(
                {
                    "document": np.int64(item.number),
                    "tokens": tokens[start:end],
                    "sentence_lengths": np.array(block.sentence_lengths, np.int32),
                }
            )
            # `features.serialize_example` writes the fields in varying order.
            example = self._serializer.get_tf_example(record)
            part.records.append(example.SerializeToString(deterministic=True))


def encode_documents(
    documents: Iterable[NumberedDocument],
    tokenizer: Tokenizer,
    settings: BlockSettings,
    num_processes: int,
) -> Iterator[dict[str, EncodedPart]]:
    """Encodes documents in parallel; yields in the order of the documents.

    The batches of documents, and so the result, do not depend on `num_processes`. Only a few
    batches per process are in memory at any time.
    """
    batches = _batches(documents)
    if num_processes == 1:
        yield from map(BlockEncoder(tokenizer, settings), batches)
        return
    # Spawn, because a fork would copy locks held by threads of the libraries imported here.
    pool = concurrent.futures.ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.to_dict(), settings),
    )
    with contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) > 3 * num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_worker_encoder: BlockEncoder | None = None  # set once in every worker process


def _start_worker(tokenizer: dict[str, object], settings: BlockSettings) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    _worker_encoder = BlockEncoder(tokenizer_from_dict(tokenizer), settings)


def _encode_in_worker(batch: list[NumberedDocument]) -> dict[str, EncodedPart]:
    return _worker_encoder(batch)


def _batches(documents: Iterable[NumberedDocument]) -> Iterator[list[NumberedDocument]]:
    """Yields batches of consecutive documents with at least `_BATCH_BYTES` of text (the last may
    have less)."""
    batch: list[NumberedDocument] = []
    size = 0
    for item in documents:
        batch.append(item)
        size += item.document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _as_os_error(directory: Path) -> Iterator[None]:
    """Turns the RuntimeError that array_record raises on a failed write (a full disk, for instance)
    into OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"cannot write to {directory}: {error}") from error


class DatasetWriter:
    """Writes records of several splits, in order, as the ArrayRecord shards of a TFDS dataset."""

    def __init__(self, directory: Path, expected_records: int):
        """expected_records: rough number in all splits; determines the size of a shard."""
        self.directory = directory
        self._records_per_shard = max(_SMALLEST_SHARD, expected_records // _MOST_SHARDS)
        self._writers: dict[str, array_record_module.ArrayRecordWriter] = {}
        self._shard_lengths: dict[str, list[int]] = {}
        self._num_bytes: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for split in list(self._writers):  # left open by an interruption or a full disk
            with contextlib.suppress(OSError):
                self._close_shard(split)

    def write(self, split: str, records: Iterable[bytes]) -> None:
        """Appends records to a split."""
        lengths = self._shard_lengths.setdefault(split, [])
        for record in records:
            if not lengths or lengths[-1] == self._records_per_shard:
                self._close_shard(split)
                path = self._unfinished_path(split, len(lengths))
                # One record per chunk, so that reading one does not decompress its neighbours.
                self._writers[split] = array_record_module.ArrayRecordWriter(
                    str(path), "group_size:1"
                )
                lengths.append(0)
            with _as_os_error(self.directory):
                self._writers[split].write(record)
            lengths[-1] += 1
            self._num_bytes[split] += len(record)

    def finish(self, description: str) -> None:
        """Renames the shards to final names, which contain the shard count; writes the metadata."""
        template = tfds.core.ShardedFileTemplate(
            data_dir=self.directory, dataset_name=DATASET_NAME, filetype_suffix="array_record"
        )
        splits = []
        for split, lengths in self._shard_lengths.items():
            self._close_shard(split)
            split_template = template.replace(split=split)
            for index in range(len(lengths)):
                final = split_template.sharded_filepath(shard_index=index, num_shards=len(lengths))
                self._unfinished_path(split, index).rename(final)
            splits.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=lengths,
                    num_bytes=self._num_bytes[split],
                    filename_template=split_template,
                )
            )
        tfds.folder_dataset.write_metadata(
            data_dir=self.directory,
            features=block_features(),
            split_infos=splits,
            check_data=False,  # the check needs TensorFlow
            description=description,
        )

    def _close_shard(self, split: str) -> None:
        if writer := self._writers.pop(split, None):
            with _as_os_error(self.directory):
                writer.close()

    def _unfinished_path(self, split: str, index: int) -> Path:
        return self.directory / f"unfinished-{split}-{index:05d}"
