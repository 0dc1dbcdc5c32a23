"""The state of a sweep: its points' outcomes, one table and one plot of them all."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bipft_jax.checkpoints.workdir import checkpoint_named
from bipft_jax.paths import replacing
from bipft_jax.points import Point, label, named, value_text
from bipft_jax.reports.results import Scores, finished_scores
from bipft_jax.reports.tables import aligned

TABLE_NAME = "sweep.csv"
FIGURE_NAME = "sweep.png"
FAILURE_NAME = "failed.txt"  # in the directory of a point: the traceback of its last start

_SEED_KEYS = ("seed", "seeds")  # of pretraining, of finetuning
_COLUMNS = 4
_MOST_TICKS = 8  # a numeric axis with at most so many values has a tick at every value
_MOST_CHARACTERS = 50  # of the texts of an axis that fit beside each other
_LONGEST_TEXT = 40  # of a legend with two columns
_LONGEST_TITLE = 70  # of a line of an axis title
_MOST_LINES = 10  # of different colours


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

    A numeric axis is logarithmic if the values span a factor of 10 or more. Checkpoints
    WORKDIR@UPDATE of one workdir have a numeric axis, of updates. Unfinished points appear on the
    axis only.

    Left out, so that points around one setting make a picture too: in a panel, lines of one value
    if others have several; among the panels, those without a line of several values and those with
    more than ten lines, if a panel remains.
    """
    settings, metrics = _settings(points, workdir)
    keys = list(dict.fromkeys(key for setting in settings for key in setting.values))
    panels = _worth_drawing([_panel(key, settings) for key in keys or [None]])
    rows_of_panels, columns = -(-len(panels) // _COLUMNS), min(len(panels), _COLUMNS)
    drawing = Figure(layout="constrained")
    for number, panel in enumerate(panels, start=1):
        axes = drawing.add_subplot(rows_of_panels, columns, number)
        _draw(axes, panel)
        axes.set_xlabel(textwrap.fill(panel.title, _LONGEST_TITLE), fontsize=8)
        axes.set_ylabel(*_metric_text(metrics), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    rows_of_legend = max(len(panel.lines) / panel.legend_columns for panel in panels)
    height = 3.6 + 0.16 * rows_of_legend  # inches; legends are above the panels
    drawing.set_size_inches(4.8 * columns, height * rows_of_panels)
    return drawing


_Line = list[tuple[float, _Setting]]  # settings with their places on the axis


@dataclasses.dataclass
class _Panel:
    """The scores against one key.

    title: of the axis. texts: of the places 0, 1, ... of an axis of names; None for numbers.
    places: of all settings. lines: with their texts in the legend.
    """

    title: str
    texts: list[str] | None
    places: list[float]
    lines: list[tuple[str, _Line]]

    @property
    def connects(self) -> bool:
        """Whether a line has several values."""
        return any(_several(line) for _, line in self.lines)

    @property
    def legend_columns(self) -> int:
        """The number of texts beside each other, so that they are not wider than the panel."""
        return 2 if max(len(text) for text, _ in self.lines) <= _LONGEST_TEXT else 1


def _panel(key: str | None, settings: Sequence[_Setting]) -> _Panel:
    """The panel of a key; None for seeds alone."""
    title, texts, places = _axis(key, [setting.values.get(key, "all") for setting in settings])
    lines: dict[str, _Line] = {}
    others: dict[str, Point] = {}
    for place, setting in zip(places, settings, strict=True):
        rest = {name: value for name, value in setting.values.items() if name != key}
        others[repr(rest)] = rest
        lines.setdefault(repr(rest), []).append((place, setting))
    shown = [name for name, line in lines.items() if _several(line)] or list(lines)
    shared, different = _told_apart([others[name] for name in shown])
    title += f", at {label(shared)}" if shared else ""
    named_lines = [*zip(map(label, different), map(lines.get, shown), strict=True)]
    return _Panel(title, texts, places, named_lines)


def _several(line: _Line) -> bool:
    return len({place for place, _ in line}) > 1


def _axis(key: str | None, values: list[Any]) -> tuple[str, list[str] | None, list[float]]:
    """Title, texts and places of a `_Panel`."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return str(key), None, values
    if all(isinstance(value, str) for value in values):
        workdirs, updates = zip(*map(checkpoint_named, values), strict=True)
        if len(set(workdirs)) == 1 and None not in updates:
            return f"{key}: updates of {workdirs[0]}", None, list(updates)
    names = [*map(value_text, values)]
    texts = list(dict.fromkeys(names))
    return key or "seeds", texts, [*map(texts.index, names)]


def _told_apart(points: Sequence[Point]) -> tuple[Point, list[Point]]:
    """What all points share, and of each point keys that tell it from the others, none of which can
    be left out."""

    def reduced(point: Point, keys: Iterable[str]) -> Point:
        return {key: point[key] for key in keys if key in point}

    keys = list(dict.fromkeys(key for point in points for key in point))
    shared = [
        key
        for key in keys
        if all(key in point and point[key] == points[0][key] for point in points)
    ]
    for key in (*shared, *reversed(keys)):
        fewer = [other for other in keys if other != key]
        if len({repr(reduced(point, fewer)) for point in points}) == len(points):
            keys = fewer
    return reduced(points[0], shared), [reduced(point, keys) for point in points]


def _worth_drawing(panels: list[_Panel]) -> list[_Panel]:
    connected = [panel for panel in panels if panel.connects]
    return [p for p in connected if len(p.lines) <= _MOST_LINES] or connected or panels


def _draw(axes: Axes, panel: _Panel) -> None:
    """Draws lines, axis and legend."""
    for text, line in panel.lines:
        finished = sorted((p for p in line if p[1].scores), key=lambda p: p[0])
        if not finished:
            continue
        bars = axes.errorbar(
            [place for place, _ in finished],
            [setting.mean for _, setting in finished],
            yerr=[setting.deviation for _, setting in finished],
            marker="o",
            markersize=4,
            linewidth=1.4,
            capsize=3,
            label=text,
        )
        dots = [(place, score) for place, setting in finished for score in setting.by_seed]
        color = bars.lines[0].get_color()
        axes.plot(*zip(*dots, strict=True), ".", color=color, markersize=10, alpha=0.4, mew=0)
    places = sorted(set(panel.places))
    if panel.texts is None:
        if places[0] > 0 and places[-1] >= 10 * places[0]:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if len(places) <= _MOST_TICKS:
            axes.minorticks_off()
            axes.set_xticks(places, [f"{place:g}" for place in places])
    else:
        crowded = sum(map(len, panel.texts)) > _MOST_CHARACTERS
        slanted = dict(rotation=20, ha="right", rotation_mode="anchor") if crowded else {}
        axes.set_xticks(range(len(panel.texts)), panel.texts, **slanted)
        axes.set_xlim(-0.5, len(panel.texts) - 0.5)
    if len(panel.lines) > 1 and axes.containers:
        axes.legend(
            fontsize=7,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=panel.legend_columns,
        )
