"""Checkpoints come back bit for bit, survive kills and full disks, and keep what they promise."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bipft_jax.checkpoints.manager import (
    Checkpointer,
    CheckpointError,
    DamagedCheckpointError,
    restore_params,
    verify_tokenizer,
)
from bipft_jax.data.tokenizers import SPECIAL_PIECES, WordPieceTokenizer

# Orbax leaves unfinished reads behind when one of them meets a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"model": {"recipe": "bipft_b"}, "steps": 100}
TOKENIZER = {"kind": "wordpiece", "vocabulary": ["[PAD]", "é", "##s"]}


@flax.struct.dataclass
class TrainState:
    step: jax.Array
    params: Any
    opt_state: Any


def make_state(step: int, size: int = 6) -> TrainState:
    """Reproducible from its step; random bits, so that no two arrays agree by chance."""
    rng = np.random.default_rng(step)
    params = {
        "encoder": {
            "kernel": rng.normal(size=(size, 4)).astype(np.float32),
            "scale": np.float32(rng.normal()),
            "half": rng.normal(size=size).astype(jnp.bfloat16),
        },
        "codes": rng.integers(-5, 5, size=(3, 2), dtype=np.int32),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-3, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    )
    opt_state = jax.tree.map(
        lambda leaf: np.asarray(100 * rng.normal(size=leaf.shape)).astype(leaf.dtype),
        jax.eval_shape(optimizer.init, params),
    )
    return jax.device_put(TrainState(np.asarray(step, np.int32), params, opt_state))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def open_checkpoints(workdir: Path, **changes: Any) -> Checkpointer:
    options = {"keep_every": 0, "best_metric": None, "best_mode": "min"} | changes
    return Checkpointer(workdir, **options)


def save(
    checkpointer: Checkpointer, step: int, metrics: dict[str, float] | None = None, size: int = 6
) -> None:
    checkpointer.save(
        step, make_state(step, size), config=CONFIG, tokenizer=TOKENIZER, metrics=metrics
    )


def steps_on_disk(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def truncate_largest(directory: Path) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    files = [path for path in files if path.name != "commit_success.txt"]  # nobody reads it
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_round_trip_is_bitwise_even_if_the_buffers_are_donated(tmp_path):
    config = {"model": {"recipe": "bipft_b"}, "steps": 100}
    state = make_state(7, size=200_000)
    with open_checkpoints(tmp_path) as checkpointer:
        checkpointer.save(7, state, config=config, tokenizer=TOKENIZER, metrics={"loss": 2.5})
        config["steps"] = 5  # the caller's dictionary, changed while it is being written
        overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
        jax.block_until_ready(overwrite(state))
        checkpointer.wait()
    expected = make_state(7, size=200_000)
    with open_checkpoints(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 7
        assert_same_bits(checkpointer.restore(7, abstract(expected)), expected)
        assert checkpointer.config(7) == CONFIG
        assert checkpointer.tokenizer(7) == TOKENIZER
        assert checkpointer.metrics(7) == {"loss": 2.5}


def test_restores_to_the_shardings_that_are_asked_for(tmp_path):
    with open_checkpoints(tmp_path) as checkpointer:
        save(checkpointer, 1)
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.NamedSharding(mesh, jax.P())
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            make_state(1),
        )
        restored = checkpointer.restore(1, target)
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {sharding}


def test_latest_best_and_every_nth_survive_also_across_restarts(tmp_path):
    losses = {10: 5.0, 20: 3.0, 30: 4.0, 40: 3.5, 50: float("nan"), 60: 3.9, 70: None, 80: 4.2}
    # Retention needs the metrics of earlier processes: every save has its own.
    for step, loss in losses.items():
        with open_checkpoints(
            tmp_path, keep_every=30, best_metric="loss", best_mode="min"
        ) as checkpointer:
            save(checkpointer, step, None if loss is None else {"loss": loss})
    assert steps_on_disk(tmp_path) == {"20", "30", "60", "70", "80"}
    assert restore_params(tmp_path, "best").step == 20
    assert restore_params(tmp_path, "best").metrics == {"loss": 3.0}
    with open_checkpoints(tmp_path, best_metric="loss") as checkpointer:
        assert (checkpointer.latest_step(), checkpointer.best_step()) == (80, 20)


def test_best_by_a_maximum_in_one_process(tmp_path):
    with open_checkpoints(tmp_path, best_metric="f1", best_mode="max") as checkpointer:
        # Of equals the first: SPEC 2.7 replaces the best by what is strictly greater.
        for step, f1 in enumerate([0.1, 0.9, 0.8, 0.9, 0.2], start=1):
            save(checkpointer, step, {"f1": f1, "loss": 1 - f1})
        checkpointer.wait()
        assert steps_on_disk(tmp_path) == {"2", "4", "5"}
        assert checkpointer.best_step() == 2
    assert restore_params(tmp_path, "best").step == 2
    # By which metric, every checkpoint says.
    truncate_largest(tmp_path / "checkpoints" / "5" / "selection")
    assert restore_params(tmp_path, "best").step == 2


def test_a_finished_run_keeps_parameters_alone(tmp_path):
    with open_checkpoints(tmp_path, best_metric="loss") as checkpointer:
        for step, loss in enumerate([1.0, 2.0, 3.0], start=1):
            save(checkpointer, step, {"loss": loss})
        checkpointer.wait()
        assert steps_on_disk(tmp_path) == {"1", "2", "3"}
        checkpointer.keep_parameters({1, 3})
    assert steps_on_disk(tmp_path) == {"1", "3"}
    assert not list((tmp_path / "checkpoints").glob("*/training_state"))
    for step, which in ((1, "best"), (3, "latest")):
        assert restore_params(tmp_path, which).step == step


def test_without_metrics_only_the_two_latest_are_kept_and_the_latest_is_used(tmp_path):
    with open_checkpoints(tmp_path, best_metric="loss") as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
        save(checkpointer, 3)
        checkpointer.wait()
        assert checkpointer.best_step() is None
    assert steps_on_disk(tmp_path) == {"2", "3"}
    assert restore_params(tmp_path, "best").step == 3


def test_parameters_are_restored_without_the_optimizer_state(tmp_path):
    with open_checkpoints(tmp_path) as checkpointer:
        save(checkpointer, 3, {"loss": float("inf")})
    # Proof that nothing of the rest is read: it is not there.
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "training_state")
    restored = restore_params(tmp_path)
    assert_same_bits(restored.params, make_state(3).params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored.params))
    assert restored[1:] == (CONFIG, TOKENIZER, 3, {"loss": None})
    with open_checkpoints(tmp_path) as checkpointer:
        with pytest.raises(DamagedCheckpointError, match=r"/3 is damaged, in its training_state"):
            checkpointer.restore(3, abstract(make_state(3)))


def test_steps_that_are_not_there_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints in .*nothing/checkpoints. Is "):
        restore_params(tmp_path / "nothing")
    with open_checkpoints(tmp_path, keep_every=2) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.restore_latest(abstract(make_state(0))) is None
        save(checkpointer, 2)
        save(checkpointer, 3)
        with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are 2, 3"):
            checkpointer.restore(5, abstract(make_state(0)))
        with pytest.raises(CheckpointError, match="step 3; step 3 cannot be saved"):
            save(checkpointer, 3)
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; there are 2, 3"):
        restore_params(tmp_path, 4)
    assert restore_params(tmp_path, 2).step == 2


def test_another_model_is_refused_by_name_and_is_not_damage(tmp_path):
    with open_checkpoints(tmp_path) as checkpointer:
        save(checkpointer, 1)
        other = abstract(make_state(1, size=8))
        with pytest.raises(ValueError) as caught:
            checkpointer.restore_latest(other)
        assert not isinstance(caught.value, CheckpointError)
        assert "encoder/kernel has shape (6, 4), expected (8, 4)" in str(caught.value)
        # Orbax would convert this without a word.
        narrow = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, jnp.bfloat16 if leaf.dtype == jnp.float32 else leaf.dtype
            ),
            make_state(1),
        )
        with pytest.raises(ValueError, match="encoder/scale has dtype float32, expected bfloat16"):
            checkpointer.restore(1, narrow)
    assert steps_on_disk(tmp_path) == {"1"}


@pytest.mark.parametrize("item", ["params", "training_state", "config", "metrics"])
def test_truncated_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, item):
    size = 2000  # so that the largest file of an item with arrays holds an array
    with open_checkpoints(tmp_path, keep_every=1, best_metric="loss") as checkpointer:
        save(checkpointer, 1, {"loss": 1.0}, size)
        save(checkpointer, 2, {"loss": 2.0}, size)
    truncate_largest(tmp_path / "checkpoints" / "2" / item)
    with caplog.at_level(logging.ERROR, "bipft_jax"):
        if item != "training_state":
            assert restore_params(tmp_path).step == 1
        with open_checkpoints(tmp_path, keep_every=1, best_metric="loss") as checkpointer:
            state, step = checkpointer.restore_latest(abstract(make_state(1, size)))
            assert step == checkpointer.latest_step() == 1
            assert_same_bits(state, make_state(1, size))
            save(checkpointer, 2, size=size)
    assert str(tmp_path / "checkpoints" / "2") in caplog.text
    assert steps_on_disk(tmp_path) == {"1", "2", "damaged-2"}
    assert_same_bits(restore_params(tmp_path, 2).params, make_state(2, size).params)


def test_if_every_checkpoint_is_damaged_nothing_is_moved(tmp_path):
    with open_checkpoints(tmp_path, keep_every=1) as checkpointer:
        save(checkpointer, 1)
        save(checkpointer, 2)
        checkpointer.wait()
        for step in ("1", "2"):
            truncate_largest(tmp_path / "checkpoints" / step / "training_state")
        with pytest.raises(DamagedCheckpointError, match=r"checkpoints/2 is.*checkpoints/1 is"):
            checkpointer.restore_latest(abstract(make_state(1)))
    for step in ("1", "2"):
        truncate_largest(tmp_path / "checkpoints" / step / "metrics")
    with pytest.raises(DamagedCheckpointError, match=r"checkpoints/1 is.*checkpoints/2 is"):
        open_checkpoints(tmp_path, keep_every=1)
    assert steps_on_disk(tmp_path) == {"1", "2"}


def run_python(program: str, workdir: Path) -> subprocess.CompletedProcess:
    """Runs a program that may import this module as `t`, with the workdir as its argument."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", f"import {__name__} as t\n{program}", str(workdir)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


