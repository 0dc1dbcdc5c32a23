"""What the directories of encoders and those of decoders have each of their own.

`hugging_face.py` has the table of families, and reads and writes what they share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bipft_jax.checkpoints.source import Source


@dataclasses.dataclass(frozen=True)
class Storage:
    """How weights are written.

    dtype: "float32" or "bfloat16", of every array that is not packed.
    packed: the class of `transformers` whose 2-bit codes the quantised weights become
      (`bitnet_weights.WEIGHT_SCALES`); "" keeps them latent.
    """

    dtype: str = "float32"
    packed: str = ""


class Written(NamedTuple):
    """The content of a directory: of config.json, of the weights by name, and the tokens of the
    longest text (None: unknown)."""

    described: Mapping[str, Any]
    state: Mapping[str, np.ndarray]
    longest: int | None


class Card(NamedTuple):
    """What a family says in a model card (`model_card.py`): the Hub's pipeline and tags, facts,
    what an imported workdir is for, how `transformers` loads the model, and what a licence depends
    on, as lines of Markdown."""

    pipeline: str
    tags: list[str]
    facts: list[str]
    uses: str
    loading: list[str]
    licence: list[str]


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table.

    model_types: the values of config.json's model_type.
    recipes: names of recipes.
    read: (directory, content of config.json, a recipe's name or None) -> the model as step 0 of a
      workdir, and names of arrays that it does not need.
    written: (source, storage) -> the directory's content; raises ValueError for what it cannot say.
    loader: the class of `transformers` that computes the same function; None without one.
    card: (source, loader, storage) -> its part of the model card.
    summary: source -> lines of what the command prints.
    """

    model_types: tuple[str, ...]
    recipes: Collection[str]
    read: Callable[[Path, Mapping[str, Any], str | None], tuple[Source, list[str]]]
    written: Callable[[Source, Storage], Written]
    loader: Callable[[Source], str | None]
    card: Callable[[Source, str | None, Storage], Card]
    summary: Callable[[Source], list[str]]
