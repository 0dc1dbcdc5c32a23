"""Word frequencies: the baseline of a language model, and its initial bias."""

from __future__ import annotations

import numpy as np


def log_frequencies(counts: np.ndarray) -> np.ndarray:
    """Log-probability of every piece from its count, with add-one smoothing: float32 [vocab].

    As initial MLM bias it saves the tied embedding from learning word frequencies. With Adam a bias
    moves by at most the learning rate per update, so from zero it would take thousands of updates
    to spread as far as the log frequencies.
    """
    return np.log((counts + 1.0) / (counts.sum() + counts.size)).astype(np.float32)
