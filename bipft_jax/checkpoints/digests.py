"""Digests of a checkpoint's files, which detect flipped bits.

STEP/digests.json holds size and SHA-256 of every file of the checkpoint's items, by its path within
STEP. It is written before the checkpoint is renamed to STEP, so every checkpoint has one, except
those of library versions that wrote none.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bipft_jax.checkpoints.workdir import write_json

DIGESTS_NAME = "digests.json"
_CHUNK = 1 << 20  # bytes in memory at a time


def write_digests(directory: Path) -> None:
    """Writes the digests of a checkpoint whose items are complete.

    Arguments:
      directory: of the step; may still have its temporary name.
    """
    write_json(
        directory / DIGESTS_NAME,
        {
            path.relative_to(directory).as_posix(): _digest(path)
            # Not the files beside the items: orbax still adds to its metadata of the step.
            for path in directory.glob("*/**/*")
            if path.is_file()
        },
    )


def changed_file(directory: Path, items: Collection[str]) -> str:
    """Compares files with their digests.

    A digests.json that is not JSON counts as a changed file: a bad disk or bad memory is the cause,
    and may have changed other files too. A user who deletes it can still use the checkpoint.

    Arguments:
      directory: of the step.
      items: only their files are read.

    Returns:
      The first file that differs from the saved one, and how it differs; empty if none does, or if
      the checkpoint has no digests.
    """
    path = directory / DIGESTS_NAME
    try:
        digests = json.loads(path.read_text())
    except FileNotFoundError:
        return ""
    except ValueError as error:
        return f"{DIGESTS_NAME}: {error} (if you delete this file, no bits are compared)"
    for name, saved in digests.items():
        if name.split("/")[0] not in items:
            continue
        try:
            actual = _digest(directory / name)
        except FileNotFoundError:
            return f"{name}: the file is missing"
        if actual["size"] != saved.get("size"):
            return f"{name}: size {actual['size']}, but {saved.get('size')} when it was saved"
        if actual != saved:
            return f"{name}: flipped bits (its SHA-256 is not that of the file that was saved)"
    return ""


def _digest(path: Path) -> dict[str, Any]:
    # With a processor's SHA-256 instructions it is twice as fast as BLAKE2b, the standard library's
    # fastest digest without instructions of its own.
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": sha256.hexdigest()}
