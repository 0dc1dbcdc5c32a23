"""The baseline of word counts, on tasks that words decide and on one that they cannot."""

import numpy as np

from bipft_jax.data.glue import bag_of_words
from bipft_jax.data.glue import tasks as glue

COLOURS, ANIMALS = ("red", "green", "blue", "grey"), ("cat", "dog", "cow", "hen")


def split(task: str, sentences1, labels, sentences2=None) -> glue.GlueSplit:
    return glue.GlueSplit(
        glue.TASKS[task], "train", list(sentences1), sentences2, np.asarray(labels)
    )


def test_classes_that_words_tell_apart_are_told_apart():
    words = [*COLOURS, *ANIMALS] * 2
    train = split("sst2", [f"it is {word}" for word in words], [w in ANIMALS for w in words])
    dev = split("sst2", ["the red and grey", "a cow or dog", "blue", "hen"], [0, 1, 0, 0])
    assert bag_of_words.scores(train, dev) == {"accuracy": 0.75}  # the last label is wrong


def test_the_words_of_a_pair_are_counted_apart():
    # Both classes have the same words; which sentence has which decides.
    pairs = [(a, b, 1) for a in COLOURS for b in ANIMALS] + [
        (b, a, 0) for a in COLOURS for b in ANIMALS
    ]
    first, second, labels = map(list, zip(*pairs, strict=True))
    train = split("rte", first, labels, second)
    dev = split("rte", ["cat", "red"], [0, 1], ["red", "cat"])
    assert bag_of_words.scores(train, dev) == {"accuracy": 1.0}


def test_scores_of_a_regression_follow_the_words():
    train = split("stsb", ["bad", "good", "fine"] * 4, np.float32([0, 5, 3] * 4), ["thing"] * 12)
    dev = split("stsb", ["good", "bad", "fine"], np.float32([5, 0, 3]), ["thing"] * 3)
    assert bag_of_words.scores(train, dev)["spearman"] == 1.0
