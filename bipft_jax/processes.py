"""Jobs of several processes: joining, printing once, and stopping all after the same update."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import jax
from jax.experimental import multihost_utils

if TYPE_CHECKING:
    from bipft_jax.checkpoints.manager import Checkpointer


def join(
    find: bool, coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins this process to a job. Call it before any other use of JAX.

    Arguments:
      find: let JAX discover the other processes, as it can on a Cloud TPU slice, on GKE and under
        Slurm.
      coordinator_address: otherwise HOST:PORT of process 0, the same for all processes, with
        num_processes and process_id (from 0).

    Raises: ValueError if only some of the three are given, or JAX cannot join the job.
    """
    addresses = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in addresses.items() if value is None]
    if len(missing) == len(addresses) and not find:
        return
    if 0 < len(missing) < len(addresses):
        raise ValueError(
            f"--{missing[0]} is missing: a job is joined with all of {', '.join(addresses)}"
        )
    try:
        jax.distributed.initialize(**addresses)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the other processes were not found: {error}. Give --coordinator_address=HOST:PORT "
            "--num_processes=N --process_id=K"
        ) from error


def is_first() -> bool:
    """Whether this process writes the files that a job writes once: logs, results, the workdir."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints once per job."""
    if is_first():
        print(text, flush=True)


@contextmanager
def failing_at_once() -> Iterator[None]:
    """On failure prints the error and exits this process of a job immediately.

    Python's normal exit would wait for the other processes (JAX's exit handler), while these wait
    for this one in a collective, and all would abort minutes later. JAX detects a process that is
    gone, and ends the others.
    """
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, SystemExit) and not error.code
        if stopped or not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class Interruption:
    """Tells loops to save and stop, after the same update in all processes.

    A single process handles SIGTERM itself. In a job JAX handles SIGTERM and the platform's
    preemption notice; whichever process receives it, all agree on a future update. A request stays
    set, so that a stop requested between two loops stops the next one.
    """

    def __init__(self):
        self._heard = False

    def _hear(self, number: int, frame: object) -> None:
        self._heard = True

    def requested(self) -> bool:
        """Whether the loop must save and stop now; every process calls it after every update."""
        # JAX agrees on the number after the highest that any process has queried, and returns True
        # for that number only. The step could miss it: it restarts with every seed, and a restored
        # state begins late.
        if multihost_utils.reached_preemption_sync_point(next(_asked)):
            self._heard = True
        return self._heard

    @staticmethod
    def stop(step: int, checkpointer: Checkpointer, save: Callable[[], None]) -> NoReturn:
        """Saves the state, unless the step is already saved, and exits with status 0."""
        if checkpointer.latest_step() != step:
            save()
        checkpointer.wait()
        say(f"stopped after update {step}, which is saved: run the same command to resume")
        raise SystemExit(0)


_asked = itertools.count(1)  # JAX's sync point lives as long as the process
_listening: Interruption | None = None


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Listens while the context lasts. A nested context yields the outer `Interruption`, so that a
    request between two loops is not lost."""
    global _listening
    if _listening is not None:
        yield _listening
        return
    # In a job JAX listens itself; only the main thread may set a signal handler.
    alone = jax.process_count() == 1
    handles = alone and threading.current_thread() is threading.main_thread()
    _listening = Interruption()
    before = signal.signal(signal.SIGTERM, _listening._hear) if handles else None
    try:
        yield _listening
    finally:
        _listening = None
        if handles:
            signal.signal(signal.SIGTERM, before)