FULL_DISK = """
import json, os, pathlib, resource, sys
workdir = pathlib.Path(sys.argv[1])
report = {}
def limit(size):
    # Writing past this size of any file fails with EFBIG, as writing to a full disk with ENOSPC.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
with t.open_checkpoints(workdir) as checkpointer:
    t.save(checkpointer, 1)
    checkpointer.wait()
    for step, call in ((2, "wait"), (3, "save"), (4, "json")):
        size = 6 if call == "json" else 100_000
        tokenizer = t.TOKENIZER | ({"pieces": ["x"] * 500_000} if call == "json" else {})
        limit(200_000)
        try:
            checkpointer.save(step, t.make_state(2, size), config=t.CONFIG, tokenizer=tokenizer)
            t.save(checkpointer, 9) if call == "save" else checkpointer.wait()
        except t.CheckpointError as error:
            report[call] = [type(error).__name__, str(error), checkpointer.latest_step()]
        limit(resource.RLIM_INFINITY)
    report["after failures"] = sorted(t.steps_on_disk(workdir))
    state, report["restored"] = checkpointer.restore_latest(t.abstract(t.make_state(1)))
    t.assert_same_bits(state, t.make_state(1))
    t.save(checkpointer, 5)
report["after recovery"] = sorted(t.steps_on_disk(workdir))
print(json.dumps(report))
"""


