"""The search for what fits, with a made-up memory in place of the compiler."""

from types import SimpleNamespace

import pytest

from bipft_jax.pods import fitting


@pytest.mark.parametrize(("rows", "limit"), [(256, 9000), (64, 700), (64, 128), (64, 70)])
def test_the_most_rows_are_found_in_a_few_tries(monkeypatch, rows, limit):
    """The first 300 rows take little, as where arrays stay on the chip."""
    tried = []

    def size(rows):
        return 1000 + 2 * rows + 10 * max(0, rows - 300)

    def compiled(setting, remat, rows, say):
        tried.append((remat, rows))
        return size(rows) if remat != "none" and rows <= limit else None

    monkeypatch.setattr(fitting, "_bytes", compiled)
    config, chip = SimpleNamespace(accumulation=2), SimpleNamespace(hbm=size(limit))
    found = fitting.fit(SimpleNamespace(rows=rows, config=config, chip=chip), print)
    assert tried[:2] == [("none", rows), ("lean", rows)] and len(tried) <= 8
    assert found.remat == "lean" and found.bytes == size(found.rows)
    assert 0.85 * limit <= found.rows <= limit and (found.rows == rows or found.rows % 16 == 0)
    monkeypatch.setattr(fitting, "_bytes", lambda *given: None)
    assert fitting.fit(SimpleNamespace(rows=rows, config=config, chip=chip), print).remat is None
