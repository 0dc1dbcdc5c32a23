"""A job of several processes: how they find each other, who speaks, and when all stop together."""

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
    """Makes this process one of a job, before anything else is done with JAX.

    Arguments:
      find: let JAX find the others: on a Cloud TPU slice, on GKE and under Slurm it knows how.
      coordinator_address: else HOST:PORT of process 0, the same for all; with num_processes, and
        process_id from 0.

    Raises: ValueError if only some of the three are given, or the job was not found.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and not find:
        return
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"--{missing[0]} is missing: a job is joined with all of {', '.join(given)}"
        )
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the other processes were not found: {error}. Give --coordinator_address=HOST:PORT "
            "--num_processes=N --process_id=K"
        ) from error


def is_first() -> bool:
    """Whether this process writes what a job writes once: logs, results, workdir files."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints, once in a job."""
    if is_first():
        print(text, flush=True)


@contextmanager
def failing_at_once() -> Iterator[None]:
    """Ends this process of a job at once when its work fails, having printed why.

    Python's usual end waits for the other processes, as JAX asks of it, and those wait for this one
    in a collective: minutes later all abort. JAX notices one that is gone, and ends the others.
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

    A process alone listens for SIGTERM. In a job JAX does, and for the platform's notice that a
    machine will be taken; whichever process hears it, all agree on a moment that is still to come.
    Once heard it stays: the loop that is to stop may be the next one.
    """

    def __init__(self):
        self._heard = False

    def _hear(self, number: int, frame: object) -> None:
        self._heard = True

    def requested(self) -> bool:
        """Whether the loop should save and stop now; every process asks after every update."""
        # JAX agrees on the number after the highest that any process has asked with, and answers to
        # that number alone: updates, which begin anew with a seed and late with a restored state,
        # would miss it.
        if multihost_utils.reached_preemption_sync_point(next(_asked)):
            self._heard = True
        return self._heard

    @staticmethod
    def stop(step: int, checkpointer: Checkpointer, save: Callable[[], None]) -> NoReturn:
        """Saves, unless the step is saved, and ends the process as one that succeeded."""
        if checkpointer.latest_step() != step:
            save()
        checkpointer.wait()
        say(f"stopped after update {step}, which is saved: run the same command to resume")
        raise SystemExit(0)


_asked = itertools.count(1)  # JAX's agreement is one for the life of the process
_listening: Interruption | None = None


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Listens while the context lasts. Inside another one that goes on: what was heard between two
    loops is not forgotten."""
    global _listening
    if _listening is not None:
        yield _listening
        return
    # In a job JAX listens itself; and only the main thread may.
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
