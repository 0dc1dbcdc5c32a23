"""Converts Hugging Face directories to workdirs and back.

    python -m bipft_jax.interop.convert import DIR --workdir WORKDIR [--recipe RECIPE]
    python -m bipft_jax.interop.convert export --workdir WORKDIR --output DIR
        [--step best|latest|N] [--dtype float32|bfloat16] [--packed]

The imported workdir has one checkpoint, of step 0, for --config.init_from, --config.teacher,
fill_mask and generate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from bipft_jax.checkpoints.manager import Checkpointer
from bipft_jax.checkpoints.source import Source, checkpoint_description, load_source
from bipft_jax.checkpoints.workdir import claim_workdir
from bipft_jax.interop.bitnet_weights import WEIGHT_SCALES
from bipft_jax.interop.family import Storage
from bipft_jax.interop.hugging_face import (
    FAMILIES,
    family_of,
    read_directory,
    require_empty,
    transformers_class,
    write_directory,
)
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

  # give a model away; of BitNet b1.58 also with 2-bit weights
  python -m bipft_jax.interop.convert export --workdir runs/bipft_b --output bipft-b-mini
  python -m bipft_jax.interop.convert export --workdir runs/b158 --output b158-2bit --packed
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
                source.config(),
                source.objective,
                source.run,
                source.missing,
                source.sequence_length,
            ),
            tokenizer=source.tokenizer.to_dict(),
        )
    # Claimed, so that no run can start here: it would resume from a checkpoint not its own.
    claim_workdir(workdir, source.run)
    return source, ignored


def summary(source: Source) -> str:
    """Describes a model in a few lines."""
    lines = family_of(source).summary(source)
    if "surplus_rows" in source.run:
        cut = (
            f"cut off     {source.run['surplus_rows']:,} rows of the embedding and of the head "
            f"beyond the vocabulary's {source.architecture['vocab_size']:,} pieces"
        )
        added = source.run["added_tokens"]
        lines.append(cut + (f", with the added tokens {', '.join(added)}" if added else ""))
    return "\n".join(f"  {line}" for line in lines)


def _import(arguments: argparse.Namespace) -> None:
    source, ignored = import_directory(arguments.directory, arguments.workdir, arguments.recipe)
    print(f"read {source.run['weights']}")
    print(summary(source))
    if ignored:
        print(f"  not used    {len(ignored)} arrays: {', '.join(ignored)}")
    print(f"wrote {arguments.workdir}, a checkpoint of step {source.step}")


def _export(arguments: argparse.Namespace) -> None:
    source = load_source(arguments.workdir, arguments.step)
    write_directory(source, arguments.output, Storage(arguments.dtype, arguments.packed))
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
        choices=[name for family in FAMILIES for name in family.recipes],
        help="of a quantised model whose config.json does not say it (default: what config.json "
        "says, else full precision)",
    )
    to_workdir.set_defaults(command=_import)
    from_workdir = commands.add_parser(
        "export",
        help="a checkpoint to a Hugging Face directory",
        description="Writes model.safetensors, config.json, the tokenizer and a model card. "
        "transformers loads models of the recipes fp, bitnet_fp and bitnet_b158; the others come "
        "back with import, except decoders that its BitNet cannot express, which are refused.",
    )
    from_workdir.add_argument(
        "--workdir", required=True, metavar="DIR", help="of a pretraining run or of one seed_N"
    )
    from_workdir.add_argument("--output", required=True, metavar="DIR", help="new or empty")
    from_workdir.add_argument(
        "--step", type=_step, metavar="best|latest|N", help="default: best, or that of DIR@N"
    )
    from_workdir.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of a decoder's weights (default: float32; bfloat16 changes the codes of a few)",
    )
    from_workdir.add_argument(
        "--packed",
        nargs="?",
        choices=WEIGHT_SCALES,
        const=next(iter(WEIGHT_SCALES)),
        default="",
        help="2-bit codes instead of bitnet_b158's latent weights, for inference, as this class of "
        f"transformers reads them (without a value: {next(iter(WEIGHT_SCALES))})",
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
