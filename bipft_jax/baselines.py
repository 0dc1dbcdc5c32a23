"""Held-out bits of decoders beside those of models that only count.

    python -m bipft_jax.baselines WORKDIR... [--order 3]

The counting models are the unigram frequencies and n-gram models (`objectives/ngram.py`) of the
same training tokens. All predict the tokens on which the runs were evaluated, each from the tokens
before it in its sequence (all of `evaluation_sequences`, which a run on a mesh rounds down to a
multiple of its shards). A run's row is its best evaluation. Bits a byte of text compare
models of different tokenizers.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bipft_jax.data.corpus.causal import CausalExamples
from bipft_jax.data.corpus.corpus import Corpus, load_corpus
from bipft_jax.objectives.causal_lm import CAUSAL_LM, in_bits, unigram_counts
from bipft_jax.objectives.frequencies import log_frequencies
from bipft_jax.objectives.ngram import NGram
from bipft_jax.paths import require_local
from bipft_jax.pretrain import EVALUATION_SEED
from bipft_jax.reports.results import RESULT_NAME, read_result
from bipft_jax.reports.tables import aligned

Row = tuple[str, dict[str, float]]  # a model's name; `bits_per_token` and `bits_per_byte`

_TOLERANCE = 1e-3  # relative, of a run's mean in float32


def compared(workdirs: Iterable[str | Path], order: int = 3) -> list[Row]:
    """The rows of finished runs, of the n-gram models from `order` to 2, and of the unigrams.

    Raises: ValueError for an order below 2, a workdir without the result of a decoder's run, runs
      that were evaluated on different text, or a corpus that is no longer the one of the runs.
    """
    if order < 2:
        raise ValueError(f"order is {order}: an n-gram model here counts at least 2 tokens")
    results = {Path(workdir): _result(Path(workdir)) for workdir in workdirs}
    (first, of_first), *others = results.items()
    for key, same in (("corpus_dir", os.path.realpath), ("evaluation_sequences", int)):
        for workdir, result in others:
            if same(result["config"][key]) != same(of_first["config"][key]):
                raise ValueError(
                    f"{key} is {result['config'][key]!r} in {workdir} and "
                    f"{of_first['config'][key]!r} in {first}: they were evaluated on different text"
                )
    corpus = load_corpus(of_first["config"]["corpus_dir"])
    windows = evaluated(corpus, of_first["config"]["evaluation_sequences"])
    counts = unigram_counts(corpus)
    unigram = in_bits(-float(np.mean(log_frequencies(counts)[windows[:, 1:]], dtype=float)), corpus)
    for workdir, result in results.items():
        recorded = result["seeds"][0]["best"]["unigram_bits_per_token"]
        if not math.isclose(recorded, unigram["bits_per_token"], rel_tol=_TOLERANCE):
            raise ValueError(
                f"{workdir} was evaluated on other tokens than those of {corpus.directory}: their "
                f"unigrams have {unigram['bits_per_token']:.4f} bits a token, in the run "
                f"{recorded:.4f}"
            )
    rows = [
        (f"{result['recipe']}, {result['size']} ({workdir.name})", result["seeds"][0]["best"])
        for workdir, result in results.items()
    ]
    stream = CausalExamples.from_corpus(corpus, "train", seed=0).stream()
    for length in range(order, 1, -1):
        model = NGram(stream, length, corpus.tokenizer.vocab_size)
        loss = -float(np.mean(model.log_probabilities(windows)))
        rows.append((f"{length}-gram, Kneser-Ney", in_bits(loss, corpus)))
    return [*rows, ("unigram", unigram)]


def evaluated(corpus: Corpus, sequences: int) -> np.ndarray:
    """The held-out sequences of a run on one device with their last targets: ids [N, S + 1].

    sequences: the run's `evaluation_sequences`.
    """
    examples = CausalExamples.from_corpus(corpus, "validation", seed=EVALUATION_SEED)
    batch = examples.at(range(min(sequences or len(examples), len(examples))))
    return np.concatenate([batch["input_ids"], batch["target_ids"][:, -1:]], axis=1)


def _result(workdir: Path) -> dict:
    path = workdir / RESULT_NAME
    if not path.exists():
        raise ValueError(f"{workdir} has no {RESULT_NAME}: give the workdir of a finished run")
    result = read_result(path)
    if result.get("config", {}).get("objective") != CAUSAL_LM.name:
        raise ValueError(f"{path} is not of a decoder's pretraining run")
    return result


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; a dash where the corpus does not know its bytes."""
    cells = [["held-out text", "bits a token", "bits a byte"]]
    for name, bits in rows:
        values = (bits.get(key) for key in ("bits_per_token", "bits_per_byte"))
        cells.append([name, *("-" if value is None else f"{value:.3f}" for value in values)])
    return aligned(cells, right=(1, 2))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.baselines",
        description=first,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a decoder's run")
    parser.add_argument("--order", type=int, default=3, help="the largest n (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        require_local(vars(arguments))
        print(table(compared(arguments.workdirs, arguments.order)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
