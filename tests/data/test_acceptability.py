"""The embedded task: balanced, about word order only, nothing shared by train and dev."""

import itertools
import random
from collections import Counter

import pytest

from bipft_jax.data import acceptability, glue

# Capitals, a comma and a full stop must not move; nor must the first and the last word, which are
# plain here.
_SENTENCE = "a {0} of the {1} is printed, and Unix {2} files can. be read by the {3} when it {4}"


def source_sentences(count: int) -> list[str]:
    """Sentences no two of which consist of the same words."""
    words = [a + b for a in ("ca", "do", "fi", "lu", "me") for b in ("rt", "sk", "mp", "nd", "lk")]
    choices = list(itertools.combinations(words, 5))
    return [_SENTENCE.format(*choice) for choice in random.Random(5).sample(choices, count)]


def fixed_part(sentence: str) -> list[tuple[int, str]]:
    """The words that may not move, with their positions: with capitals, with marks, at the ends."""
    words = sentence.split()
    ends = (0, len(words) - 1)
    return [(i, w) for i, w in enumerate(words) if i in ends or not (w.isalpha() and w.islower())]


def test_every_swap_moves_exactly_two_distant_words_and_nothing_else():
    sentences = source_sentences(300)
    rows = acceptability.make_rows(sentences, train=240, dev=60, seed=0)
    by_words = {tuple(sorted(s.split())): s for s in sentences}
    used = Counter()
    for split, size in (("train", 240), ("dev", 60)):
        assert Counter(label for _, label in rows[split]) == {0: size // 2, 1: size // 2}
        assert {label for _, label in rows[split][: size // 4]} == {0, 1}  # not sorted by label
        for sentence, label in rows[split]:
            original = by_words[tuple(sorted(sentence.split()))]
            used[original] += 1
            moved = [
                i
                for i, (a, b) in enumerate(zip(original.split(), sentence.split(), strict=True))
                if a != b
            ]
            if label:
                assert sentence == original
            else:
                assert len(moved) == 2 and moved[1] - moved[0] >= 2
            assert fixed_part(sentence) == fixed_part(original)
    assert set(used.values()) == {1} and len(used) == 300  # once, real or swapped, in one split


def test_swapped_and_real_sentences_are_of_the_same_kind():
    # Sentences in which nothing can be swapped would otherwise all be labelled acceptable.
    unusable = ["Short one here.", "Here: words, are, followed, by, marks, of, punctuation."]
    unusable += ["Return " + "very " * 41 + "long sentences of the file."]
    sentences = source_sentences(20)
    rows = acceptability.make_rows(unusable + sentences * 2, None, dev=4, seed=0)
    assert len(rows["train"]) == 16  # and repeated sentences count once
    originals = {tuple(sorted(s.split())) for s in sentences}
    assert all(tuple(sorted(s.split())) in originals for s, _ in rows["train"] + rows["dev"])


def test_default_sizes_seed_and_too_few_sentences():
    sentences = source_sentences(90)
    rows = acceptability.make_rows(sentences, None, None, seed=1)
    assert (len(rows["train"]), len(rows["dev"])) == (80, 10)
    assert rows == acceptability.make_rows(sentences, None, None, seed=1)
    assert rows != acceptability.make_rows(sentences, None, None, seed=2)
    with pytest.raises(ValueError, match="cannot make 81 train and 10 dev rows.* has 90 usable"):
        acceptability.make_rows(sentences, 81, 10, seed=0)


def test_the_command_writes_files_that_the_task_table_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(acceptability, "held_out_sentences", lambda: source_sentences(50))
    acceptability.main(["--output", str(tmp_path), "--train", "40", "--dev", "10", "--seed", "3"])
    task = glue.glue_task("acceptability")
    expected = acceptability.make_rows(source_sentences(50), 40, 10, seed=3)
    for split in ("train", "dev"):
        rows = glue.read_split(task, tmp_path, split)
        labelled = list(zip(rows.sentences1, rows.labels.tolist(), strict=True))
        assert labelled == expected[split]
    first = (tmp_path / "acceptability" / "dev.tsv").read_text().splitlines()[0].split("\t")
    assert len(first) == 4 and (first[2] == "*") == (first[1] == "0")
    assert "train.tsv: 40 rows, 20 acceptable" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: .* has 50 usable sentences"):
        acceptability.main(["--output", str(tmp_path), "--train", "400"])
