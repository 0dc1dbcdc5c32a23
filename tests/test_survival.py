"""Runs that are killed, stopped, resized or diverge: nothing is lost, nothing is done twice."""

import random
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipft_jax.checkpoints.manager import restore_params
from bipft_jax.models.parameters import named_leaves
from bipft_jax.training.optimizer import adamw, linear_schedule
from bipft_jax.training.state import new_state, require_finite
from bipft_jax.training.step import mean_metrics, next_state
from bipft_jax.training.telemetry import read_metrics
from tests.launching import CONFIG, PRETRAIN, digest, finish, run, start, start_job


def wait_for(path, process):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def logged_steps(workdir):
    return [point["step"] for point in read_metrics(workdir / "metrics.jsonl") if "loss" in point]


def test_a_killed_run_started_again_ends_with_the_same_bits(home, pretrained):
    workdir = home / "killed"
    process = start(home, CONFIG, workdir, **PRETRAIN)
    wait_for(workdir / "checkpoints" / "8", process)
    process.kill()
    process.communicate()
    assert not (workdir / "checkpoints" / "40").exists()
    run(home, CONFIG, workdir, **PRETRAIN)
    assert digest(workdir) == digest(pretrained)
    assert logged_steps(workdir) == list(range(4, 41, 4))


def test_a_run_that_is_told_to_stop_saves_and_goes_on(home, pretrained):
    workdir = home / "stopped"
    process = start(home, CONFIG, workdir, **PRETRAIN)
    wait_for(workdir / "checkpoints" / "8", process)
    process.send_signal(signal.SIGTERM)
    said = finish(process).stdout
    at = restore_params(workdir, "latest").step
    assert at < 40
    assert f"stopped after update {at}, which is saved: run the same command to resume" in said
    assert not (workdir / "result.json").exists()
    run(home, CONFIG, workdir, **PRETRAIN)
    assert digest(workdir) == digest(pretrained)
    assert logged_steps(workdir) == sorted({*range(4, 41, 4), at})


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(home, pretrained, seed):
    """Twice: at any moment of the first 20 seconds, of which compiling takes some."""
    rng, workdir = random.Random(seed), home / f"killed_{seed}"
    for _ in range(2):
        process = start(home, CONFIG, workdir, **PRETRAIN)
        time.sleep(rng.uniform(4, 20))
        process.kill()
        process.communicate()
    run(home, CONFIG, workdir, **PRETRAIN)
    assert digest(workdir) == digest(pretrained)


def interrupted_job(home, config, workdir, processes, begun, **options):
    """A run of several processes of which the last is told to stop as soon as the file or directory
    `begun` exists in the workdir; all stop after the same update, which they save."""
    job = start_job(home, config, workdir, processes, **options)
    wait_for(workdir / begun, job[0])
    job[-1].send_signal(signal.SIGTERM)
    said = [finish(process).stdout for process in job]
    at = restore_params(workdir, "latest").step
    assert at < options["num_updates"]
    assert f"stopped after update {at}" in said[0] and "stopped" not in "".join(said[1:])


