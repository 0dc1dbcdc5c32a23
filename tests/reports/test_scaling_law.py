"""A known law is recovered; the published law of BitNet; what cannot be fitted."""

import math

import pytest

from bipft_jax.reports.scaling_law import fit

SIZES = (1.25e8, 3.5e8, 7.6e8, 1.3e9, 2.7e9, 6.7e9)
# Wang et al. 2023, figure 3: bits a token of BitNet b1 at these sizes and at the two larger ones.
PUBLISHED = (5.2269, 4.7644, 4.4995, 4.3462, 4.2272, 4.0934)
LARGER = {1.3e10: 4.041, 3e10: 3.954}


def test_a_law_without_noise_is_recovered():
    law = fit(SIZES, [60.0 * n**-0.21 + 2.9 for n in SIZES])
    assert (law.a, law.b, law.c) == pytest.approx((60.0, -0.21, 2.9), rel=1e-6)
    assert law.residual < 1e-18


def test_the_published_curve_and_its_predictions():
    """The figure's curve is the least-squares fit of its points: 2114 N^-0.391 + 3.786."""
    law = fit(SIZES, PUBLISHED)
    assert law.b == pytest.approx(-0.391, abs=1e-3) and law.c == pytest.approx(3.786, abs=1e-3)
    for size, loss in LARGER.items():
        assert law(size) == pytest.approx(loss, abs=0.021)


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ((1e6, 1e6, 2e6), (3.0, 3.0, 2.0), "three sizes, not 2"),
        ((1e6, 2e6, 3e6), (3.0, math.nan, 2.0), "positive and finite"),
        ((0.0, 2e6, 3e6), (3.0, 2.5, 2.0), "positive and finite"),
    ],
)
def test_what_cannot_be_fitted(sizes, losses, message):
    with pytest.raises(ValueError, match=message):
        fit(sizes, losses)
