"""The command that reads the TPU compiler's schedule; the compiler is not a test dependency."""

import importlib.util
import re
import subprocess
import sys

import pytest

from bipft_jax.benchmarks.kernel_schedule import bundles


def test_reads_the_kernels_from_what_the_compiler_writes(tmp_path):
    for name, count in (
        ("123-binary_attention.7-71-schedule-analysis_final_bundles.txt", 661),
        ("123-binary_attention_gradient.1-71-schedule-analysis_final_bundles.txt", 1232),
        ("123-fusion.3-71-schedule-analysis_final_bundles.txt", 9),
    ):
        text = f"Schedule analysis:\n\ttotal scheduled bundles:    {count}\n\tempty: 6\n"
        (tmp_path / name).write_text(text)
    assert bundles(tmp_path) == {"binary_attention": 661, "binary_attention_gradient": 1232}
    with pytest.raises(ValueError, match="does not write down"):
        bundles(tmp_path / "empty")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install -e '.[tpu-compiler]'"
)
def test_prints_both_kernels_of_both_recipes():
    """In a process of its own: the compiler reads once where to write."""
    command = [sys.executable, "-m", "bipft_jax.benchmarks.kernel_schedule", "--size", "tiny"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^(\w+) +(\w+) +(\d+) +(\d+)", printed, re.MULTILINE)
    assert [(recipe, kernel) for recipe, kernel, *_ in rows] == [
        (recipe, kernel)
        for recipe in ("bipft_a", "bipft_b")
        for kernel in ("binary_attention", "binary_attention_gradient")
    ]
    # One slab of channels, 64 sequences, 2 layers; estimators cost something.
    assert {programs for *_, programs in rows} == {"128"}
    assert int(rows[0][2]) < int(rows[2][2]) and int(rows[1][2]) < int(rows[3][2])
