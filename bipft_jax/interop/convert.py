"""Converts Hugging Face directories to workdirs and back.

    python -m bipft_jax.interop.convert import DIR --workdir WORKDIR [--recipe RECIPE]
    python -m bipft_jax.interop.convert export --workdir WORKDIR --output DIR [--step best|latest|N]

The imported workdir has one checkpoint, of step 0, for --config.init_from, --config.teacher and
fill_mask.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bipft_jax.checkpoints.manager import Checkpointer
from bipft_jax.checkpoints.source import Source, checkpoint_description, load_source
from bipft_jax.checkpoints.workdir import claim_workdir
from bipft_jax.interop.hugging_face import (
    read_directory,
    require_empty,
    transformers_class,
    write_directory,
)
from bipft_jax.interop.model_card import heads
from bipft_jax.models.parameters import is_scale, named_leaves
from bipft_jax.models.recipes import RECIPES
from bipft_jax.paths import require_local
from bipft_jax.training.state import new_state

_EXAMPLES = """examples:
  # BERT as start and teacher of a binary model; the corpus must have its vocab.txt
  python -m bipft_jax.interop.convert import bert-base-uncased --workdir runs/bert
  python launch/train.py --config=configs/pretrain.py:bipft_b,base \\
      --config.corpus_dir=data/corpus --config.init_from=runs/bert --config.teacher=runs/bert \\
      --workdir=runs/bipft_b

  # a checkpoint of the BiPFT reference, which does not say its recipe
  python -m bipft_jax.interop.convert import BiPFT-B --recipe bipft_b --workdir runs/bipft_b

  # give a model away
  python -m bipft_jax.interop.convert export --workdir runs/bipft_b --output bipft-b-mini
"""


def import_directory(
    directory: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    recipe: str | None = None,
) -> tuple[Source, list[str]]:
    """Converts a Hugging Face directory to a workdir whose step 0 `load_source` reads.

    Arguments, result and errors are those of `read_directory`; the workdir must be empty or new.
    """
    require_empty(workdir)
    source, ignored = read_directory(directory, recipe)
    state = new_state(jax.tree.map(jnp.asarray, source.params), optax.identity())
    with Checkpointer(workdir, keep_every=0, best_metric=None, best_mode="max") as checkpointer:
        checkpointer.save(
            source.step,
            state,
            config=checkpoint_description(
                source.config(), source.objective, source.run, source.missing
            ),
            tokenizer=source.tokenizer.to_dict(),
        )
    # Claimed, so that no run can start here: it would resume from a checkpoint not its own.
    claim_workdir(workdir, source.run)
    return source, ignored


def summary(source: Source) -> str:
    """Describes a model in a few lines."""
    flat = named_leaves(source.params)
    described = source.architecture
    lines = [
        f"  recipe      {described['recipe']}, estimator rank {described['estimator_rank']}, "
        f"lora rank {described['lora_rank']}",
        f"  size        {described['layers']} layers x {described['hidden']}, "
        f"{described['heads']} heads, vocabulary of {described['vocab_size']:,}",
        f"  parameters  {sum(leaf.size for leaf in flat.values()):,}",
        f"  heads       {', '.join(heads(source)) or 'none'}",
    ]
    if source.objective.outputs:
        lines[-1] += f" with {source.objective.outputs} outputs"
        if source.run.get("labels"):
            lines[-1] += f": {', '.join(source.run['labels'])}"
    if source.missing:
        lines.append(f"  missing     {', '.join(source.missing)}: new where a run needs them")
    if "surplus_rows" in source.run:
        lines.append(
            f"  cut off     {source.run['surplus_rows']:,} rows of the embedding and of the MLM "
            f"head beyond the vocabulary's {described['vocab_size']:,} pieces"
        )
        if source.run["added_tokens"]:
            lines[-1] += f", with the added tokens {', '.join(source.run['added_tokens'])}"
    uninitialised = sum(np.isnan(leaf).sum() for path, leaf in flat.items() if is_scale(path))
    if uninitialised:
        lines.append(
            f"  scales      {uninitialised} were never initialised: a run's first batch does it"
        )
    return "\n".join(lines)


def _import(arguments: argparse.Namespace) -> None:
    source, ignored = import_directory(arguments.directory, arguments.workdir, arguments.recipe)
    print(f"read {source.run['weights']}")
    print(summary(source))
    if ignored:
        print(f"  not used    {len(ignored)} arrays: {', '.join(ignored)}")
    print(f"wrote {arguments.workdir}, a checkpoint of step {source.step}")


def _export(arguments: argparse.Namespace) -> None:
    source = load_source(arguments.workdir, arguments.step)
    write_directory(source, arguments.output)
    print(f"read {arguments.workdir}, step {source.step}")
    print(summary(source))
    files = sorted(path.name for path in Path(arguments.output).iterdir())
    print(f"wrote {arguments.output}: {', '.join(files)}")
    loader = transformers_class(source)
    print(f"transformers loads it as {loader}" if loader else "transformers cannot load it")


def _step(text: str) -> int | str:
    return text if text in ("best", "latest") else int(text)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.interop.convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.partition("\n")[0],
        epilog=_EXAMPLES,
    )
    commands = parser.add_subparsers(required=True, metavar="import|export")
    to_workdir = commands.add_parser(
        "import",
        help="a Hugging Face directory to a workdir",
        description="Reads config.json, vocab.txt (or a SentencePiece .model, or tokenizer.json of "
        "an uncased WordPiece) and model.safetensors (or pytorch_model.bin, which needs PyTorch; "
        "either may be in several files with their .index.json) and writes a workdir.",
    )
    to_workdir.add_argument("directory", metavar="DIR", help="of the model")
    to_workdir.add_argument("--workdir", required=True, metavar="DIR", help="new or empty")
    to_workdir.add_argument(
        "--recipe",
        choices=RECIPES,
        help="of a binary model that was not written by this library (default: what config.json "
        "says, else fp)",
    )
    to_workdir.set_defaults(command=_import)
    from_workdir = commands.add_parser(
        "export",
        help="a checkpoint to a Hugging Face directory",
        description="Writes model.safetensors, config.json, the tokenizer and a model card. "
        "transformers loads models of the recipe fp; the others come back with import.",
    )
    from_workdir.add_argument(
        "--workdir", required=True, metavar="DIR", help="of a pretraining run or of one seed_N"
    )
    from_workdir.add_argument("--output", required=True, metavar="DIR", help="new or empty")
    from_workdir.add_argument(
        "--step", type=_step, default="best", metavar="best|latest|N", help="default: best"
    )
    from_workdir.set_defaults(command=_export)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exits with a one-line message if a file cannot be read or written."""
    parsed = _parse_arguments(arguments)
    try:
        require_local(vars(parsed))
        parsed.command(parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
