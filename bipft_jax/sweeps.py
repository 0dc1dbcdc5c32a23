"""Sweeps: runs of all points of a grid, with one table and one plot.

A point maps config keys to values. It runs in a directory of its own, WORKDIR/NAME, and is finished
once the directory has a run's result.json, so a stopped sweep resumes. `launch/sweep.py` is the
command; from Python or Colab:

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
import csv
import dataclasses
import hashlib
import itertools
import math
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bipft_jax.checkpoints.workdir import changed_inputs, recorded_inputs
from bipft_jax.paths import replacing, require_local
from bipft_jax.reports.results import Scores, finished_scores
from bipft_jax.reports.tables import aligned

TABLE_NAME = "sweep.csv"
FIGURE_NAME = "sweep.png"
FAILURE_NAME = "failed.txt"  # in the directory of a point: the traceback of its last start

Point = dict[str, Any]

_SEED_KEYS = ("seed", "seeds")  # of pretraining, of finetuning
_LONGEST_NAME = 120  # characters; file systems take 255 bytes
_COLUMNS = 4
_MOST_TICKS = 8  # a numeric axis with at most so many values has a tick at every value


def product(*lists: Sequence[Mapping[str, Any]], **values: Iterable[Any]) -> list[Point]:
    """Every combination of the points of the lists and the named values, the last one varying
    fastest: `product(zipped(size=("tiny", "mini"), learning_rate=(2e-3, 1e-3)), seed=(0, 1))`.

    Raises: ValueError for a duplicate key, or a single value instead of a list of values.
    """
    factors = [*lists, *([{key: value} for value in _values(key, values[key])] for key in values)]
    points = []
    for combination in itertools.product(*factors):
        point: Point = {}
        for part in combination:
            if twice := point.keys() & part.keys():
                raise ValueError(f"{min(twice)} is named twice in one product")
            point.update(part)
        points.append(point)
    return points


def zipped(**values: Iterable[Any]) -> list[Point]:
    """A point of the first values of all keys, then one of the second values, and so on.

    Raises: ValueError for lists of unequal length, or a single value instead of a list of values.
    """
    columns = {key: _values(key, column) for key, column in values.items()}
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{key} has {len(column)}" for key, column in columns.items())
        raise ValueError(f"values taken together must be as many of each: {lengths}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _values(key: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{key} is {values!r}: give a tuple of values")
    return [value.item() if isinstance(value, np.generic) else value for value in values]


def point_name(point: Mapping[str, Any]) -> str:
    """The name of a point's directory, such as `learning_rate=0.0003,seeds=0`, independent of the
    order of its keys. Characters unfit for a file name are replaced, and a hash keeps such names
    unique.

    Raises: ValueError for a point without values.
    """
    if not point:
        raise ValueError("a point has no values: give it at least one key")
    values = {key: point[key] for key in sorted(point)}
    text = label(values, separator=",")
    name = re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)
    ambiguous = any(re.search("[,=]", value_text(value)) for value in values.values())
    if name == text and not ambiguous and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"


def value_text(value: Any) -> str:
    """A value as text for a name, an axis or a legend; the parts of a tuple are joined by "+"."""
    return "+".join(map(value_text, value)) if isinstance(value, (tuple, list)) else str(value)


def label(values: Mapping[str, Any], separator: str = ", ") -> str:
    """KEY=VALUE of all entries, joined by the separator."""
    return separator.join(f"{key}={value_text(value)}" for key, value in values.items())


def named(points: Iterable[Mapping[str, Any]]) -> dict[str, Point]:
    """The points by name, in order.

    Raises: ValueError for no points, or two points with the same name.
    """
    found: dict[str, Point] = {}
    for point in points:
        name = point_name(point)
        if name in found:
            raise ValueError(f"two points of the sweep are {name}: each may be there once")
        found[name] = dict(point)
    if not found:
        raise ValueError("the sweep has no points")
    return found


def outcome(directory: str | Path) -> tuple[str, Scores | None]:
    """The state of the point of a directory, "finished", "failed" or "waiting" (not started or not
    complete), and the scores of a finished point."""
    try:
        scores = finished_scores(directory)
    except ValueError:  # not written by a run: the point must start again
        return "failed", None
    if scores is not None:
        return "finished", scores
    return ("failed" if (Path(directory) / FAILURE_NAME).exists() else "waiting"), None


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
            f"{workdir / name} does not stand on what {workdir / finished[0]} stands on "
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


def rows(points: Iterable[Mapping[str, Any]], workdir: str | Path) -> list[dict[str, Any]]:
    """One row per point and seed: the swept values, the seed (None for an unfinished point that
    does not sweep it), the state by `outcome`, and all scores of a finished point."""
    table = []
    for name, point in named(points).items():
        state, scores = outcome(Path(workdir) / name)
        by_seed = scores.by_seed if scores else {seed: {} for seed in _seeds(point)}
        for seed, values in by_seed.items():
            table.append({**point, "seed": seed, "state": state, **values})
    return table


def _seeds(point: Mapping[str, Any]) -> tuple[int | None, ...]:
    return tuple(point.get("seeds", ())) or (point.get("seed"),)


def write_table(table: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Replaces a CSV file by the rows, with one column per key that any row has."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)


def write_report(points: Iterable[Mapping[str, Any]], workdir: str | Path) -> None:
    """Writes WORKDIR/sweep.csv and WORKDIR/sweep.png from the current state of the points."""
    points, workdir = list(points), Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_table(rows(points, workdir), workdir / TABLE_NAME)
    with replacing(workdir / FIGURE_NAME) as temporary:
        figure(points, workdir).savefig(temporary, dpi=120, format="png")


@dataclasses.dataclass
class _Setting:
    """Points that differ in their seeds only.

    values: the swept keys but the seed. scores: finished seed -> (selection metric, name of the
    point). states: of the points.
    """

    values: Point
    scores: dict[int, tuple[float, str]] = dataclasses.field(default_factory=dict)
    states: list[str] = dataclasses.field(default_factory=list)

    @property
    def by_seed(self) -> list[float]:
        return [score for score, _ in self.scores.values()]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed)

    @property
    def deviation(self) -> float:
        """The standard deviation over seeds; NaN for a single seed."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.scores) > 1 else math.nan


