"""A workdir belongs to one run: to one configuration, one set of inputs, and one job at a time.

`config.json` is written once and compared afterwards; so is `inputs.json`, which says what the
directories that the configuration names had in them, for these may change while their names do not.
Checkpoints, finished seeds and finished stages in the workdir all stand on it.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from bipft_jax.paths import replacing, require_local

_log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
INPUTS_NAME = "inputs.json"
_LOCK_NAME = "lock"
_ABSENT = "(absent)"
# How a run is computed, not what: a run may go on with other values of these keys.
_MAY_CHANGE = ("mesh.", "data_workers", "log_every", "profile_steps")
# Where data lies; it may move if inputs.json says what it was.
_MAY_MOVE = ("corpus_dir", "glue_dir")
# Keys that configs did not have in the first version, by their dotted name, with the value that
# every run had before: a run that was begun then goes on.
_ADDED_SINCE: dict[str, Any] = {
    "mlm_distillation": 0.0,
    "objective": "mlm_nsp",
    # Of finetuning only.
    "accumulation": 1,
    "remat": "none",
}

Inputs = Mapping[str, Mapping[str, Any]]  # what is in a directory, by the config's key for it


def absolute(workdir: str | os.PathLike[str]) -> Path:
    """The workdir as an absolute path. Raises: ValueError for gs:// and the like, and for ~ where a
    user has no home directory."""
    require_local({"workdir": workdir})
    expanded = Path(os.path.expanduser(workdir))
    if expanded.parts[:1] == ("~",):  # else a directory of that name would be made
        raise ValueError(
            f"workdir is {os.fspath(workdir)}, but no home directory is known (HOME is not set): "
            "give the whole path"
        )
    return Path(os.path.abspath(expanded))


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step (`replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Replaces a JSON file in one step, making its directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def owned(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Makes the workdir, and keeps it from other jobs while the context lasts.

    The first process of a job locks WORKDIR/lock. The system gives the lock of a dead process back,
    so nothing has to be removed after a crash. Where the file system has no locks, a warning is
    logged. A workdir that was made here and is still empty at the end is removed.

    Raises: ValueError if another process has the lock.
    """
    if jax.process_index() != 0:
        yield
        return
    directory = absolute(workdir)
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _LOCK_NAME
    with _locked(path) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        os.fsync(file.fileno())  # a mounted bucket cannot close a removed file with text to write
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if new:
                with contextlib.suppress(OSError):  # not empty
                    directory.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """The open file, locked. Raises: ValueError as `owned`."""
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    file.seek(0)
                    raise ValueError(
                        f"{path.parent} is being run by {file.read().strip() or 'another process'}"
                        ": wait for its end, stop it, or give another --workdir"
                    ) from error
                _log.warning(
                    "%s cannot be locked (%s): see to it that no other process runs in it",
                    path.parent,
                    error.strerror,
                )
            # One that had it may have removed the file in between: then this is no lock any more.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


def claim_workdir(
    workdir: str | os.PathLike[str], config: Mapping[str, Any], inputs: Inputs | None = None
) -> None:
    """Ties a workdir to a configuration and its inputs, so that a run is never resumed as a
    different run.

    Writes WORKDIR/config.json and WORKDIR/inputs.json where they are not there, after
    `check_workdir` and `check_inputs`. To be called when the configuration has been shown to work,
    so that a mistyped one does not occupy the workdir. In a job of several processes all call it
    and the first one writes.

    Arguments and errors are those of the two; the workdir is created. inputs: None for what has
    none.
    """
    texts = {CONFIG_NAME: check_workdir(workdir, config)}
    if inputs is not None:
        check_inputs(workdir, inputs)
        texts = {INPUTS_NAME: json.dumps(inputs, indent=2, sort_keys=True), **texts}
    if jax.process_index() != 0:
        return
    directory = absolute(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if not (directory / name).exists():
            write_atomically(directory / name, text + "\n")


def check_workdir(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> str:
    """Compares a configuration with the one that a workdir was claimed for, if it was.

    Arguments:
      workdir: may not exist yet.
      config: nested dictionaries of JSON values (`ConfigDict.to_dict()`); tuples count as lists.

    Returns: the configuration as JSON text.

    Raises:
      ValueError: the workdir has another configuration: names each key that differs, with both
        values; those of `_MAY_CHANGE` may, and those of `_MAY_MOVE` where `check_inputs` compares.
        Also if `config` is not JSON, a file cannot be read, or the workdir or a path in `config` is
        gs:// or the like.
    """
    require_local({**config, "workdir": workdir})
    try:
        text = json.dumps(config, indent=2, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"The configuration cannot be written as JSON: {error}.") from error
    path = absolute(workdir) / CONFIG_NAME
    there = _read(path)
    if there is None:
        return text
    old, new = _flatten(there), _flatten(json.loads(text))
    old = {**{k: json.dumps(v) for k, v in _ADDED_SINCE.items() if k in new}, **old}
    moved = tuple(key for key in _MAY_MOVE if key in recorded_inputs(workdir))
    # Compared as text: the key order was sorted, and NaN equals itself.
    changed = [
        f"  {key}: {old.get(key, _ABSENT)} there, {new.get(key, _ABSENT)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
        and not key.startswith((*_MAY_CHANGE, *moved))
    ]
    if changed:
        raise ValueError(
            f"{path.parent} holds a run with another configuration:\n" + "\n".join(changed) + "\n"
            f"Use another --workdir for a new run, or the same configuration ({path}) to continue "
            "this one."
        )
    return text


def recorded_inputs(workdir: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """What inputs.json says; empty where there is none, as in a workdir of an older version.

    Raises: ValueError if it cannot be read.
    """
    return _read(absolute(workdir) / INPUTS_NAME) or {}


def check_inputs(workdir: str | os.PathLike[str], inputs: Inputs) -> None:
    """Compares inputs with those that a workdir was claimed with.

    Raises: ValueError that names what differs; an input that only one of the two has may.
    """
    if changed := changed_inputs(recorded_inputs(workdir), inputs):
        raise ValueError(
            f"{absolute(workdir)} holds a run that was begun with other inputs:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nUse another --workdir for a new run, or put back what was there to continue this "
            "one."
        )


def changed_inputs(before: Inputs, now: Inputs) -> list[str]:
    """A line for each value that differs in the inputs that both have."""
    lines = []
    for key in before.keys() & now.keys():
        for name in sorted(before[key].keys() | now[key].keys()):
            old, new = (str(inputs[key].get(name, _ABSENT)) for inputs in (before, now))
            if old != new:
                lines.append(f"{key}: {name} {old[:16]} before, {new[:16]} now")
    return sorted(lines)


def _read(path: Path) -> Any:
    """A JSON file of a workdir; None if it is not there."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}). Use another --workdir, or delete this file if you know "
            "that the run in it is the one that you are starting."
        ) from error


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Values of nested dictionaries as JSON text by their dotted key."""
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: json.dumps(value, sort_keys=True)}
    flat: dict[str, str] = {}
    for key, entry in value.items():
        flat |= _flatten(entry, f"{prefix}.{key}" if prefix else key)
    return flat
