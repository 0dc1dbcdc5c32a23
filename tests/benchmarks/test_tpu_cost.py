"""The command that asks the TPU compiler; the compiler itself is not a test dependency."""

import importlib.util

import pytest

from bipft_jax.benchmarks import tpu_cost


def test_an_unknown_topology_lists_the_known_chips():
    with pytest.raises(SystemExit, match="of v4, v5e.*'v9z:2x2'"):
        tpu_cost.main(["--topology", "v9z:2x2", "--size", "tiny"])


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[tpu-compiler\]'"):
        tpu_cost.main(["--size", "tiny"])


def test_the_report_compares_with_fp_and_names_source_lines():
    def row(recipe, cycles):
        return {
            "recipe": recipe,
            "compute": "int8",
            "cycles": cycles,
            "charged_cycles": cycles / 100,
            "charged": 7,
            "cycles_by_kind": {kind: 1e6 for kind in tpu_cost.cost.KINDS},
            "cycles_by_module": {"layers/ffn_input again": 4e6},
            "cycles_by_source": {"models/bert.py:7": 3e6, "models/bert.py:8": 2e6},
            "estimated_cycles": 2 * cycles,
            "temp_bytes": 2e9,
            "argument_bytes": 1e9,
            "peak_fraction": 0.25,
            "costliest": [
                {
                    "cycles": 3e6,
                    "count": 12,
                    "kind": "matmul",
                    "bundles": None,
                    "products": 3e6,
                    "memory": 1e6,
                    "instruction": "fusion.7",
                    "shape": "bf16[8,8]",
                    "source": "models/bert.py:7",
                    "operation": "dot_general",
                }
            ],
        }

    text = tpu_cost.report([row("fp", 100e6), row("bipft_a", 85e6)], costliest=1)
    assert [line.split()[2:4] for line in text.splitlines()[2:4]] == [
        ["100.0", "1.00"],
        ["85.0", "0.85"],
    ]
    assert "   3.00 models/bert.py:7\n" in text and "models/bert.py:8" not in text
    assert "7: 1.00%" in text.splitlines()[2]
    assert "   4.00 layers/ffn_input again\n" in text
    assert "   3.00       -    3.00    1.00   12 matmul" in text
    assert text.endswith("models/bert.py:7 dot_general")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install -e '.[tpu-compiler]'"
)
def test_compiles_the_update(capsys):
    workload = tpu_cost.Workload("tiny", 2, 16, "bfloat16")
    row = tpu_cost.row(workload, "bipft_a", "auto", "v5e:2x2", costliest=1000)
    assert row["compute"] == "auto"
    assert row["cycles"] == pytest.approx(sum(row["cycles_by_kind"].values()))
    assert row["cycles"] == pytest.approx(sum(row["cycles_by_source"].values()))
    assert row["cycles_by_kind"]["optimizer"] > 0
    assert any(module.endswith("/ffn_input backward") for module in row["cycles_by_module"])
    sources = {item["source"] for item in row["costliest"] if item["kind"] == "matmul"}
    assert any(source.startswith("quantization/binary_dot.py:") for source in sources)
