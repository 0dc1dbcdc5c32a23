"""Profiler traces of a range of updates, for xprof and TensorBoard's profile page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from bipft_jax.processes import say


class Profile:
    """Traces updates `first` + 1 to `last`; none if first = last.

    Every process traces its own host and devices; file names contain the host name.
    """

    def __init__(self, first: int, last: int, directory: str):
        self._first, self._last, self._directory = first, last, directory
        self._running, self._traced = False, first

    def after(self, step: int, result: Any) -> None:
        """Call it before the first update and after every update. result: output of that update;
        the start and the end of a trace wait for it."""
        if step == self._first < self._last and not self._running:
            jax.block_until_ready(result)
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif self._running:
            self._traced = step
            if step >= self._last:
                self.stop(result)

    def stop(self, result: Any = None) -> None:
        """Ends and writes the trace, if one is running."""
        if self._running:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._running = False
            say(f"wrote a trace of updates {self._first + 1} to {self._traced}: {self._directory}")


def profile_range(steps: str) -> tuple[int, int]:
    """Parses "a:b", which traces updates a + 1 to b, into (a, b); "" gives (0, 0).

    Raises: ValueError for anything else.
    """
    if not steps:
        return 0, 0
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"profile_steps is {steps!r}: give two updates, the first lower, as 10:15")
    return int(match[1]), int(match[2])


@contextmanager
def profiling(steps: str, directory: str) -> Iterator[Profile]:
    """A `Profile` that stops when the context ends."""
    profile = Profile(*profile_range(steps), directory)
    try:
        yield profile
    finally:
        profile.stop()
