"""Loss against size: scaling laws of pretrained decoders, with the prediction of the largest.

    python -m bipft_jax.scaling RESULT... [--output scaling.png]

RESULT is the result.json of a pretraining run of a decoder (under any file name), or a directory to
search for such files. Runs of one recipe and size are seeds. For each recipe with four sizes or
more, the law a N^b + c (`reports/scaling_law.py`) is fitted to all sizes but the largest, whose
loss it predicts; the range is that of 90 % of bootstrap samples of the seeds. N counts the weights
of the blocks' matrices. Energy is that of 512 tokens by BitNet's model at 7 nm, full precision in
FP16 (`cost/energy.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

from bipft_jax.cost.energy import energy
from bipft_jax.cost.products import products_of
from bipft_jax.models.decoder_recipes import DECODER_RECIPES, DECODER_SIZES, decoder_config
from bipft_jax.models.decoder_recipes import decoder_recipe_named as recipe_named
from bipft_jax.paths import require_local, require_writable
from bipft_jax.reports.plot import require_format
from bipft_jax.reports.results import read_result
from bipft_jax.reports.scaling_law import ScalingLaw, fit
from bipft_jax.reports.settings import COMPUTED
from bipft_jax.reports.tables import aligned

_SAMPLES, _INTERVAL = 1_000, (5, 95)  # bootstrap samples; percent
_TOKENS = 512  # of the energies
_FEWEST_SIZES = 4  # three to fit, one to predict


@dataclasses.dataclass(frozen=True)
class Point:
    """A recipe at a size. parameters: weights of the blocks' matrices. losses: held-out nats a
    token after the last update, of each seed. bits_per_byte: the same per byte, if known."""

    recipe: str
    size: str
    parameters: int
    losses: tuple[float, ...]
    bits_per_byte: tuple[float, ...]

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.losses)

    @property
    def joules(self) -> float:
        """Arithmetic energy of `_TOKENS` tokens."""
        config = decoder_config(recipe_named(self.recipe), self.size, vocab_size=1)
        return energy(products_of(config, _TOKENS), "7nm", "fp16").total


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A law fitted to all sizes of a recipe but the largest, `held_out`. interval: of its predicted
    loss."""

    law: ScalingLaw
    held_out: Point
    interval: tuple[float, float]

    @property
    def loss(self) -> float:
        """The predicted loss of the held-out size."""
        return self.law(self.held_out.parameters)


def read_points(paths: Iterable[str | Path]) -> dict[str, list[Point]]:
    """The points of each recipe, smallest first.

    Raises: ValueError for a path without such results, two results of one recipe, size and seed,
      runs that differ in a key that is not in `_FREE`, or one without a finite loss.
    """
    results: dict[tuple[str, str], dict[int, tuple[Path, dict[str, Any]]]] = defaultdict(dict)
    shared: tuple[Path, dict[str, Any]] | None = None
    for path in map(Path, paths):
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        loaded = [(file, result) for file in files if (result := _of_a_decoder(file)) is not None]
        if not loaded:
            raise ValueError(f"{path} has no result.json of a decoder's pretraining run")
        for file, result in loaded:
            config = result["config"]
            same = {key: value for key, value in config.items() if key not in _FREE}
            shared = shared or (file, same)
            for key, value in same.items():
                if value != shared[1].get(key):
                    raise ValueError(
                        f"{key} is {value!r} in {file} and {shared[1].get(key)!r} in {shared[0]}: "
                        "their losses cannot be compared"
                    )
            seeds = results[result["recipe"], result["size"]]
            if config["seed"] in seeds:
                raise ValueError(
                    f"{file} and {seeds[config['seed']][0]} are both seed {config['seed']} of "
                    f"{result['recipe']}, {result['size']}: give one of them"
                )
            seeds[config["seed"]] = file, result["seeds"][0]["last"]
    points: dict[str, list[Point]] = defaultdict(list)
    for (recipe, size), seeds in results.items():
        scores = [last for _, last in seeds.values()]
        in_bytes = [last["bits_per_byte"] for last in scores if "bits_per_byte" in last]
        losses = tuple(last["loss"] for last in scores)
        points[recipe].append(Point(recipe, size, parameters(size), losses, tuple(in_bytes)))
    order = [recipe for recipe in DECODER_RECIPES if recipe in points]
    return {name: sorted(points[name], key=lambda point: point.parameters) for name in order}


# Keys in which runs may differ: rates and stages are each recipe's and size's own.
_FREE = COMPUTED | {"recipe", "size", "seed", "learning_rate", "second_peak"}


