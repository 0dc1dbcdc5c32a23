"""A workdir belongs to one run: one configuration, one set of inputs, one job at a time.

`config.json` and `inputs.json` are written once and compared at every later start. `inputs.json`
identifies the contents of the directories that the configuration names, because contents can change
under the same path. All checkpoints, finished seeds and finished stages depend on these contents.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import empty_node, flatten_dict

from bipft_jax.paths import replacing, require_local

_log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
INPUTS_NAME = "inputs.json"
_LOCK_NAME = "lock"
_ABSENT = "(absent)"
# How a run is computed, not what: a run may resume with other values of these keys.
_MAY_CHANGE = ("mesh.", "data_workers", "log_every", "profile_steps")
# Directories of data; they may move if inputs.json identifies their contents.
_MAY_MOVE = ("corpus_dir", "glue_dir")
# Keys that the first version's configs lacked, by dotted name, with the value that runs had then,
# so that those runs can resume.
ADDED_SINCE: dict[str, Any] = {
    "mlm_distillation": 0.0,
    "objective": "mlm_nsp",
    "second_peak": 0.0,
    "adam_b2": 0.999,
    "decoder.gate": "",
    "decoder.norm": "",
    "decoder.groups": 1,
    "decoder.tied": True,
    "decoder.rope_theta": 0.0,
    "decoder.norm_epsilon": 1e-5,
    "decoder.separate_documents": False,
    # Of finetuning only.
    "accumulation": 1,
    "remat": "none",
}

Inputs = Mapping[str, Mapping[str, Any]]  # config key of a directory -> identity of its contents


def absolute(workdir: str | os.PathLike[str]) -> Path:
    """The workdir as an absolute path. Raises: ValueError for gs:// and the like, and for ~ if no
    home directory is known."""
    require_local({"workdir": workdir})
    expanded = Path(os.path.expanduser(workdir))
    if expanded.parts[:1] == ("~",):  # else a directory named ~ would be created
        raise ValueError(
            f"workdir is {os.fspath(workdir)}, but no home directory is known (HOME is not set): "
            "give the whole path"
        )
    return Path(os.path.abspath(expanded))


def checkpoint_named(
    name: str | os.PathLike[str],
) -> tuple[str | os.PathLike[str], int | None]:
    """Splits WORKDIR@UPDATE, which names one checkpoint of a run, as in `runs/bipft_b@1500`.

    Returns: the workdir as it was written, and the update; None for a WORKDIR alone. What exists
      under the whole name is a workdir, whatever its name holds.

    Raises: as `absolute`.
    """
    workdir, _, update = os.fspath(name).rpartition("@")
    if workdir and re.fullmatch("[0-9]+", update) and not absolute(name).exists():
        return workdir, int(update)
    return name, None


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file atomically (`replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Replaces a JSON file atomically; creates its directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def owned(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Creates the workdir and locks it against other jobs while the context lasts.

    Process 0 of a job locks WORKDIR/lock. The operating system releases the lock of a dead process,
    so a crash leaves nothing to remove. A file system without locks causes a warning. A workdir
    that this function created is removed at the end if it is still empty.

    Raises: ValueError if another process holds the lock.
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
        os.fsync(file.fileno())  # a mounted bucket cannot close a removed file with unwritten text
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
                    "%s cannot be locked (%s): make sure that no other process runs in it",
                    path.parent,
                    error.strerror,
                )
            # The previous holder may have removed the file since `open`: then this lock is void.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


def claim_workdir(
    workdir: str | os.PathLike[str], config: Mapping[str, Any], inputs: Inputs | None = None
) -> None:
    """Ties a workdir to a configuration and its inputs, so that a run never resumes as another run.

    Calls `check_workdir` and `check_inputs`, then creates the workdir, WORKDIR/config.json and
    WORKDIR/inputs.json if they do not exist. Call it once the configuration is known to work, so
    that a mistyped one does not occupy the workdir. All processes of a job call it, and process 0
    writes.

    Arguments and errors are those of the two functions. inputs: None for a program without inputs.
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
    """Compares a configuration with that of a claimed workdir.

    Arguments:
      workdir: may not exist yet.
      config: nested dictionaries of JSON values (`ConfigDict.to_dict()`); tuples count as lists.

    Returns: the configuration as JSON text.

    Raises:
      ValueError: the workdir has another configuration; names every key that differs, with both
        values. Keys of `_MAY_CHANGE` may differ, and keys of `_MAY_MOVE` if inputs.json has them.
        Also if `config` is not JSON, a file cannot be read, or the workdir or a path in `config` is
        gs:// or the like.
    """
    require_local({**config, "workdir": workdir})
    try:
        text = json.dumps(config, indent=2, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"The configuration cannot be written as JSON: {error}.") from error
    path = absolute(workdir) / CONFIG_NAME
    recorded = _read(path)
    if recorded is None:
        return text
    old, new = _flat_texts(recorded), _flat_texts(json.loads(text))
    old = {**{k: json.dumps(v) for k, v in ADDED_SINCE.items() if k in new}, **old}
    moved = tuple(key for key in _MAY_MOVE if key in recorded_inputs(workdir))
    # Compared as JSON text with sorted keys, in which NaN equals NaN.
    changed = [
        f"  {key}: {old.get(key, _ABSENT)} before, {new.get(key, _ABSENT)} now"
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
    """The contents of inputs.json; empty if it does not exist, as in a workdir of an older version.

    Raises: ValueError if it cannot be read.
    """
    return _read(absolute(workdir) / INPUTS_NAME) or {}


def check_inputs(workdir: str | os.PathLike[str], inputs: Inputs) -> None:
    """Compares inputs with those that a workdir was claimed with.

    Raises: ValueError that names the differences; an input that only one side has is none.
    """
    if changed := changed_inputs(recorded_inputs(workdir), inputs):
        raise ValueError(
            f"{absolute(workdir)} holds a run that was begun with other inputs:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nUse another --workdir for a new run, or restore the former inputs to continue "
            "this one."
        )


def changed_inputs(before: Inputs, now: Inputs) -> list[str]:
    """One line per value that differs, for inputs that both have."""
    lines = []
    for key in before.keys() & now.keys():
        for name in sorted(before[key].keys() | now[key].keys()):
            old, new = (str(inputs[key].get(name, _ABSENT)) for inputs in (before, now))
            if old != new:
                lines.append(f"{key}: {name} {old[:16]} before, {new[:16]} now")
    return sorted(lines)


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of a workdir; None if the file does not exist."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except ValueError as error:
        raise ValueError(
            f"{path} is not a run's ({error}). Use another --workdir, or delete this file if you "
            "know that the run in it is the one that you are starting."
        ) from error


def _flat_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """The values of a nested configuration as JSON text, by dotted key."""
    flat = flatten_dict(config, sep=".", keep_empty_nodes=True)
    return {
        key: "{}" if value is empty_node else json.dumps(value, sort_keys=True)
        for key, value in flat.items()
    }
