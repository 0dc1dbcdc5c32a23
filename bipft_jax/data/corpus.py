"""A prepared pretraining corpus: opening one, and the command that makes one.

    python -m bipft_jax.data.corpus --input 'text/*.jsonl.xz' --output corpus --tokenizer vocab.txt

A corpus is a directory with `corpus.json` (written last: its presence means that the rest is
complete), `tokenizer.json`, `unigram.npy` and a TFDS dataset of blocks in ArrayRecord shards.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bipft_jax.data import corpus_preparation as preparation
from bipft_jax.data.text_sources import __doc__ as sources_help
from bipft_jax.data.tokenizers import Tokenizer, load_tokenizer
from bipft_jax.paths import require_local


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Counts of one split.

    Attributes:
      blocks: number of records.
      documents: documents that gave at least one block.
      sentences: sentences of these documents, before long ones were split.
      tokens: ids in all blocks; `unknown_tokens` of them are [UNK].
      same_document_probability: the chance that two random blocks belong to one document.
      raw_bytes: UTF-8 text read for this split.
      split_sentences: sentences longer than a block, which were split.
      skipped_documents: documents with fewer than two sentences; `skipped_at` names a few.
    """

    blocks: int
    documents: int
    sentences: int
    tokens: int
    unknown_tokens: int
    same_document_probability: float
    raw_bytes: int
    split_sentences: int
    skipped_documents: int
    skipped_at: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus on disk.

    A record ("block") is `dict(document, tokens, sentence_lengths)`: the number of its document in
    the corpus (int64), the ids of consecutive sentences (int32[n], 2 <= n <= sequence_length - 3),
    and the lengths of these sentences (int32[m], with sum n). Records of a document follow
    each other in its order.

    Attributes:
      directory: where it is.
      tokenizer: the tokenizer it was made with.
      sequence_length: length of an example, special pieces included.
      seed: the seed it was prepared with.
      splits: counts of "train" and "validation".
      unigram_counts: int64[vocab_size], how often each id occurs in the train split.
      identity: what decides every byte of it (texts by their digests), wherever it is: by it a run
        knows its corpus again.
    """

    directory: Path
    tokenizer: Tokenizer
    sequence_length: int
    seed: int
    splits: dict[str, SplitInfo]
    unigram_counts: np.ndarray
    identity: dict[str, Any]

    def data_source(self, split: str) -> Sequence[dict[str, Any]]:
        """Random access to the records of "train" or "validation".

        Raises:
          ValueError: for another split.
        """
        if split not in self.splits:
            raise ValueError(f"There is no split {split!r}; there are {sorted(self.splits)}.")
        return self._dataset.as_data_source(split=split)

    @functools.cached_property
    def _dataset(self) -> Any:
        return tfds.builder_from_directory(self.directory / preparation.BLOCKS)


def load_corpus(directory: str | os.PathLike[str]) -> Corpus:
    """Opens a prepared corpus.

    Raises:
      ValueError: if the directory does not exist, holds no complete corpus or one of another
        version of this library, lacks (a part of) a file, as after an interrupted copy, or has the
        tokenizer or the counts of another corpus; if it is gs:// or the like.
    """
    require_local({"corpus directory": directory})
    directory = Path(directory)
    how = "run `python -m bipft_jax.data.corpus --output DIR ...` (see its --help)"
    if not directory.is_dir():
        raise ValueError(f"There is no corpus directory {directory}: to make one, {how}.")
    if not (directory / preparation.METADATA).is_file():
        raise ValueError(
            f"{directory} has no {preparation.METADATA}: it was not prepared, or the preparation "
            f"was interrupted: {how}."
        )
    metadata = preparation.read_metadata(directory)
    sizes = preparation.file_sizes(directory / preparation.BLOCKS)
    for name, size in metadata["file_sizes"].items():
        if sizes.get(name) != size:
            found = f"{sizes[name]} bytes instead of" if name in sizes else "missing, with"
            raise ValueError(
                f"{directory / preparation.BLOCKS / name}: {found} {size} bytes. The corpus was "
                "damaged or copied incompletely: copy or prepare it again."
            )
    tokenizer = load_tokenizer(directory / preparation.TOKENIZER)
    made_with = metadata["identity"]["tokenizer"]  # a fingerprint, or what was to be trained
    if (preparation.requested_vocab_size(made_with) or made_with) not in (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
    ):
        raise ValueError(
            f"{directory / preparation.TOKENIZER} is not the tokenizer that the corpus was made "
            "with: its ids would be other words. Copy or prepare the corpus again."
        )
    counts = np.load(directory / preparation.UNIGRAMS)
    if counts.shape != (tokenizer.vocab_size,) or counts.dtype != np.int64 or counts.min() < 0:
        raise ValueError(
            f"{directory / preparation.UNIGRAMS} does not have a count for each of the "
            f"tokenizer's {tokenizer.vocab_size} ids. Copy or prepare the corpus again."
        )
    # Texts are many; and two versions of this library may cut the same ones differently.
    identity = {**metadata["identity"], "unigrams": counts.tolist()}
    return Corpus(
        directory=directory,
        tokenizer=tokenizer,
        sequence_length=metadata["identity"]["sequence_length"],
        seed=metadata["identity"]["seed"],
        splits={name: SplitInfo(**counts) for name, counts in metadata["splits"].items()},
        unigram_counts=counts,
        identity={
            name: _digest(value) if isinstance(value, list) else value
            for name, value in identity.items()
        },
    )


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def summary(corpus: Corpus) -> str:
    """What a corpus holds, for people."""
    size = sum(path.stat().st_size for path in corpus.directory.rglob("*") if path.is_file())
    room = corpus.sequence_length - 3
    lines = [
        f"corpus            {corpus.directory}, {size / 1e6:.1f} MB on disk",
        f"tokenizer         {type(corpus.tokenizer).__name__}, {corpus.tokenizer.vocab_size:,} ids",
        f"sequence length   {corpus.sequence_length} ([CLS], two [SEP], {room} tokens of text)",
    ]
    for name, split in corpus.splits.items():
        tokens_per_block = split.tokens / split.blocks
        lines += [
            "",
            f"{name}",
            f"  documents       {split.documents:,}",
            f"  sentences       {split.sentences:,} ({split.tokens / split.sentences:.1f} tokens "
            "each)",
            f"  tokens          {split.tokens:,} ({split.raw_bytes / split.tokens:.2f} bytes of "
            "text each)",
            f"  blocks          {split.blocks:,} ({tokens_per_block:.1f} tokens each, "
            f"{tokens_per_block / room:.0%} full)",
            f"  unknown tokens  {split.unknown_tokens / split.tokens:.4%}",
            f"  split sentences {split.split_sentences:,} (longer than a block)",
        ]
        if split.skipped_documents:
            more = " ..." if split.skipped_documents > len(split.skipped_at) else ""
            lines.append(
                f"  skipped         {split.skipped_documents:,} documents without two sentences: "
                f"{', '.join(split.skipped_at)}{more}"
            )
    lines += ["", "first block of the train split, '|' between sentences:"]
    lines.append("  " + _readable(corpus, corpus.data_source(preparation.TRAIN)[0]))
    return "\n".join(lines)


def _readable(corpus: Corpus, block: dict[str, Any]) -> str:
    ends = np.cumsum(block["sentence_lengths"])[:-1]
    return " | ".join(map(corpus.tokenizer.decode, np.split(block["tokens"], ends)))


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.data.corpus",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prepares text for pretraining: splits it into sentences, tokenizes them and "
        "packs them into\nblocks. The same text and arguments always give the same bytes; an "
        "interrupted run is repeated\nfrom the beginning, a finished one is left alone.",
        epilog="Input:\n" + sources_help.partition("command line by a string:\n")[2],
    )
    defaults = {
        field.name: field.default for field in dataclasses.fields(preparation.CorpusRequest)
    }
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="GLOB", help="text to train on; see below"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="made if missing")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help="BERT's vocab.txt, a tokenizer.json of another corpus, a SentencePiece .model file, "
        "or sentencepiece:VOCAB_SIZE to train one on the train split (on up to 10 MB of it)",
    )
    parser.add_argument(
        "--validation_input",
        nargs="+",
        default=defaults["validation_input"],
        metavar="GLOB",
        help="text to validate on; without it, some documents of --input are held out (of "
        "the embedded corpora always the same fifth, which is never trained on)",
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=defaults["validation_fraction"],
        help="how many of the documents are held out, chosen by a hash of seed and document "
        "number; at least two documents (default %(default)s)",
    )
    parser.add_argument(
        "--sequence_length",
        type=int,
        default=defaults["sequence_length"],
        help="length of the model's input, [CLS] and two [SEP] included (default %(default)s)",
    )
    parser.add_argument(
        "--short_sequence_probability",
        type=float,
        default=defaults["short_sequence_probability"],
        help="how often a block is begun with a random shorter length, so that the model also "
        "meets short inputs (default %(default)s, as BERT)",
    )
    parser.add_argument("--seed", type=int, default=defaults["seed"], help="default %(default)s")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="worker processes; the result does not depend on it (default: one per core, here "
        "%(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; prints a summary of the corpus. Exits with a message for wrong arguments."""
    parsed = vars(_parse_arguments(arguments))
    output, num_processes = parsed.pop("output"), parsed.pop("processes")
    try:
        request = preparation.CorpusRequest(**parsed)
        if not preparation.prepare_corpus(request, output, num_processes):
            print("Already prepared with these arguments and this text.\n")
        print(summary(load_corpus(output)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except BrokenProcessPool as error:
        raise SystemExit(
            "error: a worker process was killed, perhaps for want of memory: use fewer --processes"
        ) from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: run the same command again to start over.") from None


if __name__ == "__main__":
    main()