@pytest.mark.parametrize(
    ("fsdp", "tensor", "undisturbed", "interrupted", "last"),
    [
        (2, 2, 1, (2,), 1),
        pytest.param(2, 2, 1, (4, 2), 1, marks=pytest.mark.long),
        # Sums of four: one process adds in another order than several.
        pytest.param(4, 1, 2, (2, 4), 2, marks=pytest.mark.long),
    ],
)
def test_on_the_same_mesh_any_number_of_processes_ends_with_the_same_bits(
    home, fsdp, tensor, undisturbed, interrupted, last
):
    """Four devices in all, dealt to another number of processes whenever the run goes on; `fsdp`
    and, with four, `tensor` lie across them."""
    options = {**PRETRAIN, "accumulation": 1, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    options |= {"num_updates": 12, "evaluate_every": 6}
    name = f"{fsdp}_{tensor}_{len(interrupted)}"
    whole, workdir = home / f"whole_{name}", home / f"dealt_{name}"
    for process in start_job(home, CONFIG, whole, undisturbed, devices=4 // undisturbed, **options):
        finish(process)
    # The first stops in its first updates: the second begins with these.
    for count, begun in zip(interrupted, ("config.json", "checkpoints/6")):
        interrupted_job(home, CONFIG, workdir, count, begun, devices=4 // count, **options)
    for process in start_job(home, CONFIG, workdir, last, devices=4 // last, **options):
        finish(process)
    assert digest(workdir) == digest(whole)


@pytest.mark.long
def test_two_processes_are_one_run_and_one_goes_on_on_another_mesh(home):
    """fp, whose trajectories can be compared across meshes."""
    config = "configs/pretrain.py:fp,tiny"
    options = {**PRETRAIN, "dropout": 0.0, "evaluate_every": 8}
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 2}
    run(home, config, home / "one", devices=4, **options, **mesh)

    workdir = home / "resized"
    interrupted_job(home, config, workdir, 2, "checkpoints/8", devices=2, **options, **mesh)
    run(home, config, workdir, devices=2, **options, **{"mesh.tensor": 2})

    assert sorted(set(logged_steps(workdir))) == logged_steps(workdir)
    one, other = (restore_params(home / name, "latest") for name in ("one", "resized"))
    for name, value in one.metrics.items():
        assert other.metrics[name] == pytest.approx(value, rel=1e-4), name
    others = named_leaves(other.params)
    for name, leaf in named_leaves(one.params).items():
        np.testing.assert_allclose(others[name], leaf, atol=1e-4, err_msg=name)


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    optimizer = adamw(0.5, weight_decay=0.0, clip_norm=0.0)
    state = new_state({"kernel": jnp.ones(3)}, optimizer)
    step = jax.jit(lambda s, g, loss: next_state(optimizer, s, {"kernel": g}, {"loss": loss}))
    good = jnp.full(3, 2.0)
    state, first = step(state, good, 1.0)
    np.testing.assert_allclose(
        state.params["kernel"], 0.5, rtol=1e-4
    )  # Adam's first step: the rate
    rows = [first]
    for gradient, loss in ((good.at[1].set(jnp.nan), 7.0), (good, jnp.inf)):
        after, metrics = step(state, gradient, loss)
        jax.tree.map(
            np.testing.assert_array_equal,
            (after.params, after.opt_state),
            (state.params, state.opt_state),
        )
        assert after.step == state.step + 1 and after.skipped_in_row == state.skipped_in_row + 1
        state = after
        rows.append(metrics)
    assert state.skipped_in_row == 2
    state, metrics = step(state, good, 4.0)
    assert state.skipped_in_row == 0 and state.params["kernel"][0] < 0.2
    total = jax.tree.map(lambda *values: sum(values), *rows, metrics)
    means = mean_metrics(total, 4)
    assert means["skipped_updates"] == 2 and means["loss"] == (1.0 + 4.0) / 2


def test_the_schedule_ends_though_updates_were_skipped():
    """Rates 0, 1, 0.75, 0.5, 0.25, 0; a step without moments moves by its rate."""
    rates = linear_schedule(1.0, 1, 5)
    optimizer = adamw(rates, weight_decay=0.0, clip_norm=1.0, b1=0.0, b2=0.0, eps=0.0)
    state = new_state({"bias": jnp.zeros(1)}, optimizer)
    step = jax.jit(lambda s, g: next_state(optimizer, s, {"bias": g}, {"loss": 0.0})[0])
    moved = []
    for gradient in (1.0, 1.0, jnp.nan, jnp.nan, 1.0, 1.0):
        after = step(state, jnp.full(1, gradient))
        moved.append(float(state.params["bias"][0] - after.params["bias"][0]))
        state = after
    np.testing.assert_allclose(moved, [0.0, 1.0, 0.0, 0.0, 0.25, 0.0], atol=1e-6)


def test_a_state_that_is_not_finite_is_not_saved_and_its_parameter_named():
    require_finite({"a": {"kernel": jnp.ones(2)}})
    with pytest.raises(FloatingPointError, match="not finite: a/kernel. This state"):
        require_finite({"a": {"bias": jnp.ones(2), "kernel": jnp.array([1.0, jnp.inf])}})


def test_a_run_that_diverges_stops_names_where_and_saves_nothing_bad(home):
    options = {**PRETRAIN, "learning_rate": 1e38, "warmup_updates": 0, "clip_norm": 0.0}
    options |= {"evaluate_every": 20, "log_every": 1, "max_skipped_updates": 3, "accumulation": 1}
    process = start(home, "configs/pretrain.py:bipft_a,tiny", home / "diverged", **options)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "4 updates in a row were skipped, from update 2 on: the gradient of " in said
    assert "is not finite at update 5 (examples 32 to 39 of the data)" in said
    assert "Traceback" not in said
    assert not list((home / "diverged" / "checkpoints").iterdir())
