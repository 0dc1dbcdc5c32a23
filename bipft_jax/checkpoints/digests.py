"""Digests of a checkpoint's files: what tells flipped bits from the bits that were saved.

STEP/digests.json has size and SHA-256 of every file of the checkpoint's items, by its path within
STEP. It is written before the checkpoint gets its name, so every checkpoint has one but those of
versions of this library that wrote none.
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
      directory: of the step, which may still have its temporary name.
    """
    write_json(
        directory / DIGESTS_NAME,
        {
            path.relative_to(directory).as_posix(): _digest(path)
            # Not those beside the items, orbax's notes on the step: it still adds to them.
            for path in directory.glob("*/**/*")
            if path.is_file()
        },
    )


def changed_file(directory: Path, items: Collection[str]) -> str:
    """Compares files with their digests.

    A digests.json that is no longer JSON counts as a changed file too, because nothing but a bad
    disk or memory makes it so: it might have hit other files. It can be deleted to use the
    checkpoint all the same.

    Arguments:
      directory: of the step.
      items: only their files are read.

    Returns:
      Name of the first file that is not as it was saved, and in what; empty if all are, or if the
      checkpoint has no digests.
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
            found = _digest(directory / name)
        except FileNotFoundError:
            return f"{name}: the file is missing"
        if found["size"] != saved.get("size"):
            return f"{name}: its size is {found['size']}, but {saved.get('size')} when it was saved"
        if found != saved:
            return f"{name}: flipped bits (its SHA-256 is not that of the file that was saved)"
    return ""


def _digest(path: Path) -> dict[str, Any]:
    # Processors of this decade have instructions for SHA-256, which make it twice as fast as
    # BLAKE2b, the standard library's fastest digest without such.
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": sha256.hexdigest()}
