"""The timing command: what it measures, not how fast that is."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bipft_jax.benchmarks import inference


def test_engines_take_turns_and_are_compared_with_the_first():
    calls = []

    def engine(name):
        return inference.Engine(name, lambda ids: calls.append((name, ids.shape, ids.max() < 50)))

    rows = inference.measure([engine("a"), engine("b")], [(1, 8), (2, 4)], 50, repeats=2)
    rounds = [[("a", shape, True), ("b", shape, True)] * 3 for shape in ((1, 8), (2, 4))]
    assert calls == rounds[0] + rounds[1]
    assert [(row["engine"], row["sequences"], row["tokens"]) for row in rows] == [
        *(("a", 1, 8), ("b", 1, 8)),
        *(("a", 2, 4), ("b", 2, 4)),
    ]
    for first, second in (rows[:2], rows[2:]):
        assert first["ratio"] == 1
        assert second["ratio"] == pytest.approx(second["cpu_ms"] / first["cpu_ms"])


def test_writes_times_load_time_and_memory(tmp_path, capsys):
    file = tmp_path / "rows.json"
    inference.main(["--random", "bipft_a,tiny", "--repeats", "1", "--json", str(file)])
    result = json.loads(file.read_text())
    assert [row["tokens"] for row in result["rows"]] == [32, 128, 128]
    assert all(row["cpu_ms"] > 0 and np.isfinite(row["ratio"]) for row in result["rows"])
    # At least the file's bits, and not orders of magnitude more.
    assert 2**19 < result["loading"]["bytes"] < 2**26
    assert "8 x 128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--random", "bipft"], "did you mean"),
        (["--random", "bipft_a,tiny", "--sets", "avx1024"], "instruction set avx1024"),
        (["--model", "gs://bucket/model.safetensors"], "only the file system"),
    ],
)
def test_unknown_names_are_answered(arguments, complaint):
    with pytest.raises(SystemExit, match=complaint):
        inference.main(arguments)


@pytest.mark.parametrize(
    ("missing", "command", "install"),
    [
        ("bipft_runtime", ["benchmarks.inference"], "pip install ./bipft_jax/runtime"),
        ("bipft_runtime", ["interop.pack"], "pip install ./bipft_jax/runtime"),
        (
            "nncf",
            ["benchmarks.inference", "--random", "bipft_a,tiny", "--peers"],
            "pip install -e '.[inference-peers]'",
        ),
    ],
)
def test_a_distribution_that_is_not_installed_is_named(missing, command, install):
    module, *arguments = command
    code = f"""
import runpy, sys
sys.modules["{missing}"] = None
runpy.run_module("bipft_jax.{module}", run_name="__main__")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1 and run.stderr.startswith("error: ")
    assert missing in run.stderr and install in run.stderr
