"""Starting from another run's checkpoint: what is taken over, what is new, what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from bipft_jax.checkpoints.manager import CheckpointError, restore_params
from bipft_jax.checkpoints.workdir import Inputs
from bipft_jax.data.tokenizers import Tokenizer, tokenizer_from_dict
from bipft_jax.models.parameters import Params, is_scale, merge_parameters, named_leaves
from bipft_jax.models.recipes import DIMENSIONS, BertConfig, architecture, config_of
from bipft_jax.objectives.objective import Objective
from bipft_jax.objectives.table import objective_of


class Source(NamedTuple):
    """A checkpoint to start from or to learn from.

    missing: paths of parameters that the architecture has and the checkpoint never had: heads and
      pooler of an imported encoder. run: the configuration of the run that wrote it. metrics: those
      of its step.
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

    def config(self, **overrides) -> BertConfig:
        """The checkpoint's `BertConfig`; overrides choose what belongs to the run."""
        return config_of(self.architecture, **overrides)

    def described(self) -> str:
        """Where it is, for a line of output."""
        return f"{self.workdir}, step {self.step}" + ("" if self.metrics else " (not evaluated)")

    @property
    def identity(self) -> dict[str, Any]:
        """By which a run knows it again: its step, a SHA-256 (hex) of parameters and tokenizer."""
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for path, leaf in named_leaves(self.params).items():
            digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf))
        return {"step": self.step, "parameters": digest.hexdigest()}

    def without_classifier(self) -> Source:
        """Itself, as if it had been trained without one: whoever starts from it gets a new one."""
        head = [path for path in named_leaves(self.params) if path.startswith("classifier/")]
        params = {name: value for name, value in self.params.items() if name != "classifier"}
        return self._replace(params=params, missing=(*self.missing, *head))

    def filled_params(self) -> Params:
        """`params` with zeros for what is missing, for outputs that do not depend on it."""
        shapes = named_leaves(self.objective.abstract_params(self.config()))
        zeros = {path: np.zeros(shapes[path].shape, np.float32) for path in self.missing}
        return unflatten_dict({**named_leaves(self.params), **zeros}, sep="/")


def checkpoint_description(
    config: BertConfig, objective: Objective, run: dict, missing: Sequence[str] = ()
) -> dict:
    """The `config` item of a checkpoint: the run's own configuration, the architecture, the
    objective, and the `missing` of a `Source`."""
    return {
        "run": run,
        "model": architecture(config),
        "objective": objective.described(),
        "missing": list(missing),
    }


def load_source(workdir: str, step: int | str = "best") -> Source:
    """Reads a run's parameters, architecture and tokenizer.

    step: a number, "best" (by the run's own metric; the latest if none was evaluated) or "latest".

    Raises: CheckpointError (a ValueError) where there is no such checkpoint.
    """
    found = restore_params(workdir, step)
    return Source(
        workdir=str(workdir),
        step=found.step,
        params=found.params,
        architecture=found.config["model"],
        objective=objective_of(found.config),
        tokenizer=tokenizer_from_dict(found.tokenizer),
        # Checkpoints of runs from before there were imports do not say that nothing is missing.
        missing=tuple(found.config.get("missing", ())),
        run=found.config["run"],
        metrics=found.metrics,
    )


def load_input(directory: str, key: str, begun: Inputs) -> Source:
    """The best checkpoint of a run that a config names as `key`; the very one that the run began
    with, if it has begun, whatever is the best by now.

    Arguments:
      begun: `recorded_inputs` of the run.

    Raises: CheckpointError (a ValueError) where there is no such checkpoint, or not any more.
    """
    if key not in begun:
        return load_source(directory)
    step = begun[key]["step"]
    try:
        return load_source(directory, step)
    except CheckpointError as error:
        raise CheckpointError(
            f"the run was begun with step {step} of {key} {directory}: {error}"
        ) from error


def require_initialised_scales(teacher: Source) -> None:
    """Raises ValueError if a learned scale of a teacher has no value: a student is calibrated, its
    teacher is used as it is."""
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


def warm_started(fresh: Params, config: BertConfig, objective: Objective, source: Source) -> Params:
    """`fresh` with every parameter that the source's architecture has too taken from the source.

    A parameter may be missing only if the source's recipe or heads have no such parameter (learned
    scales, shifts, estimators, the binary pooler's LayerNorm, a new head) or the source is
    described as missing it (heads of an imported encoder), and may be left over only if the new
    model has none; so a checkpoint that lost a parameter is refused.

    Raises: ValueError naming what differs: dimensions, switches, or parameters.
    """
    theirs, ours = source.architecture, architecture(config)
    different = [
        f"{name} is {theirs[name]} there and {ours[name]} here"
        for name in DIMENSIONS
        if theirs[name] != ours[name] and name != "initializer_range"  # of what is new
    ]
    if different:
        raise ValueError(
            f"cannot start from {source.workdir}: {'; '.join(different)}. Choose the size that the "
            "checkpoint was trained with, or another checkpoint"
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
    """Raises ValueError if a start would drop trained parameters or binarise kernels that were not,
    and say nothing: where the recipe is the same, no switch may change; low-rank products are taken
    over whatever the recipe."""
    for name in ("estimator_rank", "lora_rank", "full_precision_weights"):
        kept = theirs["recipe"] == ours["recipe"] or (name == "lora_rank" and theirs[name])
        if kept and theirs[name] != ours[name]:
            raise ValueError(
                f"{workdir} was trained with {name} {theirs[name]}, the config has {ours[name]}: "
                f"give --config.{name}={theirs[name]}"
            )
