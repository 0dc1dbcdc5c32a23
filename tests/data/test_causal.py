"""Sequences for causal language modelling, from blocks written by hand."""

import numpy as np
import pytest

from bipft_jax.data.corpus.causal import CausalExamples

END = 1
# Documents 7, 8 and 4; the stream has their tokens and an end after each.
BLOCKS = [
    {"document": document, "tokens": np.asarray(tokens, np.int32)}
    for document, tokens in (
        (7, [10, 11, 12]),
        (7, [13, 14]),
        (8, [20, 21, 22, 23, 24, 25, 26]),
        (4, [30]),
        (4, [31, 32, 33]),
    )
]
STREAM = [10, 11, 12, 13, 14, END, 20, 21, 22, 23, 24, 25, 26, END, 30, 31, 32, 33, END]


def examples(length=3, seed=0, blocks=BLOCKS, **more):
    return CausalExamples(blocks, sequence_length=length, end_id=END, seed=seed, **more)


def windows(batch):
    return np.concatenate([batch["input_ids"], batch["target_ids"][:, -1:]], axis=1)


def test_the_stream_has_every_token_and_the_ends():
    assert examples().stream().tolist() == STREAM


def test_an_epoch_cuts_the_stream_into_windows_that_share_their_ends():
    source = examples()
    assert len(source) == (len(STREAM) - 1) // 3 - 1
    offsets = set()
    for epoch in range(8):
        first = epoch * len(source)
        cut = windows(source.at(range(first, first + len(source))))
        fitting = [
            start
            for start in range(3)
            if sorted(STREAM[start + 3 * i : start + 3 * i + 4] for i in range(len(source)))
            == sorted(cut.tolist())
        ]
        offsets.add(*fitting)
    assert len(offsets) > 1  # an epoch has an offset of its own


def test_an_example_depends_on_seed_and_position_alone():
    source, again, other = examples(), examples(), examples(seed=1)
    whole = source.at(range(12))
    for name, rows in again.at([3, 7]).items():
        np.testing.assert_array_equal(rows, whole[name][[3, 7]])
    assert not np.array_equal(other.at(range(12))["input_ids"], whole["input_ids"])
    np.testing.assert_array_equal(whole["input_ids"][:, 1:], whole["target_ids"][:, :-1])
    assert whole["target_weights"].all() and (whole["segment_ids"] == 1).all()


def test_documents_can_be_kept_apart():
    batch = examples(length=5, separate_documents=True).at(range(12))
    assert batch["segment_ids"].max() > 1
    for ids, segments in zip(batch["input_ids"], batch["segment_ids"]):
        # A segment ends with the end of its document.
        ended = np.cumsum(ids == END) - (ids == END)
        np.testing.assert_array_equal(segments, 1 + ended)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="has 19 tokens: .* at least two sequences of 10"):
        examples(length=10)
