"""Sweeps: runs all points of a grid, and keeps one table and one plot of them.

A point maps config keys to values. It runs in a directory of its own, WORKDIR/NAME, and is finished
once the directory has a run's result.json, so a stopped sweep resumes. `launch/sweep.py` is the
command; from Python or Colab:

    from bipft_jax.points import product
    from bipft_jax.reports.sweep import figure, summary
    from bipft_jax.sweeps import run

    def start(point, workdir):
        config = get_config("bipft_b,rte")
        config.update(init_from="runs/bipft_b", glue_dir="data/glue", **point)
        finetune.train(config, workdir)

    points = product(learning_rate=(1e-4, 3e-4, 1e-3), seeds=((0,), (1,)))
    failures = run(points, start, "runs/sweep")
    print(summary(points, "runs/sweep"))
    figure(points, "runs/sweep")

Settings that all points share are not in their names: another setting needs another WORKDIR.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bipft_jax.checkpoints.workdir import changed_inputs, recorded_inputs
from bipft_jax.paths import require_local
from bipft_jax.points import Point, named
from bipft_jax.reports.results import finished_scores
from bipft_jax.reports.sweep import FAILURE_NAME, outcome, write_report


def run(
    points: Iterable[Mapping[str, Any]],
    start: Callable[[Point, Path], Any],
    workdir: str | Path,
    parallel: int = 1,
) -> dict[str, str]:
    """Runs every unfinished point, and keeps WORKDIR's table and plot up to date.

    Arguments:
      start: called with a point and its directory, which exists; writes a run's result.json into
        the directory. An exception is recorded in the directory, and the other points still run.
      parallel: number of points at a time. One runs in the calling thread, several run in threads.
        With threads an interruption starts no further point, but only `start` can end the running
        ones (processes, say).

    Returns: the errors of failed points, by name.

    Raises: ValueError for no points, two points with the same name, `parallel` below 1, finished
      points with different inputs, or a workdir that is gs:// or the like; OSError if table or plot
      cannot be written.
    """
    require_local({"workdir": workdir})
    by_name, workdir = named(points), Path(workdir)
    if parallel < 1:
        raise ValueError(f"parallel is {parallel}: at least one point runs at a time")
    numbers = {name: f"{n} of {len(by_name)}" for n, name in enumerate(by_name, start=1)}
    unfinished = [name for name in by_name if outcome(workdir / name)[0] != "finished"]
    for name in by_name:
        _check_inputs(name, by_name, workdir)

    def attempt(name: str) -> tuple[str, float, Exception | None]:
        print(f"{numbers[name]} starts: {name}", flush=True)
        began, error = time.monotonic(), None
        try:
            directory = workdir / name
            directory.mkdir(parents=True, exist_ok=True)
            (directory / FAILURE_NAME).unlink(missing_ok=True)
            start(dict(by_name[name]), directory)
            if finished_scores(directory) is None:
                raise ValueError(f"ended without a result in {directory}")
            _check_inputs(name, by_name, workdir)
        except Exception as raised:
            error = raised
        return name, time.monotonic() - began, error

    print(f"{len(by_name)} points in {workdir}, {len(by_name) - len(unfinished)} finished before")
    write_report(by_name.values(), workdir)
    failures = {}
    with contextlib.closing(_attempts(attempt, unfinished, parallel)) as attempts:
        for name, seconds, error in attempts:
            if error is None:
                end = f"finished in {seconds:.0f} s: {name}, {_mean_text(workdir / name)}"
            else:
                failures[name] = f"{type(error).__name__}: {error}"
                text = "".join(traceback.format_exception(error))
                (workdir / name / FAILURE_NAME).write_text(text, encoding="utf-8")
                end = f"failed after {seconds:.0f} s: {name}, {failures[name].splitlines()[0]}"
            print(f"{numbers[name]} {end}", flush=True)
            write_report(by_name.values(), workdir)
    return failures


def _check_inputs(name: str, by_name: Mapping[str, Point], workdir: Path) -> None:
    """Raises ValueError if a finished point used another corpus, task or checkpoint than the first
    finished point, unless that key is swept: their scores would not be comparable."""
    finished = [other for other in by_name if outcome(workdir / other)[0] == "finished"]
    if name not in finished:
        return
    inputs = [recorded_inputs(workdir / other) for other in (finished[0], name)]
    swept = by_name[finished[0]].keys() | by_name[name].keys()
    swept |= {"glue_dir"} if "task" in swept else set()
    before, now = ({key: of[key] for key in of.keys() - swept} for of in inputs)
    if changed := changed_inputs(before, now):
        raise ValueError(
            f"{workdir / name} has other inputs than {workdir / finished[0]} "
            f"({'; '.join(changed)}): delete one of the two, or use another --workdir"
        )


def _attempts(attempt: Callable[[str], Any], names: list[str], parallel: int) -> Iterator[Any]:
    """The results of the attempts, in the order in which they end."""
    if parallel == 1:
        yield from map(attempt, names)
        return
    pool = ThreadPoolExecutor(parallel)
    try:
        for future in as_completed([pool.submit(attempt, name) for name in names]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _mean_text(directory: Path) -> str:
    scores = finished_scores(directory)
    values = [of_seed[scores.metric] for of_seed in scores.by_seed.values()]
    return f"{scores.metric} {statistics.fmean(values):.4f}"
