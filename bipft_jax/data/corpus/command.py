"""The command that makes a corpus.

python -m bipft_jax.data.corpus --input 'text/*.jsonl.xz' --output corpus --tokenizer vocab.txt
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from bipft_jax.data.corpus import preparation
from bipft_jax.data.corpus.corpus import Corpus, load_corpus
from bipft_jax.data.corpus.sources import __doc__ as sources_help


def summary(corpus: Corpus) -> str:
    """The contents of a corpus as text."""
    size = sum(path.stat().st_size for path in corpus.directory.rglob("*") if path.is_file())
    room = corpus.sequence_length - 3
    lines = [
        f"corpus            {corpus.directory}, {size / 1e6:.1f} MB on disk",
        f"tokenizer         {type(corpus.tokenizer).__name__}, {corpus.tokenizer.vocab_size:,} ids",
        f"objectives        {', '.join(corpus.objectives)}"
        + (f" only: {corpus.objectives_reason}" if corpus.objectives_reason else ""),
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
    text = " | ".join(map(corpus.tokenizer.decode, np.split(block["tokens"], ends)))
    return text.replace("\n", "\\n")


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
        "or sentencepiece:VOCAB_SIZE to train an uncased one on the train split (on up to 10 MB of "
        "it), or sentencepiece-cased:VOCAB_SIZE one that keeps case, spaces and line ends, for "
        "decoders: what they generate is then readable text",
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
