"""Starting from another run's checkpoint: what is taken over, what is new, what is refused."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bipft_jax.data.tokenizers import Tokenizer, tokenizer_from_dict
from bipft_jax.models.bert import BertForPreTraining, BertForSequenceClassification
from bipft_jax.models.recipes import DIMENSIONS, BertConfig, architecture, config_of
from bipft_jax.training.checkpoints import restore_params
from bipft_jax.training.parameters import merge_parameters, named_leaves
from bipft_jax.training.state import Params


class Source(NamedTuple):
    """A checkpoint to start from or to learn from."""

    workdir: str
    step: int
    params: Params
    architecture: dict
    classes: int
    tokenizer: Tokenizer

    def config(self, **overrides) -> BertConfig:
        """The checkpoint's `BertConfig`; overrides choose what belongs to the run."""
        return config_of(self.architecture, **overrides)


def checkpoint_description(config: BertConfig, classes: int, run: dict) -> dict:
    """The `config` item of a checkpoint: the run's own configuration, the architecture, and the
    number of classes (0: pretraining heads)."""
    return {"run": run, "model": architecture(config), "classes": classes}


def load_source(workdir: str, step: int | str = "best") -> Source:
    """Reads a run's parameters, architecture and tokenizer.

    step: a number, "best" (by the run's own metric) or "latest".

    Raises: CheckpointError (a ValueError) where there is no such checkpoint.
    """
    found = restore_params(workdir, step)
    return Source(
        workdir=str(workdir),
        step=found.step,
        params=found.params,
        architecture=found.config["model"],
        classes=found.config["classes"],
        tokenizer=tokenizer_from_dict(found.tokenizer),
    )


def build_model(config: BertConfig, classes: int) -> nn.Module:
    """The model with pretraining heads (classes 0) or with a classifier."""
    if classes:
        return BertForSequenceClassification(config, classes)
    return BertForPreTraining(config)


def abstract_params(config: BertConfig, classes: int) -> Params:
    """Shapes and dtypes of a model's parameters."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    inputs = [ids] * (3 if classes else 4)
    model = build_model(config, classes)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def warm_started(fresh: Params, config: BertConfig, classes: int, source: Source) -> Params:
    """`fresh` with every parameter that the source's architecture has too taken from the source.

    A parameter may be missing only if the source's recipe or heads have no such parameter (learned
    scales, shifts, estimators, the binary pooler's LayerNorm, a new head), and may be left over
    only if the new model has none; so a checkpoint that lost a parameter is refused.

    Raises: ValueError naming what differs: dimensions, or parameters.
    """
    theirs, ours = source.architecture, architecture(config)
    different = [
        f"{name} is {theirs[name]} there and {ours[name]} here"
        for name in DIMENSIONS
        if theirs[name] != ours[name]
    ]
    if different:
        raise ValueError(
            f"cannot start from {source.workdir}: {'; '.join(different)}. Choose the size that the "
            "checkpoint was trained with, or another checkpoint"
        )
    source_paths = set(named_leaves(abstract_params(source.config(), source.classes)))
    our_paths = set(named_leaves(abstract_params(config, classes)))
    return merge_parameters(
        source.params,
        fresh,
        allowed_missing=lambda path: path not in source_paths,
        allowed_unexpected=lambda path: path in source_paths and path not in our_paths,
        source=f"{source.workdir} (step {source.step})",
    )
