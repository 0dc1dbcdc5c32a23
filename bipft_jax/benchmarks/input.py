"""Measures the speed of corpus preparation, and of making MLM + NSP examples from a corpus.

    python -m bipft_jax.benchmarks.input --json input.json

Compare the second with the sequences per second that the accelerators of one host consume.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bipft_jax.data.corpus.corpus import Corpus, load_corpus
from bipft_jax.data.corpus.preparation import TOKENIZER, CorpusRequest, prepare_corpus
from bipft_jax.data.corpus.pretraining import PretrainingExamples, pretraining_batches
from bipft_jax.paths import require_local

Row = dict[str, Any]

_WARM_UP_BATCHES = 5  # per worker, to skip its start (seconds) and its prefetched batches


def preparation_row(request: CorpusRequest, scratch: Path, repeats: int) -> Row:
    """Times the whole preparation of a corpus in one process (reading, tokenizing, writing).

    Args:
      request: what to prepare; its tokenizer must be a file, because training one is not measured.
      scratch: an empty directory for the corpora.
      repeats: number of measurements.
    """
    speeds = []
    for repeat in range(repeats):
        output = scratch / f"repeat-{repeat}"
        start = time.perf_counter()
        prepare_corpus(request, output, num_processes=1)
        seconds = time.perf_counter() - start
        num_bytes = sum(split.raw_bytes for split in load_corpus(output).splits.values())
        speeds.append(num_bytes / 1e6 / seconds)
    return _row("corpus preparation, one core", "MB of text/s", speeds)


def examples_row(
    examples: PretrainingExamples, batch_size: int, workers: int, repeats: int, seconds: float
) -> Row:
    """Times batches as a training loop consumes them: `repeats` measurements of `seconds` each."""
    batches = pretraining_batches(examples, batch_size, num_workers=workers)
    for _ in range(_WARM_UP_BATCHES * max(1, workers)):
        next(batches)
    speeds = []
    for _ in range(repeats):
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or not count:
            next(batches)
            count += 1
        speeds.append(count * batch_size / elapsed)
    batches.close()
    return _row(f"examples, worker processes: {workers}", "sequences/s", speeds) | {
        "workers": workers,
        "batch_size": batch_size,
        "sequence_length": examples.sequence_length,
    }


def _row(measurement: str, unit: str, speeds: Sequence[float]) -> Row:
    return {
        "measurement": measurement,
        "unit": unit,
        "median": statistics.median(speeds),
        "minimum": min(speeds),
        "maximum": max(speeds),
        "repeats": len(speeds),
        "cores": os.cpu_count(),
    }


def measure(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Yields the rows as they are measured."""
    if arguments.corpus is None:
        # One core is measured: the tokenizers' own threads would use several.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        request = CorpusRequest(arguments.input, arguments.tokenizer)
        prepare_corpus(request, scratch / "first", os.cpu_count() or 1)
        corpus = load_corpus(scratch / "first")
        request = dataclasses.replace(request, tokenizer=str(scratch / "first" / TOKENIZER))
        yield preparation_row(request, scratch, arguments.repeats)
    else:
        corpus = load_corpus(arguments.corpus)
    yield from _example_rows(corpus, arguments)


def _example_rows(corpus: Corpus, arguments: argparse.Namespace) -> Iterator[Row]:
    examples = PretrainingExamples.from_corpus(corpus, "train", seed=0)
    for workers in arguments.workers:
        yield examples_row(
            examples, arguments.batch_size, workers, arguments.repeats, arguments.seconds
        )


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.benchmarks.input",
        description="Measures the preparation of a corpus and the making of pretraining examples; "
        "prints medians of several repeats, and the range. Other work on the machine slows it.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--corpus", type=Path, metavar="DIR", help="measure the examples of this corpus only"
    )
    source.add_argument(
        "--input",
        nargs="+",
        default=["python-docs"],
        metavar="GLOB",
        help="text to prepare, as for bipft_jax.data.corpus (default: python-docs, which needs no "
        "download)",
    )
    parser.add_argument(
        "--tokenizer",
        default="sentencepiece:4096",
        metavar="T",
        help="tokenizer of --input, as for bipft_jax.data.corpus (default: %(default)s); training "
        "one is not part of the measurement",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=256,
        metavar="N",
        help="sequences a batch (default %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="numbers of worker processes to measure; 0: a thread of the main process (default: "
        "0 1 2)",
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        metavar="S",
        help="length of a repeat (default %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parsed = parser.parse_args(arguments)
    if parsed.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {parsed.repeats}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with a message for wrong arguments."""
    parsed = _parse_arguments(arguments)
    rows = []
    try:
        require_local(vars(parsed))
        with tempfile.TemporaryDirectory() as scratch:
            for row in measure(parsed, Path(scratch)):
                print(
                    f"{row['measurement']:<40} {row['median']:>12,.1f} {row['unit']:<14}"
                    f"(from {row['minimum']:,.1f} to {row['maximum']:,.1f})",
                    flush=True,
                )
                rows.append(row)
        if parsed.json is not None:
            parsed.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
