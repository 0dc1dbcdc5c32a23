"""The timing command: what it compares, not how fast that is."""

import json

import pytest

from bipft_jax.benchmarks import train_step


def test_writes_a_row_for_every_variant(tmp_path, capsys):
    file = tmp_path / "rows.json"
    train_step.main(
        "--size tiny --batch 2 --length 16 --recipes fp,bipft_a "
        f"--compute auto,simulated --repeats 1 --json {file}".split()
    )
    rows = json.loads(file.read_text())
    assert [(row["recipe"], row["compute"]) for row in rows] == [
        ("fp", "float32"),  # in which nothing is quantised
        ("bipft_a", "auto"),
        ("bipft_a", "simulated"),
    ]
    assert rows[0]["ratio_to_fp"] == 1
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        # At least the parameters and Adam's two moments, and not orders of magnitude more.
        assert 3 * 4 * 30522 * 128 < row["peak_bytes"] < 1e9
    assert "simulated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--compute int4", "one of auto, int8"),
        ("--recipes bipft", "did you mean"),
    ],
)
def test_unknown_names_are_answered(arguments, complaint):
    with pytest.raises(SystemExit, match=complaint):
        train_step.main(["--size", "tiny", *arguments.split()])
