"""What the scripts of launch/ that train have in common (launch/experiment.sh), until they would
install."""

import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
NEEDED = {  # arguments
    "quickstart": 0,
    "bitnet_tiny": 0,
    "bitnet_scaling": 0,
    "mini_on_glue": 2,
    "pretrain_search": 2,
    "minilm_on_glue": 3,
}


def run(script, *arguments, cwd, **variables):
    """From another directory, without an environment in which anything could start."""
    return subprocess.run(
        ["bash", LAUNCH / f"{script}.sh", *arguments],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "false", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_script_that_shares_it_is_tested():
    using = {path.stem for path in LAUNCH.glob("*.sh") if '/experiment.sh"' in path.read_text()}
    assert using == NEEDED.keys()


@pytest.mark.parametrize("script", NEEDED)
def test_help_and_missing_arguments(script, tmp_path):
    for flag in ("--help", "-h"):
        ended = run(script, flag, cwd=tmp_path)
        assert ended.returncode == 0 and not ended.stderr
        usage = ended.stdout
        assert f"\n  bash launch/{script}.sh" in usage and "set -euo" not in usage
    if NEEDED[script]:
        ended = run(script, *["x"] * (NEEDED[script] - 1), cwd=tmp_path)
        assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", usage)


def test_what_is_missing_is_named_before_anything_starts(tmp_path):
    (tmp_path / "my text").mkdir()
    (tmp_path / "glue").mkdir()
    for split in ("train", "validation"):
        ended = run("pretrain_search", "my text", "vocabulary", cwd=tmp_path)
        assert ended.returncode == 1
        assert f"/my text has no *-{split}-*.jsonl.xz: TEXT is" in ended.stderr
        (tmp_path / "my text" / f"a-{split}-0.jsonl.xz").touch()
    for script, second, message in (
        ("pretrain_search", "glue", "/glue is missing: VOCABULARY is"),  # a directory is no file
        ("mini_on_glue", "glue", "/glue/CoLA/train.tsv is missing: GLUE is"),
    ):
        ended = run(script, "my text", second, cwd=tmp_path)
        assert ended.returncode == 1 and message in ended.stderr


@pytest.mark.parametrize(
    ("script", "variable", "value", "message"),
    [
        ("bitnet_scaling", "RECIPES", "bitnet_fp\nfp", "RECIPES has fp: choose from"),
        ("bitnet_scaling", "SIZES", "2x48\nsmall", "SIZES has small: give sizes named"),
        ("pretrain_search", "POINTS", "best-1\nbest", "POINTS has best: give NAME-SEED"),
        ("bitnet_tiny", "UPDATES", "3", "UPDATES is 3: give a number of at least 20"),
    ],
)
def test_lists_may_have_several_lines_and_are_checked(script, variable, value, message, tmp_path):
    ended = run(script, *["x"] * NEEDED[script], cwd=tmp_path, **{variable: value})
    assert ended.returncode == 1 and message in ended.stderr