def _of_a_decoder(file: Path) -> dict[str, Any] | None:
    """A result of a decoder's pretraining; None for another JSON file."""
    try:
        result = read_result(file)
        known = result["recipe"] in DECODER_RECIPES and result["size"] in DECODER_SIZES
        loss = result["seeds"][0]["last"]["loss"]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    if known and loss is None:
        raise ValueError(f"{file} has no finite loss: the run diverged, leave it out")
    return result if known else None


def parameters(size: str) -> int:
    """Weights of the blocks' matrices of a size, whatever the recipe and the vocabulary."""
    config = decoder_config(recipe_named("bitnet_fp"), size, vocab_size=1)
    return config.layers * config.weights_per_layer


def predict(points: Sequence[Point], seed: int = 0) -> Prediction | None:
    """The law of all points but the largest, and what it predicts there; None for too few sizes.

    points: of one recipe, smallest first. seed: of the bootstrap, which draws as many seeds of each
      size as it has.
    """
    if len(points) < _FEWEST_SIZES:
        return None
    *fitted, held_out = points
    sizes = [point.parameters for point in fitted]
    rng = np.random.default_rng(seed)
    samples = [
        fit(sizes, [np.mean(rng.choice(point.losses, len(point.losses))) for point in fitted])
        for _ in range(_SAMPLES if any(len(point.losses) > 1 for point in fitted) else 1)
    ]
    low, high = np.percentile([law(held_out.parameters) for law in samples], _INTERVAL)
    law = fit(sizes, [point.loss for point in fitted])
    return Prediction(law, held_out, (float(low), float(high)))


def report(points: Mapping[str, Sequence[Point]]) -> str:
    """A table of all points, and for each recipe the prediction of its largest size."""
    rows = [["recipe", "size", "N", "mJ", "seeds", "nats a token", "deviation", "bits a byte"]]
    for of_recipe in points.values():
        for point in of_recipe:
            spread = statistics.stdev(point.losses) if len(point.losses) > 1 else None
            in_bytes = statistics.fmean(point.bits_per_byte) if point.bits_per_byte else None
            rows.append(
                [
                    *(point.recipe, point.size, f"{point.parameters:,}"),
                    *(f"{1e3 * point.joules:.4f}", str(len(point.losses))),
                    f"{point.loss:.4f}",
                    *("-" if value is None else f"{value:.4f}" for value in (spread, in_bytes)),
                ]
            )
    lines = [aligned(rows, right=range(2, 8))]
    for recipe, of_recipe in points.items():
        if prediction := predict(of_recipe):
            low, high = prediction.interval
            largest = prediction.held_out
            lines.append(
                f"{recipe}: the smaller sizes predict {prediction.loss:.4f} ({low:.4f} to "
                f"{high:.4f}) for {largest.size}; it has {largest.loss:.4f}"
            )
    return "\n".join(lines)


def figure(points: Mapping[str, Sequence[Point]]) -> Figure:
    """Held-out loss against N and against energy: seeds as dots; laws as lines, dashed beyond the
    fitted sizes."""
    drawing = Figure(figsize=(10, 4.2), layout="constrained")
    panel, of_energy = drawing.add_subplot(1, 2, 1), drawing.add_subplot(1, 2, 2)
    for number, (recipe, of_recipe) in enumerate(points.items()):
        color = f"C{number}"
        dots = [(point.parameters, loss) for point in of_recipe for loss in point.losses]
        panel.plot(*zip(*dots, strict=True), "o", color=color, markersize=4, label=recipe)
        millijoules = [(1e3 * point.joules, point.loss) for point in of_recipe]
        of_energy.plot(*zip(*millijoules, strict=True), "o-", color=color, markersize=4)
        if prediction := predict(of_recipe):
            sizes = [point.parameters for point in of_recipe]
            for first, last, style in ((sizes[0], sizes[-2], "-"), (sizes[-2], sizes[-1], "--")):
                line = np.geomspace(first, last, 50)
                losses = [prediction.law(n) for n in line]
                panel.plot(line, losses, style, color=color, linewidth=1.2)
    labels = ("weights of the blocks' matrices", f"mJ for {_TOKENS} tokens, arithmetic only")
    formats = (EngFormatter(sep=""), StrMethodFormatter("{x:g}"))
    for axes, label, numbers in zip((panel, of_energy), labels, formats, strict=True):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # by default, labels overlap
        axes.xaxis.set_major_formatter(numbers)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss, nats a token")
        axes.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return drawing


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.scaling",
        description=first,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="RESULT")
    parser.add_argument("--output", metavar="FILE", help="also draw: .png, .svg or .pdf")
    arguments = parser.parse_args(argv)
    try:
        require_local(vars(arguments))
        if arguments.output is not None:
            require_format(arguments.output)
            require_writable(arguments.output)
        points = read_points(arguments.results)
        print(report(points))
        if arguments.output is not None:
            figure(points).savefig(arguments.output, dpi=120)
            print(f"wrote {arguments.output}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
