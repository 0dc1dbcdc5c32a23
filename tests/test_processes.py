"""Jobs of two real processes: all stop together whenever it is asked for, and fail together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from bipft_jax.processes import interruption

JOB = """
import os, signal, sys, time
import jax, jax.numpy as jnp, optax
from jax.experimental import multihost_utils
from bipft_jax import processes
from bipft_jax.training import sharding
from bipft_jax.checkpoints.manager import Checkpointer
from bipft_jax.training.state import new_state

address, index, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def updates(name, first, last, told_in=None):
    with processes.interruption() as interrupted:
        for step in range(first, last):
            if step == told_in and index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if step == told_in:
                time.sleep(2)  # JAX learns of it in a thread of its own
            multihost_utils.sync_global_devices("as an update")
            if interrupted.requested() and step < last - 1:
                print(f"{name} stops after {step}", flush=True)
                return

with processes.failing_at_once():
    processes.join(False, address, 2, index)
"""


def job(body, workdir):
    """What both processes of a job print, their exit codes and the seconds it took."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    program = JOB + "".join(f"    {line}\n" for line in body.strip().splitlines())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    begin = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(index), str(workdir)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=250) for process in running]
    return said, [process.returncode for process in running], time.monotonic() - begin


def stops(body, workdir):
    """Where loops of a job stopped, the same in both processes; gloo may write into their lines."""
    said, codes, _ = job(body, workdir)
    first, second = (re.findall(r"(?:run|seed \d) stops after \d+", out) for out, _ in said)
    assert codes == [0, 0] and first == second, said
    return first


def test_a_job_is_told_to_stop_while_it_begins_at_a_late_update(tmp_path):
    """And just after it has saved a checkpoint, whose step is not the number of updates made."""
    body = """
mesh = sharding.make_mesh(1, 1)
state = sharding.put(mesh, new_state({"w": jnp.ones(8)}, optax.sgd(1.0)))
updates("seed 0", 0, 20)
with Checkpointer(workdir, keep_every=0, best_metric=None, best_mode="max") as checkpointer:
    checkpointer.save(3, state, config={}, tokenizer={})
updates("run", 500, 600, told_in=500)
"""
    assert stops(body, tmp_path) in (["run stops after 500"], ["run stops after 501"])


def test_what_a_job_heard_in_a_loops_last_update_stops_the_next_loop(tmp_path):
    body = """
with processes.interruption():
    updates("seed 0", 0, 3, told_in=2)
    updates("seed 1", 0, 20)
"""
    assert stops(body, tmp_path) in (["seed 1 stops after 0"], ["seed 1 stops after 1"])


def test_a_process_that_fails_ends_the_job_at_once_with_its_message(tmp_path):
    body = """
if index == 0:
    sys.exit("error: the disk of process 0 is full")
multihost_utils.sync_global_devices("which process 0 never reaches")
"""
    said, codes, seconds = job(body, tmp_path)
    assert codes[0] == 1 and codes[1] != 0
    assert "error: the disk of process 0 is full" in said[0][1]
    assert seconds < 100  # JAX's own barrier at the end takes 300


def test_what_a_process_alone_heard_between_two_loops_is_kept():
    before = signal.getsignal(signal.SIGTERM)
    with interruption():
        with interruption() as interrupted:
            assert not interrupted.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        with interruption() as interrupted:
            assert interrupted.requested()
    assert signal.getsignal(signal.SIGTERM) is before
    with interruption() as interrupted:
        assert not interrupted.requested()
