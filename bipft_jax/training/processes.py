"""A job of several processes: how they find each other, who speaks, and when all stop together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from bipft_jax.training.checkpoints import Checkpointer


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


class Interruption:
    """Tells a loop to save and stop, after the same step in all processes.

    A process alone listens for SIGTERM. In a job JAX does, and for the platform's notice that a
    machine will be taken; whichever process hears it, all agree on a step that is still to come.
    """

    def __init__(self):
        self._heard = False

    def _hear(self, number: int, frame: object) -> None:
        self._heard = True

    def stops_after(self, step: int) -> bool:
        """Whether the loop should save now; every process asks after every step."""
        return self._heard or multihost_utils.reached_preemption_sync_point(step)

    @staticmethod
    def stop(step: int, checkpointer: Checkpointer, save: Callable[[], None]) -> NoReturn:
        """Saves, unless the step is saved, and ends the process as one that succeeded."""
        if checkpointer.latest_step() != step:
            save()
        checkpointer.wait()
        say(f"stopped after update {step}, which is saved: run the same command to resume")
        raise SystemExit(0)


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Listens while the context lasts."""
    heard = Interruption()
    # In a job JAX listens itself; and only the main thread may.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = signal.signal(signal.SIGTERM, heard._hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGTERM, before)