def _settings(
    points: Iterable[Mapping[str, Any]], workdir: str | Path
) -> tuple[list[_Setting], dict[str, bool]]:
    """The settings in order of appearance, and the selection metrics of the finished ones, with
    whether higher is better."""
    settings: dict[str, _Setting] = {}
    metrics = {}
    for name, point in named(points).items():
        values = {key: value for key, value in point.items() if key not in _SEED_KEYS}
        setting = settings.setdefault(repr(sorted(values.items())), _Setting(values))
        state, scores = outcome(Path(workdir) / name)
        setting.states.append(state)
        if scores is not None:
            metrics[scores.metric] = scores.higher_is_better
            for seed, of_seed in scores.by_seed.items():
                setting.scores[seed] = of_seed[scores.metric], name
    return list(settings.values()), metrics


def summary(points: Iterable[Mapping[str, Any]], workdir: str | Path) -> str:
    """A table as text: for every setting, mean and standard deviation of the selection metric over
    its seeds; then the best setting and its best run.

    If metrics differ, as between tasks, no setting is the best.
    """
    settings, metrics = _settings(points, workdir)
    keys = list(dict.fromkeys(key for setting in settings for key in setting.values))
    table = [[*keys, *_metric_text(metrics, "mean "), "deviation", "seeds", "state"]]
    for setting in settings:
        count = len(setting.scores)
        numbers = [setting.mean if count else math.nan, setting.deviation]
        counts = {state: setting.states.count(state) for state in dict.fromkeys(setting.states)}
        table.append(
            [
                *(value_text(setting.values.get(key, "-")) for key in keys),
                *("-" if math.isnan(number) else f"{number:.4f}" for number in numbers),
                str(count),
                ", ".join(counts if len(counts) == 1 else (f"{n} {s}" for s, n in counts.items())),
            ]
        )
    lines = [aligned(table)]
    comparable = [s for s in settings if s.scores and math.isfinite(s.mean)]
    if len(metrics) == 1 and comparable:
        ((metric, higher_is_better),) = metrics.items()
        choose = max if higher_is_better else min
        best = choose(comparable, key=lambda setting: setting.mean)
        (_, name), seeds = choose(best.scores.values()), len(best.scores)
        lines.append(
            f"best mean {metric}: {label(best.values) or 'of all seeds'}, {best.mean:.4f} over "
            f"{seeds} seed{'s' * (seeds > 1)}; its best run: {Path(workdir) / name}"
        )
    return "\n".join(lines)