def test_full_disk_is_an_error_and_leaves_the_checkpoint_before(tmp_path):
    result = run_python(FULL_DISK, tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    for step, call in ((2, "wait"), (3, "save"), (4, "json")):
        kind, message, latest = report[call]
        assert (kind, latest) == ("SaveError", 1)
        assert f"step {step} could not be written" in message and str(tmp_path) in message
        assert "File too large" in message and "checkpoint of step 1 is untouched" in message
    complete = [name for name in report["after failures"] if name.isdigit()]
    assert complete == ["1"]
    assert report["restored"] == 1
    assert {"1", "5"} == {name for name in report["after recovery"] if name.isdigit()}


KILLED = """
import os, pathlib, signal, sys, threading, time
workdir = pathlib.Path(sys.argv[1])
checkpointer = t.open_checkpoints(workdir)
t.save(checkpointer, 1)
checkpointer.wait()
state = t.make_state(2, size=200_000)
def kill_when_begun():
    while t.steps_on_disk(workdir) == {"1"}:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill_when_begun).start()
checkpointer.save(2, state, config=t.CONFIG, tokenizer=t.TOKENIZER)
checkpointer.close()
"""


def test_kill_while_saving_leaves_the_checkpoint_before(tmp_path):
    result = run_python(KILLED, tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = steps_on_disk(tmp_path)
    assert "1" in left and "2" not in left and len(left) == 2, "not killed within the save"
    assert restore_params(tmp_path).step == 1
    with open_checkpoints(tmp_path) as checkpointer:
        state, step = checkpointer.restore_latest(abstract(make_state(1)))
        assert step == 1
        assert_same_bits(state, make_state(1))
        save(checkpointer, 3)
    assert steps_on_disk(tmp_path) == {"1", "3"}
    assert_same_bits(restore_params(tmp_path).params, make_state(3).params)


def test_a_checkpoint_refuses_a_tokenizer_that_is_not_its_own(tmp_path):
    own = WordPieceTokenizer([*SPECIAL_PIECES, "a", "b"])
    same = WordPieceTokenizer([*SPECIAL_PIECES, "a", "b"])
    other = WordPieceTokenizer([*SPECIAL_PIECES, "a", "b", "##c"])
    message = "WordPieceTokenizer with 7 .*WordPieceTokenizer with 8 "
    with open_checkpoints(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), config=CONFIG, tokenizer=own.to_dict())
        target = abstract(make_state(1))
        assert checkpointer.restore_latest(target, tokenizer=same)[1] == 1
        with pytest.raises(ValueError, match=message):
            checkpointer.restore_latest(target, tokenizer=other)
    with pytest.raises(ValueError, match=message):
        verify_tokenizer(restore_params(tmp_path).tokenizer, other)
    verify_tokenizer(restore_params(tmp_path).tokenizer, same)


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="best_mode is 'lower'"):
        open_checkpoints(tmp_path, best_mode="lower")
