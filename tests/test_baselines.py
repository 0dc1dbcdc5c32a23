"""Counting models beside runs: the same tokens, or an error. (tests/test_pretrain_decoder.py has a
real run.)"""

import json

import numpy as np
import pytest

from bipft_jax.baselines import compared, evaluated, main
from bipft_jax.data.corpus.causal import CausalExamples
from bipft_jax.data.corpus.corpus import load_corpus
from bipft_jax.objectives.causal_lm import unigram_counts
from bipft_jax.objectives.ngram import NGram

SEQUENCES = 8


@pytest.fixture
def written(home, tmp_path):
    """(name, changes of the config) -> the workdir of a finished run, as far as it is read."""
    corpus = load_corpus(home / "corpus")
    counts = unigram_counts(corpus) + 1.0
    bits = -np.log2(counts / counts.sum())
    unigram = float(bits[evaluated(corpus, SEQUENCES)[:, 1:]].mean())

    def write(name, unigram=unigram, **changes):
        config = {"objective": "causal_lm", "corpus_dir": str(home / "corpus")}
        best = {"bits_per_token": 2.0, "bits_per_byte": 0.5, "unigram_bits_per_token": unigram}
        result = {"recipe": "bitnet_b1", "size": "tiny", "seeds": [{"seed": 0, "best": best}]}
        result["config"] = {**config, "evaluation_sequences": SEQUENCES, **changes}
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        return tmp_path / name

    return write


def test_the_rows_are_those_of_the_runs_and_of_the_counts(written, home, capsys):
    main([str(written("a")), str(written("b"))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["bitnet_b1,", "tiny", "(a)", "2.000", "0.500"]
    assert [line.split()[0] for line in lines[2:]] == [
        "bitnet_b1,",
        "3-gram,",
        "2-gram,",
        "unigram",
    ]
    rows = dict(compared([written("c")], order=2))
    assert "3-gram, Kneser-Ney" not in rows
    held_out = load_corpus(home / "corpus").splits["validation"]
    per_token = held_out.text_bytes / (held_out.tokens + held_out.documents)
    train = CausalExamples.from_corpus(load_corpus(home / "corpus"), "train", seed=0).stream()
    pairs = NGram(train, 2, load_corpus(home / "corpus").tokenizer.vocab_size)
    windows = evaluated(load_corpus(home / "corpus"), SEQUENCES)
    nats = -pairs.log_probabilities(windows).mean()
    assert rows["2-gram, Kneser-Ney"]["bits_per_token"] == pytest.approx(nats / np.log(2))
    for name in ("2-gram, Kneser-Ney", "unigram"):
        bits = rows[name]
        assert bits["bits_per_byte"] == pytest.approx(bits["bits_per_token"] / per_token)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(evaluation_sequences=4), "evaluation_sequences is 4 in .* on different text"),
        (dict(objective="mlm_nsp"), "is not of a decoder's pretraining run"),
        (dict(unigram=1.25), "other tokens than those of .* in the run 1.2500"),
    ],
)
def test_runs_on_other_text_are_refused(written, changes, message):
    with pytest.raises(ValueError, match=message):
        compared([written("a"), written("b", **changes)])


def test_an_order_without_context_is_refused(written):
    with pytest.raises(ValueError, match="order is 1: an n-gram model here counts at least 2"):
        compared([written("a")], order=1)


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no result.json"):
        main([str(tmp_path)])
