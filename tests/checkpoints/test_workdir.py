"""A workdir is claimed by one configuration."""

import errno
import fcntl
import json
import pwd
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from bipft_jax.checkpoints import workdir as workdirs
from bipft_jax.checkpoints.workdir import absolute, check_workdir, claim_workdir, owned

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
        "extra: {} before, (absent) now",
        "model.heads: (absent) before, 4 now",
        'model.recipe: "bipft_b" before, "bit" now',
    ]
    assert "--workdir" in lines[4] and len(lines) == 5
    assert (tmp_path / "config.json").read_bytes() == before


def test_broken_configurations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        claim_workdir(tmp_path, {"rate": {1, 2}})
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config\.json is not a run's"):
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


def test_a_workdir_in_a_home_directory_that_nobody_knows_is_refused(tmp_path, monkeypatch):
    """As in a container that is run by the number of a user who is not in its /etc/passwd."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", mock.Mock(side_effect=KeyError))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"workdir is ~/run, but no home directory is known"):
        claim_workdir("~/run", CONFIG)
    assert not list(tmp_path.iterdir())
    assert absolute("run~/~") == tmp_path / "run~" / "~"


INPUTS = {"corpus_dir": {"seed": 0, "input": 64 * "a"}, "init_from": {"step": 7}}


def test_inputs_are_recorded_once_and_compared(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    claim_workdir(tmp_path, CONFIG, INPUTS)  # one of an older version: they were not known
    claim_workdir(tmp_path, CONFIG, {"corpus_dir": INPUTS["corpus_dir"]})  # nothing else is loaded
    other = {"corpus_dir": {"seed": 0, "input": 64 * "b"}, "init_from": {"step": 9}}
    with pytest.raises(ValueError) as caught:
        claim_workdir(tmp_path, CONFIG, other)
    lines = str(caught.value).splitlines()
    assert str(tmp_path) in lines[0] and "--workdir" in lines[3]
    assert [line.strip() for line in lines[1:3]] == [
        f"corpus_dir: input {16 * 'a'} before, {16 * 'b'} now",
        "init_from: step 7 before, 9 now",
    ]
    assert json.loads((tmp_path / "inputs.json").read_text()) == INPUTS


def test_data_may_move_where_it_is_known_by_what_it_is(tmp_path):
    before, now = ({"corpus_dir": path, "init_from": "c"} for path in ("a", "b"))
    claim_workdir(tmp_path, before)
    with pytest.raises(ValueError, match='corpus_dir: "a" before, "b" now'):
        check_workdir(tmp_path, now)
    claim_workdir(tmp_path, before, INPUTS)
    check_workdir(tmp_path, now)
    with pytest.raises(ValueError, match="init_from"):
        check_workdir(tmp_path, {**now, "init_from": "d"})


def test_a_key_that_was_added_since_has_had_its_default(tmp_path, monkeypatch):
    claim_workdir(tmp_path, CONFIG)
    monkeypatch.setattr(workdirs, "ADDED_SINCE", {"model.norm": "post", "never": 1})
    added = {**CONFIG, "model": {**CONFIG["model"], "norm": "post"}}
    claim_workdir(tmp_path, added)
    claim_workdir(tmp_path, CONFIG)
    added["model"]["norm"] = "pre"
    with pytest.raises(ValueError, match='model.norm: "post" before, "pre" now'):
        claim_workdir(tmp_path, added)


HOLDER = """
import sys, time
from bipft_jax.checkpoints.workdir import owned
with owned(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_workdir_is_one_jobs_until_its_process_is_dead(tmp_path):
    workdir = tmp_path / "run"
    root = Path(__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, workdir], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"{workdir} is being run by process {holder.pid} "):
            with owned(workdir):
                pass
    finally:
        holder.kill()
        holder.communicate()
    assert (workdir / "lock").exists()
    with owned(workdir), pytest.raises(ValueError, match="is being run by"), owned(workdir):
        pass
    assert list(workdir.iterdir()) == []  # it was there before


def test_a_workdir_that_came_to_nothing_is_removed(tmp_path):
    with owned(tmp_path / "empty"):
        pass
    with owned(tmp_path / "claimed"):
        claim_workdir(tmp_path / "claimed", CONFIG)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "claimed",
        "claimed/config.json",
    ]


def test_a_file_system_without_locks_is_worth_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with owned(tmp_path):
        assert "cannot be locked (Operation not supported)" in caplog.text
