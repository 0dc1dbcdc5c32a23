"""Columns of text, by hand."""

import pytest

from bipft_jax.reports.tables import aligned, percent


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [["", "mean", "metric"], ["cola", "5.0", "matthews"], ["sst2-mm", percent(0.8125), ""]]
    assert aligned(rows, right=[1]).split("\n") == [
        "         mean  metric",
        "cola      5.0  matthews",
        "sst2-mm  81.2",
    ]
    with pytest.raises(ValueError):
        aligned([["a", "b"], ["c"]])


def test_no_score_is_a_dash():
    assert (percent(None), percent(0.0)) == ("-", "0.0")
