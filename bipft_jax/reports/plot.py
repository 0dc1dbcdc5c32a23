"""Plots the logs of runs: losses, accuracies, flips of weights, zeros among them, learned scales.

    python -m bipft_jax.plot WORKDIR... --output curves.png

Each panel overlays all runs, finished or still running. The directory of a finetuning run includes
all its seeds, that of a sweep all its points.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bipft_jax.objectives.objective import Panel
from bipft_jax.objectives.table import OBJECTIVES
from bipft_jax.paths import require_local, require_writable
from bipft_jax.training.telemetry import METRICS_NAME, read_metrics

Records = list[dict[str, Any]]

# Panels with their own titles: for every run, and for each objective.
_PANELS = (
    Panel("loss", "loss", "validation/loss", None),
    *(panel for objective in OBJECTIVES.values() for panel in objective.panels),
    Panel("weights whose code changed", "flip_ratio", None, None),
    Panel("ternary weights that are 0", "zero_ratio", None, None),
    Panel("keys attended to by a token", None, "validation/attended_keys", None),
)
_DEV, _SCALES = "dev/", "scales/"
_COLUMNS = 4


def runs_in(directories: Iterable[str | Path]) -> dict[str, Records]:
    """The log points of runs by short name: the directory's, with the seed of a finetuning run.

    Raises: ValueError for a directory without metrics.jsonl, or a metrics.jsonl that cannot be read
      or holds anything but numbers and null (a non-finite number).
    """
    runs = {}
    for directory in map(Path, directories):
        paths = sorted(directory.rglob(METRICS_NAME))
        if not paths:
            raise ValueError(
                f"{directory} has no {METRICS_NAME}, nor has a directory below it: give the "
                "workdir of a run that has begun"
            )
        for path in paths:
            inner = path.parent.relative_to(directory)
            name = (Path(directory.resolve().name) / inner).as_posix()
            name = name if name not in runs else str(path.parent)
            runs[name] = read_metrics(path)
            for key, value in (item for point in runs[name] for item in point.items()):
                if not isinstance(value, int | float | None):
                    raise ValueError(f"{path}: {key} is {value!r} at a step, not a number")
    return runs


def figure(runs: Mapping[str, Records]) -> Figure:
    """One panel for each quantity that any run has logged, over tokens if all runs log them
    (pretraining does), else over updates.

    runs: log points by name, as `runs_in` and `read_metrics` return them.

    Raises: ValueError if nothing was logged.
    """
    keys = list(dict.fromkeys(key for log in runs.values() for point in log for key in point))
    panels = [panel for panel in _PANELS if any(key in keys for key in panel[1:])]
    panels += [(key.replace(_DEV, "dev "), None, key, None) for key in keys if _DEV in key]
    sites = sorted({_site(key) for key in keys if key.startswith(_SCALES)})
    over = "tokens" if all("tokens" in point for log in runs.values() for point in log) else "step"
    count = len(panels) + len(sites)
    if not count:
        raise ValueError(f"nothing has been logged yet by {', '.join(runs)}")
    rows = -(-count // _COLUMNS)
    columns = min(count, _COLUMNS)
    drawing = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.4), layout="constrained")
    axes = [drawing.add_subplot(rows, columns, number + 1) for number in range(count)]
    colors = matplotlib.colormaps["tab10"].colors
    for index, (name, log) in enumerate(runs.items()):
        color = colors[index % len(colors)]
        for panel, (title, training, evaluations, baseline) in zip(axes, panels, strict=False):
            panel.set_title(title, fontsize=10)
            _line(panel, log, over, training, color=color, linewidth=0.8, alpha=0.6)
            _line(panel, log, over, evaluations, color=color, marker=".", linewidth=1.4)
            _line(panel, log, over, baseline, color=color, linestyle="--", linewidth=0.8)
        for panel, site in zip(axes[len(panels) :], sites, strict=True):
            panel.set_title(f"{site}, a line a layer", fontsize=10)
            layers = [key for key in keys if key.startswith(_SCALES) and _site(key) == site]
            for number, key in enumerate(layers):  # later layers are more opaque
                alpha = 0.3 + 0.7 * (number + 1) / len(layers)
                _line(panel, log, over, key, color=color, alpha=alpha, linewidth=1.0)
        axes[0].plot([], [], color=color, label=name)
    for panel in axes:
        panel.set_xlabel("update", fontsize=8)
        if over == "tokens":
            panel.set_xlabel("tokens", fontsize=8)
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return drawing


def _site(key: str) -> str:
    """scales/attention/query/input_scale/3 -> attention/query/input_scale."""
    parts = key.removeprefix(_SCALES).split("/")
    return "/".join(parts[:-1] if parts[-1].isdigit() else parts)


def _line(panel: Axes, log: Records, over: str, key: str | None, **style: Any) -> None:
    points = [(point[over], point[key]) for point in log if point.get(key) is not None]
    if points:
        panel.plot(*zip(*points, strict=True), **style)


def require_format(output: str | Path) -> None:
    """Raises ValueError if the suffix of a file name is not an image format: without a suffix,
    matplotlib would write to another file name."""
    endings = Figure().canvas.get_supported_filetypes()
    ending = Path(output).suffix
    if ending.removeprefix(".").lower() not in endings:
        raise ValueError(
            f"{output} has {f'the ending {ending}' if ending else 'no ending'}, but the ending "
            f"selects the format: use {str(output).removesuffix(ending).rstrip('.')}.png, or "
            f"one of {', '.join(f'.{name}' for name in endings)}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.plot", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run")
    parser.add_argument(
        "--output", default="curves.png", metavar="FILE", help=".png, .svg or .pdf (curves.png)"
    )
    arguments = parser.parse_args(argv)
    try:
        require_local(vars(arguments))
        require_format(arguments.output)
        require_writable(arguments.output)
        figure(runs_in(arguments.workdirs)).savefig(arguments.output, dpi=120)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.output}")
