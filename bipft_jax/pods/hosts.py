"""How fast a host makes examples, measured on this machine."""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_collections

from bipft_jax.data.corpus.corpus import Corpus, load_corpus
from bipft_jax.data.corpus.preparation import CorpusRequest, prepare_corpus
from bipft_jax.objectives.objective import FromCorpus

_ROWS = 64  # at a time
_WORDS, _SENTENCES, _DOCUMENTS = 2000, 100, 50
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def sequences_per_second(
    objective: FromCorpus, config: ml_collections.ConfigDict, length: int, seconds: float = 1.0
) -> float:
    """Sequences that one process of this machine makes a second, without worker processes: of the
    config's corpus or, if it has none, of a small corpus of random words in a temporary directory.

    length: tokens of an example of random words.
    """
    with _corpus(config, length) as corpus:
        examples = objective.examples(corpus, "train", config.seed, config)
        examples.at(range(_ROWS))
        made, start = 0, time.perf_counter()
        while (taken := time.perf_counter() - start) < seconds or not made:
            examples.at(range(made, made + _ROWS))
            made += _ROWS
    return made / taken


@contextlib.contextmanager
def _corpus(config: ml_collections.ConfigDict, length: int) -> Iterator[Corpus]:
    if config.corpus_dir:
        yield load_corpus(config.corpus_dir)
        return
    with tempfile.TemporaryDirectory() as name:
        directory, rng = Path(name), random.Random(0)
        words = [f"w{number}" for number in range(_WORDS)]
        vocabulary, text = directory / "vocab.txt", directory / "text.txt"
        vocabulary.write_text("\n".join((*_SPECIAL, ".", *words)), encoding="utf-8")
        sentences = (
            " ".join(rng.choices(words, k=rng.randint(5, 30))) + "."
            for _ in range(_SENTENCES * _DOCUMENTS)
        )
        breaks = ("\n\n" if number % _SENTENCES == 0 else "\n" for number in range(1, 10**9))
        text.write_text("".join(map("".join, zip(sentences, breaks))), encoding="utf-8")
        request = CorpusRequest([str(text)], str(vocabulary), sequence_length=length)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            prepare_corpus(request, directory / "corpus", num_processes=1)
        yield load_corpus(directory / "corpus")
