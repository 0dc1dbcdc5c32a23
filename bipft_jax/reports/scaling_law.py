"""A scaling law L(N) = a N^b + c of losses at several sizes (Wang et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

_EXPONENTS = (-1.5, -0.01)  # where b is searched
_GRID = 60  # values of b that bracket the minimum


class ScalingLaw(NamedTuple):
    """L(N) = a N^b + c. residual: the sum of squared differences from the points of the fit."""

    a: float
    b: float
    c: float
    residual: float

    def __call__(self, parameters: float) -> float:
        """The loss that the law predicts for a model of so many parameters."""
        return self.a * parameters**self.b + self.c


def fit(parameters: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """The least-squares fit, in float64, with equal weights.

    For a given b, a and c are a linear least-squares problem, so only b is searched: with a few
    points a and c almost trade off, and a search in all three can stop early.

    Raises: ValueError for fewer than three different sizes, or values that are not positive and
      finite.
    """
    sizes, values = (np.asarray(x, np.float64) for x in (parameters, losses))
    if len(np.unique(sizes)) < 3:
        raise ValueError(f"a law of three constants needs three sizes, not {len(np.unique(sizes))}")
    if not (np.isfinite([sizes, values]).all() and (sizes > 0).all() and (values > 0).all()):
        raise ValueError("sizes and losses must be positive and finite")
    scaled = sizes / sizes.max()  # well-conditioned powers

    def of_exponent(b: float) -> ScalingLaw:
        columns = np.stack([scaled**b, np.ones_like(scaled)], axis=1)
        (a, c), *_ = np.linalg.lstsq(columns, values)
        residual = float(np.sum((columns @ (a, c) - values) ** 2))
        return ScalingLaw(float(a * sizes.max() ** -b), float(b), float(c), residual)

    grid = np.linspace(*_EXPONENTS, _GRID)
    best = int(np.argmin([of_exponent(b).residual for b in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    options = {"xatol": 1e-12}
    search = minimize_scalar(
        lambda b: of_exponent(b).residual, bounds=bounds, method="bounded", options=options
    )
    return of_exponent(search.x)
