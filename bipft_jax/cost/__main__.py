"""Bytes, operations and arithmetic energy of a model, on paper: nothing is run.

    python -m bipft_jax.cost --recipe bipft_b --size base
    python -m bipft_jax.cost --workdir runs/sst2/seed_0 --energy
    python -m bipft_jax.cost --energy                       # the table of BitNet's paper

Every row says how it counts. The full-precision twin has the same size and vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bipft_jax.checkpoints.source import load_source
from bipft_jax.cost.figures import Figures, figures_of, shapes_of, twin_of
from bipft_jax.cost.report import energy_report, published_energy_report, report
from bipft_jax.models.decoder_recipes import (
    DECODER_RECIPES,
    DECODER_SIZES,
    decoder_config,
    decoder_recipe_named,
)
from bipft_jax.models.recipes import (
    BERT_VOCABULARY,
    RECIPES,
    SIZES,
    bert_config,
    recipe_named,
)
from bipft_jax.paths import require_local


def _parser() -> argparse.ArgumentParser:
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.cost",
        description=first,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--recipe", help=f"of: {', '.join((*RECIPES, *DECODER_RECIPES))}")
    model.add_argument("--workdir", metavar="DIR", help="of a run, for its model")
    sizes = f"of: {', '.join(SIZES)} (base); of decoders {', '.join(DECODER_SIZES)} (125m)"
    parser.add_argument("--size", help=sizes)
    parser.add_argument("--estimator_rank", type=int, default=-1, help="as in a config")
    parser.add_argument("--vocab_size", type=int, default=BERT_VOCABULARY, help="%(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens (%(default)s)")
    parser.add_argument("--energy", action="store_true", help="also joules; alone: BitNet's sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exits with a message for wrong arguments."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    for name in ("vocab_size", "length"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    try:
        require_local(vars(arguments))
        if arguments.recipe is None and arguments.workdir is None:
            if not arguments.energy or arguments.json or arguments.size:
                parser.error("give --recipe, --workdir, or --energy alone")
            print(published_energy_report())
            return
        figures = _figures(arguments)
        if arguments.json is not None:
            values = {name: figure.as_json() for name, figure in figures.items()}
            arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report(figures["model"], figures["full precision"]))
    if arguments.energy:
        print("\n" + energy_report(figures["model"], figures["full precision"]))


def _figures(arguments: argparse.Namespace) -> dict[str, Figures]:
    """The figures of the model and of its twin."""
    if arguments.workdir is not None:
        source = load_source(arguments.workdir)
        config, params = source.config(), source.params
    elif arguments.recipe in DECODER_RECIPES:
        recipe = decoder_recipe_named(arguments.recipe)
        config = decoder_config(recipe, arguments.size or "125m", arguments.vocab_size)
        params = shapes_of(config)
    else:
        recipe = recipe_named(arguments.recipe, arguments.estimator_rank)
        config = bert_config(recipe, arguments.size or "base", arguments.vocab_size)
        params = shapes_of(config)
    twin = twin_of(config)
    return {
        "model": figures_of(config, params, arguments.length),
        "full precision": figures_of(twin, shapes_of(twin), arguments.length),
    }


if __name__ == "__main__":
    main()