def _metric_text(metrics: Iterable[str], prefix: str = "") -> list[str]:
    return [prefix + (" or ".join(metrics) or "score")]


def figure(points: Iterable[Mapping[str, Any]], workdir: str | Path) -> Figure:
    """One panel per swept key except the seed: the selection metric against the value, as mean and
    standard deviation over seeds with single seeds as dots, one line per setting of the other keys.

    A numeric axis is logarithmic if the values span a factor of 10 or more. Unfinished points
    appear on the axis only.
    """
    settings, metrics = _settings(points, workdir)
    keys = list(dict.fromkeys(key for setting in settings for key in setting.values)) or [None]
    rows_of_panels, columns = -(-len(keys) // _COLUMNS), min(len(keys), _COLUMNS)
    drawing = Figure(layout="constrained")
    for number, key in enumerate(keys, start=1):
        panel = drawing.add_subplot(rows_of_panels, columns, number)
        _draw(panel, settings, key)
        panel.set_xlabel(key or "seeds", fontsize=8)
        panel.set_ylabel(*_metric_text(metrics), fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    most_lines = max(len(panel.containers) for panel in drawing.axes)
    height = 3.6 + 0.08 * most_lines  # inches; legends are above the panels, two lines in a row
    drawing.set_size_inches(4.8 * columns, height * rows_of_panels)
    return drawing


def _draw(panel: Axes, settings: list[_Setting], key: str | None) -> None:
    values = [setting.values.get(key, "all") for setting in settings]
    texts = list(dict.fromkeys(map(value_text, values)))
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    places = values if numeric else [texts.index(value_text(value)) for value in values]
    lines: dict[str, list[tuple[float, _Setting]]] = {}
    for place, setting in zip(places, settings, strict=True):
        others = {name: value for name, value in setting.values.items() if name != key}
        lines.setdefault(label(others), []).append((place, setting))
    for name, line in lines.items():
        finished = sorted((p for p in line if p[1].scores), key=lambda p: p[0])
        if not finished:
            continue
        bars = panel.errorbar(
            [place for place, _ in finished],
            [setting.mean for _, setting in finished],
            yerr=[setting.deviation for _, setting in finished],
            marker="o",
            markersize=4,
            linewidth=1.4,
            capsize=3,
            label=name,
        )
        dots = [(place, score) for place, setting in finished for score in setting.by_seed]
        color = bars.lines[0].get_color()
        panel.plot(*zip(*dots, strict=True), ".", color=color, markersize=10, alpha=0.4, mew=0)
    if numeric and min(places) > 0 and max(places) >= 10 * min(places):
        panel.set_xscale("log")
    if not numeric:
        panel.set_xticks(range(len(texts)), texts)
        panel.set_xlim(-0.5, len(texts) - 0.5)
    elif len(set(places)) <= _MOST_TICKS:
        panel.minorticks_off()
        panel.set_xticks(sorted(set(places)), [f"{place:g}" for place in sorted(set(places))])
    if len(lines) > 1:
        panel.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
