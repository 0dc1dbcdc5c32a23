"""Starting from another run's checkpoint: which parameters are loaded, which are new, what is
refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from bipft_jax.checkpoints.manager import CheckpointError, restore_params
from bipft_jax.checkpoints.workdir import Inputs, checkpoint_named
from bipft_jax.data.tokenizers import Tokenizer, tokenizer_from_dict
from bipft_jax.models.architectures import architecture, config_of, dimensions, is_decoder
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.parameters import Params, is_scale, merge_parameters, named_leaves
from bipft_jax.models.recipes import BertConfig
from bipft_jax.objectives.objective import Objective
from bipft_jax.objectives.table import objective_of


class Source(NamedTuple):
    """A checkpoint to start from or to learn from.

    missing: paths of parameters of the architecture that the checkpoint never had: heads and pooler
      of an imported encoder. run: the configuration of the run that wrote it. metrics: the
      evaluation at its step. sequence_length: tokens of an example that it was trained on; None if
      the checkpoint does not say.
    """

    workdir: str
    step: int
    params: Params
    architecture: dict
    objective: Objective
    tokenizer: Tokenizer
    missing: tuple[str, ...] = ()
    run: dict[str, Any] = {}
    metrics: dict[str, float | None] = {}
    sequence_length: int | None = None

    def config(self, **overrides) -> BertConfig | DecoderConfig:
        """The checkpoint's configuration; overrides choose what belongs to the run."""
        return config_of(self.architecture, **overrides)

    def described(self) -> str:
        """Its workdir and step, for a line of output."""
        return f"{self.workdir}, step {self.step}" + ("" if self.metrics else " (not evaluated)")

    @property
    def identity(self) -> dict[str, Any]:
        """Its step, and a SHA-256 (hex) of parameters and tokenizer, for inputs.json."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for path, leaf in named_leaves(self.params).items():
            digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf))
        return {"step": self.step, "parameters": digest.hexdigest()}

    def without_classifier(self) -> Source:
        """The source without its classifier, which a run that starts from it creates anew."""
        head = [path for path in named_leaves(self.params) if path.startswith("classifier/")]
        params = {name: value for name, value in self.params.items() if name != "classifier"}
        return self._replace(params=params, missing=(*self.missing, *head))

    def filled_params(self) -> Params:
        """`params` with zeros for missing ones, for outputs that do not depend on these."""
        shapes = named_leaves(self.objective.abstract_params(self.config()))
        zeros = {path: np.zeros(shapes[path].shape, np.float32) for path in self.missing}
        return unflatten_dict({**named_leaves(self.params), **zeros}, sep="/")


def checkpoint_description(
    config: BertConfig | DecoderConfig,
    objective: Objective,
    run: dict,
    missing: Sequence[str] = (),
    sequence_length: int | None = None,
) -> dict:
    """The `config` item of a checkpoint: the run's own configuration, the architecture, the
    objective, and `missing` and `sequence_length` of a `Source`."""
    return {
        "run": run,
        "model": architecture(config),
        "objective": objective.described(),
        "missing": list(missing),
        "sequence_length": sequence_length,
    }


def load_source(name: str | os.PathLike[str], step: int | str | None = None) -> Source:
    """Loads a run's parameters, architecture and tokenizer.

    Arguments:
      name: WORKDIR, or WORKDIR@UPDATE for one of its checkpoints (`checkpoint_named`).
      step: a number, "best" (by the run's own metric; the latest if none was evaluated) or
        "latest". None: that of the name, else the best.

    Raises: CheckpointError (a ValueError) if the checkpoint does not exist, or if name and step
      differ.
    """
    workdir, update = checkpoint_named(name)
    if update is not None and step not in (None, update):
        raise CheckpointError(
            f"{name} is a checkpoint of update {update}, not of step {step}: give {workdir}"
        )
    step = update if step is None else step
    checkpoint = restore_params(workdir, "best" if step is None else step)
    return Source(
        workdir=str(workdir),
        step=checkpoint.step,
        params=checkpoint.params,
        architecture=checkpoint.config["model"],
        objective=objective_of(checkpoint.config),
        tokenizer=tokenizer_from_dict(checkpoint.tokenizer),
        # Older checkpoints have no such keys.
        missing=tuple(checkpoint.config.get("missing", ())),
        run=checkpoint.config["run"],
        metrics=checkpoint.metrics,
        sequence_length=checkpoint.config.get("sequence_length"),
    )


def load_input(name: str, key: str, begun: Inputs) -> Source:
    """The checkpoint that the config key `key` names: WORKDIR@UPDATE, or WORKDIR for its best. A
    resumed run gets the step that it began with, even if another is the best by now.

    Arguments:
      begun: `recorded_inputs` of the run that reads it.

    Raises: CheckpointError (a ValueError) if the checkpoint does not exist or was deleted.
    """
    if key not in begun:
        return load_source(name)
    step = begun[key]["step"]
    try:
        return load_source(name, step)
    except CheckpointError as error:
        raise CheckpointError(
            f"the run was begun with step {step} of {key} {name}: {error}"
        ) from error


def require_initialised_scales(teacher: Source) -> None:
    """Raises ValueError if a learned scale of a teacher is NaN: only the student is calibrated."""
    uninitialised = [
        path
        for path, leaf in named_leaves(teacher.params).items()
        if is_scale(path) and np.isnan(leaf).any()
    ]
    if uninitialised:
        raise ValueError(
            f"the teacher {teacher.workdir} has scales that were never initialised, such as "
            f"{uninitialised[0]}: train it first"
        )


def warm_started(
    fresh: Params, config: BertConfig | DecoderConfig, objective: Objective, source: Source
) -> Params:
    """`fresh`, with the source's value for every parameter that both architectures have.

    The source may lack a parameter only if its recipe or heads have none (learned scales, shifts,
    estimators, the binary pooler's LayerNorm, a new head) or its `missing` lists it (heads of an
    imported encoder). It may have an extra one only if the new model has none. So a checkpoint that
    lost a parameter is refused.

    Raises: ValueError naming the dimensions, switches or parameters that differ.
    """
    theirs, ours = source.architecture, architecture(config)
    if is_decoder(theirs) != is_decoder(ours):
        kinds = ("an encoder", "a decoder")
        raise ValueError(
            f"cannot start from {source.workdir}: it is {kinds[is_decoder(theirs)]}, and recipe "
            f"{ours['recipe']} is {kinds[is_decoder(ours)]}"
        )
    different = [
        f"{name} is {theirs[name]} in the checkpoint and {ours[name]} in the config"
        for name in dimensions(ours)
        if theirs[name] != ours[name] and name != "initializer_range"  # for new parameters only
    ]
    if different:
        raise ValueError(
            f"cannot start from {source.workdir}: {'; '.join(different)}. Choose the size (and, of "
            "decoders, the keys under decoder.) that the checkpoint was trained with, or another "
            "checkpoint"
        )
    _check_switches(source.workdir, theirs, ours)
    source_paths = set(named_leaves(source.objective.abstract_params(source.config())))
    source_paths -= set(source.missing)
    our_paths = set(named_leaves(objective.abstract_params(config)))
    return merge_parameters(
        source.params,
        fresh,
        allowed_missing=lambda path: path not in source_paths,
        allowed_unexpected=lambda path: path in source_paths and path not in our_paths,
        source=f"{source.workdir} (step {source.step})",
    )


def _check_switches(workdir: str, theirs: dict, ours: dict) -> None:
    """Raises ValueError if a start would silently drop trained parameters or binarise
    full-precision kernels: no switch may change if the recipe stays, and a `lora_rank` other than 0
    may never change."""
    for name in {"estimator_rank", "lora_rank", "full_precision_weights"} & ours.keys():
        kept = theirs["recipe"] == ours["recipe"] or (name == "lora_rank" and theirs[name])
        if kept and theirs[name] != ours[name]:
            raise ValueError(
                f"{workdir} was trained with {name} {theirs[name]}, the config has {ours[name]}: "
                f"give --config.{name}={theirs[name]}"
            )
