"""A workdir belongs to one configuration: `config.json` is written once and compared afterwards."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from bipft_jax.paths import require_local

CONFIG_NAME = "config.json"
_ABSENT = "(absent)"
# How a run is computed, not what: a run may go on with other values of these keys.
_MAY_CHANGE = ("mesh.", "data_workers", "log_every", "profile_steps")


def absolute(workdir: str | os.PathLike[str]) -> Path:
    """The workdir as an absolute path. Raises: ValueError for gs:// and the like."""
    require_local({"workdir": workdir})
    return Path(os.path.abspath(os.path.expanduser(workdir)))


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step: a killed process leaves the old text or the new, never half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Replaces a JSON file in one step, making its directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def claim_workdir(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Ties a workdir to a configuration, so that a run is never resumed as a different run.

    Writes WORKDIR/config.json, after `check_workdir`. To be called when the configuration has been
    shown to work, so that a mistyped one does not occupy the workdir. In a job of several
    processes all call it and the first one writes.

    Arguments and errors are those of `check_workdir`; the workdir is created.
    """
    text = check_workdir(workdir, config)
    path = absolute(workdir) / CONFIG_NAME
    if not path.exists() and jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text + "\n")


def check_workdir(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> str:
    """Compares a configuration with the one that a workdir was claimed for, if it was.

    Arguments:
      workdir: may not exist yet.
      config: nested dictionaries of JSON values (`ConfigDict.to_dict()`); tuples count as lists.

    Returns: the configuration as JSON text.

    Raises:
      ValueError: the workdir has another configuration: names each key that differs, with both
        values; those of `_MAY_CHANGE` may. Also if `config` is not JSON, config.json cannot be
        read, or the workdir or a path in `config` is gs:// or the like.
    """
    require_local({**config, "workdir": workdir})
    path = absolute(workdir) / CONFIG_NAME
    try:
        text = json.dumps(config, indent=2, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"The configuration cannot be written as JSON: {error}.") from error
    if not path.exists():
        return text
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}). Use another --workdir, or delete this file if you know "
            "that the run in it has the configuration you are starting."
        ) from error
    old, new = _flatten(there), _flatten(json.loads(text))
    # Compared as text: the key order was sorted, and NaN equals itself.
    changed = [
        f"  {key}: {old.get(key, _ABSENT)} there, {new.get(key, _ABSENT)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _ABSENT) != new.get(key, _ABSENT) and not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise ValueError(
            f"{path.parent} holds a run with another configuration:\n" + "\n".join(changed) + "\n"
            f"Use another --workdir for a new run, or the same configuration ({path}) to continue "
            "this one."
        )
    return text


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Values of nested dictionaries as JSON text by their dotted key."""
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix: json.dumps(value, sort_keys=True)}
    flat: dict[str, str] = {}
    for key, entry in value.items():
        flat |= _flatten(entry, f"{prefix}.{key}" if prefix else key)
    return flat
