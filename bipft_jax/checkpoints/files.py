"""Reads one checkpoint directory, and distinguishes damage from other failures.

    WORKDIR/checkpoints/STEP/params            the model's parameters
                             training_state    the rest of the train state (step, optimiser)
                             config            the run's configuration (JSON)
                             tokenizer         the whole tokenizer (JSON)
                             metrics           evaluation metrics of this step (JSON)
                             selection         the metric that selects, and its mode (JSON)
                             digests.json      digests of all these files (`digests.py`)

Only this file and `manager.py` import orbax. Orbax itself detects files that are missing, truncated
or not of their format, but not flipped bits in arrays; the digests detect those.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from bipft_jax.checkpoints.digests import DIGESTS_NAME, changed_file

_log = logging.getLogger(__name__)

# Orbax's file name for each JSON item.
JSON_FILES = {
    "config": "metadata",
    "tokenizer": "metadata",
    "metrics": "metrics",
    "selection": "metadata",
}
# TensorStore's errors for an array's file that is truncated, malformed or missing. Other failures
# (permissions, memory, an unreachable disk) do not mean that the checkpoint is damaged.
_DAMAGE = re.compile(r"^(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION)\b")
# Broadcast text has the same length on all processes.
_FINDING_BYTES = 512


class CheckpointError(ValueError):
    """A checkpoint does not exist, or cannot be read or written; the message names it."""


class DamagedCheckpointError(CheckpointError):
    """A complete checkpoint has a file that is missing, truncated, unreadable or changed.

    In a job all processes raise it or none does, so all can go on to another checkpoint.
    """


class RestoredParameters(NamedTuple):
    """The part of a checkpoint that finetuning and inference need; arrays are in host memory."""

    params: dict[str, Any]
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    step: int
    metrics: dict[str, float | None]


def steps_in(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending; empty if the directory does not exist."""
    if not directory.exists():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def _require(directory: Path, step: int) -> None:
    steps = steps_in(directory)
    if step not in steps:
        available = f"there are {', '.join(map(str, steps))}" if steps else "there are none at all"
        raise CheckpointError(f"{directory} has no checkpoint of step {step}; {available}.")


def verify(directory: Path, step: int, items: Collection[str]) -> None:
    """Compares the files of some items with their digests; warns if the checkpoint has none.

    All processes of a job call it. Process 0 reads the files and broadcasts the result.

    Raises:
      CheckpointError: the step does not exist; DamagedCheckpointError: a file has changed.
    """
    _require(directory, step)
    damage = ""
    if jax.process_index() == 0:
        damage = changed_file(directory / str(step), items)
        if not (directory / str(step) / DIGESTS_NAME).exists():
            _log.warning(
                "The checkpoint %s has no %s: flipped bits in it cannot be detected.",
                directory / str(step),
                DIGESTS_NAME,
            )
    line = damage.encode()[:_FINDING_BYTES].ljust(_FINDING_BYTES)
    everyones = multihost_utils.broadcast_one_to_all(np.frombuffer(line, np.uint8))
    damage = np.asarray(everyones).tobytes().decode(errors="replace").strip()
    if damage:
        raise DamagedCheckpointError(_damaged(directory, step, damage))


def read_json(directory: Path, step: int, item: str) -> dict[str, Any]:
    """A JSON item of a checkpoint, after comparing its files with their digests.

    Raises:
      CheckpointError: the step does not exist; DamagedCheckpointError: the item is damaged (in a
        job of several processes a plain CheckpointError).
    """
    _require(directory, step)
    damage = changed_file(directory / str(step), [item])
    if damage:
        raise _damage_here()(_damaged(directory, step, damage))
    with _naming_damage(directory, step, item):
        return json.loads((directory / str(step) / item / JSON_FILES[item]).read_text())


def stored_arrays(directory: Path, step: int, item: str) -> Any:
    """The tree of shapes and dtypes of an item's arrays, from its metadata."""
    _require(directory, step)
    with _naming_damage(directory, step, item):
        metadata = ocp.PyTreeCheckpointHandler().metadata(directory / str(step) / item)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree
        )


def read_arrays(directory: Path, step: int, item: str, tree: Any, arguments: Any) -> Any:
    """The arrays of an item in the structure of `tree`. arguments: a RestoreArgs for each leaf."""
    with _naming_damage(directory, step, item), ocp.PyTreeCheckpointer() as reader:
        return reader.restore(
            directory / str(step) / item, args=ocp.args.PyTreeRestore(tree, restore_args=arguments)
        )


def read_parameters(directory: Path, step: int) -> RestoredParameters:
    """The parameters of a checkpoint as NumPy arrays, with its JSON items.

    Raises:
      CheckpointError: the step does not exist; DamagedCheckpointError: a file has changed since it
        was saved, or cannot be read.
    """
    verify(directory, step, ("params", "config", "tokenizer", "metrics"))
    tree = stored_arrays(directory, step, "params")
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return RestoredParameters(
        params=read_arrays(directory, step, "params", tree, as_numpy),
        config=read_json(directory, step, "config"),
        tokenizer=read_json(directory, step, "tokenizer"),
        step=step,
        metrics=read_json(directory, step, "metrics"),
    )


def set_aside(directory: Path, step: int) -> Path:
    """Renames a checkpoint so that nothing reads it and its step can be saved again.

    Returns: the new path.
    """
    target, count = directory / f"damaged-{step}", 1
    while target.exists():
        count += 1
        target = directory / f"damaged-{step}-{count}"
    (directory / str(step)).rename(target)
    return target


@contextlib.contextmanager
def _naming_damage(directory: Path, step: int, item: str) -> Iterator[None]:
    """Turns errors that mean a damaged file into a DamagedCheckpointError; others propagate."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, json.JSONDecodeError | UnicodeDecodeError | FileNotFoundError) or (
                _DAMAGE.match(str(cause))
            ):
                line = _damaged(directory, step, f"{item}: {reason(cause)}")
                raise _damage_here()(line) from error
            cause = cause.__cause__
        raise


def _damaged(directory: Path, step: int, damage: str) -> str:
    return f"The checkpoint {directory / str(step)} is damaged, in its {damage}."


def _damage_here() -> type[CheckpointError]:
    """The class of an error for damage that only this process has detected. In a job it is not
    DamagedCheckpointError: going on to another checkpoint would hang, because the other processes
    wait for this one in a collective."""
    return DamagedCheckpointError if jax.process_count() == 1 else CheckpointError


def reason(error: BaseException) -> str:
    """One short line: the operating system's message if the error has one."""
    code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    if code:
        return os.strerror(int(code.group(1)))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.rstrip(".") if len(line) <= 300 else line[:300] + "..."
