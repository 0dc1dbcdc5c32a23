"""Reading one checkpoint directory, and telling damage from other failures.

    WORKDIR/checkpoints/STEP/params            the model's parameters
                             training_state    the rest of the train state (step, optimizer)
                             config            the run's configuration (JSON)
                             tokenizer         the whole tokenizer (JSON)
                             metrics           evaluation metrics of this step (JSON)
                             selection         which metric is best, and how (JSON)
                             digests.json      of every file of these (`digests.py`)

Used by `manager.py`; the two are the only files that know orbax. Orbax itself notices files that
are missing, cut short or not of their format, but not flipped bits in arrays: digests show those.
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

# The file of each JSON item, as orbax names it.
JSON_FILES = {
    "config": "metadata",
    "tokenizer": "metadata",
    "metrics": "metrics",
    "selection": "metadata",
}
# What TensorStore says when a file of an array is cut short, unreadable as such or gone. Other
# failures (permissions, memory, an unreachable disk) say nothing about the checkpoint.
_DAMAGE = re.compile(r"^(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION)\b")
# What processes tell each other has one length on all of them.
_FINDING_BYTES = 512


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read or written; the message says which and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A committed checkpoint has a file that is missing, cut short, unreadable or changed.

    In a job either every process raises it or none, so that all can go on to another checkpoint.
    """


class RestoredParameters(NamedTuple):
    """What finetuning and inference need of a checkpoint; arrays are in host memory."""

    params: dict[str, Any]
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    step: int
    metrics: dict[str, float | None]


def steps_in(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending; none if there is no such directory."""
    if not directory.exists():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def _require(directory: Path, step: int) -> None:
    steps = steps_in(directory)
    if step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there are none at all"
        raise CheckpointError(f"{directory} has no checkpoint of step {step}; {there}.")


def verify(directory: Path, step: int, items: Collection[str]) -> None:
    """Compares the files of some items with their digests; a warning if there are none.

    All processes of a job call it. The first one reads and its finding is everyone's.

    Raises:
      CheckpointError: there is no such step; DamagedCheckpointError: a file has changed.
    """
    _require(directory, step)
    found = ""
    if jax.process_index() == 0:
        found = changed_file(directory / str(step), items)
        if not (directory / str(step) / DIGESTS_NAME).exists():
            _log.warning(
                "The checkpoint %s has no %s: whether bits have flipped in it cannot be told.",
                directory / str(step),
                DIGESTS_NAME,
            )
    line = found.encode()[:_FINDING_BYTES].ljust(_FINDING_BYTES)
    everyones = multihost_utils.broadcast_one_to_all(np.frombuffer(line, np.uint8))
    found = np.asarray(everyones).tobytes().decode(errors="replace").strip()
    if found:
        raise DamagedCheckpointError(_damaged(directory, step, found))


def read_json(directory: Path, step: int, item: str) -> dict[str, Any]:
    """A JSON item of a checkpoint, compared with its digest.

    Raises CheckpointError, or its DamagedCheckpointError.
    """
    _require(directory, step)
    found = changed_file(directory / str(step), [item])
    if found:
        raise _damage_here()(_damaged(directory, step, found))
    with _naming_damage(directory, step, item):
        return json.loads((directory / str(step) / item / JSON_FILES[item]).read_text())


def stored_arrays(directory: Path, step: int, item: str) -> Any:
    """The tree of shapes and dtypes of an item's arrays, read from its description."""
    _require(directory, step)
    with _naming_damage(directory, step, item):
        metadata = ocp.PyTreeCheckpointHandler().metadata(directory / str(step) / item)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree
        )


def read_arrays(directory: Path, step: int, item: str, tree: Any, how: Any) -> Any:
    """The arrays of an item in the structure of `tree`; `how` has a RestoreArgs for each leaf."""
    with _naming_damage(directory, step, item), ocp.PyTreeCheckpointer() as reader:
        return reader.restore(
            directory / str(step) / item, args=ocp.args.PyTreeRestore(tree, restore_args=how)
        )


def read_parameters(directory: Path, step: int) -> RestoredParameters:
    """The parameters of a checkpoint as NumPy arrays, with its JSON items.

    Raises:
      CheckpointError: there is no such step; DamagedCheckpointError: it has changed since it was
        saved, or cannot be read.
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
    """Renames a checkpoint so that nothing reads it and its step can be saved; the new path."""
    target, count = directory / f"damaged-{step}", 1
    while target.exists():
        count += 1
        target = directory / f"damaged-{step}-{count}"
    (directory / str(step)).rename(target)
    return target


@contextlib.contextmanager
def _naming_damage(directory: Path, step: int, item: str) -> Iterator[None]:
    """Turns errors that mean a damaged file into a DamagedCheckpointError; others pass."""
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


def _damaged(directory: Path, step: int, found: str) -> str:
    return f"The checkpoint {directory / str(step)} is damaged, in its {found}."


def _damage_here() -> type[CheckpointError]:
    """The class for damage that this process came upon. The others of its job may not have, and
    wait for it where it will never come: going on to another checkpoint would hang."""
    return DamagedCheckpointError if jax.process_count() == 1 else CheckpointError


def reason(error: BaseException) -> str:
    """One short line; what the operating system said where it said something."""
    code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    if code:
        return os.strerror(int(code.group(1)))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.rstrip(".") if len(line) <= 300 else line[:300] + "..."
