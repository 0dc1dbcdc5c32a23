"""Reads and writes models as Hugging Face directories: config.json, vocabulary and weights.

`transformers` loads a full-precision encoder as a BERT, and a decoder as a `BitNetForCausalLM`. A
binary encoder gets another model_type, because a BERT with its latent weights would compute another
function.
"""

from __future__ import annotations

import os
from pathlib import Path

import safetensors.numpy

from bipft_jax.checkpoints.source import Source
from bipft_jax.checkpoints.workdir import absolute
from bipft_jax.interop.config_file import CONFIG_NAME, read_object, write_object
from bipft_jax.interop.decoder_directory import DECODERS
from bipft_jax.interop.encoder_directory import ENCODERS
from bipft_jax.interop.family import Family, Storage
from bipft_jax.interop.model_card import model_card
from bipft_jax.interop.tokenizer_files import write_tokenizer
from bipft_jax.interop.weight_files import SAFETENSORS_NAME
from bipft_jax.models.parameters import check_parameters

CARD_NAME = "README.md"
FAMILIES = (ENCODERS, DECODERS)  # a config.json without model_type is of the first


def family_of(source: Source) -> Family:
    """The family of a model."""
    recipe = source.architecture["recipe"]
    return next(family for family in FAMILIES if recipe in family.recipes)


def require_empty(directory: str | os.PathLike[str]) -> None:
    """Raises ValueError if the directory is not empty, or is a file."""
    path = absolute(directory)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} is not empty, and nothing is overwritten: name a new directory")


def read_directory(
    directory: str | os.PathLike[str], recipe: str | None = None
) -> tuple[Source, list[str]]:
    """Reads a model from config.json, its vocabulary (`read_tokenizer`) and its weights
    (`read_weights`).

    Arguments:
      directory: as `transformers`, the references or `write_directory` write it.
      recipe: the name of a recipe, for a directory without one; None means full precision.

    Returns: (the model as step 0 of a workdir, with parameters as float32 NumPy arrays; names of
      arrays that the model does not need). Embedding rows beyond the vocabulary are cut off; the
      source's `run` then has their number as "surplus_rows" and the tokens added for them as
      "added_tokens". `encoder_directory` and `decoder_directory` say more.

    Raises: ValueError naming the file and, if one is wrong, the key or array: a file is missing,
      unreadable or holds more than arrays; an unsupported kind of model or tokenizer; an invalid
      value; a vocabulary longer than the embedding; a recipe that contradicts the directory; arrays
      that do not fit or are not finite.
    """
    path = Path(directory) / CONFIG_NAME
    described = read_object(path)
    model_type = described.get("model_type", FAMILIES[0].model_types[0])
    for family in FAMILIES:
        if model_type in family.model_types:
            return family.read(Path(directory), described, recipe)
    known = [repr(name) for family in FAMILIES for name in family.model_types]
    raise ValueError(
        f"{path}: model_type is {model_type!r}, but this library has only {' or '.join(known)}"
    )


def write_directory(
    source: Source, directory: str | os.PathLike[str], storage: Storage | None = None
) -> None:
    """Writes config.json, tokenizer, model.safetensors and a model card (README.md).

    Arguments:
      source: the model; parameters listed in `missing` are left out.
      directory: created if missing.
      storage: of the weights; None for latent float32 ones.

    Raises: ValueError if the directory is not empty, if the source lacks parameters not in
      `missing`, if its shapes do not match its architecture, or if the family has no such storage
      or cannot say what the model is.
    """
    require_empty(directory)
    check_parameters(
        source.params,
        source.objective.abstract_params(source.config()),
        allowed_missing=source.missing.__contains__,
        source=f"{source.workdir} (step {source.step})",
    )
    family, storage = family_of(source), storage or Storage()
    written = family.written(source, storage)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(source.tokenizer, written.longest, directory)
    # transformers rejects a file without the framework of its layout. Not `save_file`, whose files
    # only their owner may read.
    weights = safetensors.numpy.save(dict(written.state), metadata={"format": "pt"})
    (directory / SAFETENSORS_NAME).write_bytes(weights)
    write_object(directory / CONFIG_NAME, written.described)
    card = model_card(source, family.card(source, family.loader(source), storage))
    (directory / CARD_NAME).write_text(card, encoding="utf-8")


def transformers_class(source: Source) -> str | None:
    """The class of `transformers` with exactly this model's heads; None if it has none."""
    return family_of(source).loader(source)
