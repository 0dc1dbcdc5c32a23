"""The n-gram model against a case computed by hand."""

import numpy as np
import pytest

from bipft_jax.objectives.ngram import NGram

TEXT = np.asarray([0, 1, 0, 2, 0, 1, 3, 1, 2])


def test_bigrams_are_smoothed_as_computed_by_hand():
    """0 1 occurs twice and six other bigrams once: D_2 = 3 / 4. Before 0, 1, 2 and 3 are 2, 2, 2
    and 1 different tokens: D_1 = 1 / 7, and p_1 = (69, 69, 69, 34, 4) / 245."""
    of_all = NGram(TEXT, 2, vocab_size=5).log_probabilities([[0, w] for w in range(5)])
    np.testing.assert_allclose(np.exp(of_all[:, 0]) * 2940, [414, 1639, 659, 204, 24])
    after_unseen = NGram(TEXT, 2, vocab_size=5).log_probabilities([[4, w] for w in range(5)])
    np.testing.assert_allclose(np.exp(after_unseen[:, 0]) * 245, [69, 69, 69, 34, 4])


def test_probabilities_of_trigrams_add_up_to_1_after_every_context():
    text = np.random.default_rng(0).geometric(0.3, 400) % 7
    windows = [[u, v, w] for u in range(8) for v in range(8) for w in range(8)]  # 7 never occurs
    trigram = NGram(text, 3, vocab_size=8)
    probabilities = np.exp(trigram.log_probabilities(windows)).reshape(8, 8, 8, 2)
    np.testing.assert_allclose(probabilities[..., 1].sum(axis=2), 1)
    # The second token has only one before it: the lower order, not a trigram's.
    shorter = np.exp(trigram.log_probabilities([[u, v] for u in range(8) for v in range(8)]))
    np.testing.assert_array_equal(probabilities[:, :, 0, 0], shorter.reshape(8, 8))
    np.testing.assert_allclose(shorter.reshape(8, 8).sum(axis=1), 1)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="order is 0: with 5 ids it must be from 1 to 27"):
        NGram(TEXT, 0, vocab_size=5)
    with pytest.raises(ValueError, match="order is 28"):
        NGram(np.tile(TEXT, 9), 28, vocab_size=5)
    with pytest.raises(ValueError, match="a text of 2 tokens has no 3-gram"):
        NGram(TEXT[:2], 3, vocab_size=5)
