"""A workdir is claimed by one configuration."""

import json
from pathlib import Path

import pytest

from bipft_jax.training.workdir import absolute, claim_workdir

CONFIG = {"model": {"recipe": "bipft_b", "layers": 12}, "betas": (0.9, 0.999), "extra": {}}


def test_same_configuration_may_start_again(tmp_path):
    workdir = tmp_path / "new" / "run"
    claim_workdir(workdir, CONFIG)
    written = (workdir / "config.json").read_bytes()
    reordered = dict(reversed(CONFIG.items())) | {"betas": [0.9, 0.999]}
    claim_workdir(workdir, reordered)
    assert (workdir / "config.json").read_bytes() == written
    assert json.loads(written)["model"]["layers"] == 12
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_every_difference_is_listed_with_both_values(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    other = {"model": {"recipe": "bit", "layers": 12, "heads": 4}, "betas": (0.9, 0.999)}
    with pytest.raises(ValueError) as caught:
        claim_workdir(tmp_path, other)
    lines = str(caught.value).splitlines()
    assert str(tmp_path) in lines[0]
    assert [line.strip() for line in lines[1:4]] == [
        "extra: {} there, (absent) now",
        "model.heads: (absent) there, 4 now",
        'model.recipe: "bipft_b" there, "bit" now',
    ]
    assert "--workdir" in lines[4] and len(lines) == 5
    assert (tmp_path / "config.json").read_bytes() == before


def test_broken_configurations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        claim_workdir(tmp_path, {"rate": {1, 2}})
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        claim_workdir(tmp_path, CONFIG)


def test_a_workdir_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/some:one")
    monkeypatch.chdir(tmp_path)
    for given, expected in {
        "~/runs/a:b": "/home/some:one/runs/a:b",
        "a:b/../gs:/c": f"{tmp_path}/gs:/c",
        Path("a:b"): f"{tmp_path}/a:b",
        "/x//y/": "/x/y",
    }.items():
        assert absolute(given) == Path(expected)
