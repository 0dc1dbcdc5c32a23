"""The rules for paths that users give: they are of the file system, never gs:// or the like, and
what exists by that name is meant, whatever characters the name has."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_SCHEME = re.compile(r"[a-z][a-z0-9+.:-]*", re.IGNORECASE)  # gs, s3, also tfds:gs


def require_local(given: Mapping[str, Any]) -> None:
    """Refuses gs://, s3://, https:// and every other SCHEME:// where a path is wanted. To be called
    where paths enter, before anything is loaded or written.

    Arguments:
      given: paths, lists or tuples of paths, by the names that the user knows them by. Other values
        are left alone, so a config or the arguments of a command can be given as they are.

    Raises: ValueError that names the first one that is not of the file system.
    """
    for name, value in given.items():
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(path, (str, os.PathLike)):
                continue
            text = os.fspath(path)
            # pathlib makes gs:/ of gs://.
            scheme, mark, _ = text.partition("://" if isinstance(path, str) else ":/")
            if mark and _SCHEME.fullmatch(scheme):
                raise ValueError(
                    f"{name} is {text}, but only the file system is read and written: mount the "
                    'bucket (with gcsfuse, see README, "A TPU slice") and give the mounted path, '
                    "such as /mnt/BUCKET/..."
                )


def files_named(spec: str) -> list[str]:
    """The file of that name; only if nothing exists by it, the files that it matches as a pattern.

    Arguments:
      spec: a path. Directories in it that exist are those, too; the pattern is what comes after.

    Returns: at least one path, sorted.

    Raises: ValueError if there is no such file, for a directory, or for a pipe or a device, which
      can be read only once: the files are to be read more than once.
    """
    known, rest = Path(), list(Path(spec).parts)
    while rest and (known / rest[0]).exists():
        known /= rest.pop(0)
    if not rest:
        if known.is_dir():
            raise ValueError(f"{spec} is a directory. Name its files, as in '{known}/*.jsonl'.")
        if not known.is_file():
            raise ValueError(
                f"{spec} is a pipe or a device, which can be read only once, and text is read "
                "several times. Write it into a file."
            )
        return [spec]
    pattern = str(Path(glob.escape(str(known)), *rest))
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not paths:
        raise ValueError(f"No file matches {spec!r}. Check the path, and quote globs.")
    return paths


def require_writable(path: str | os.PathLike[str]) -> None:
    """Raises ValueError if no file can be written there: to be called before the work for it."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"cannot be made: there is no {path.parent}"
        raise ValueError(f"{path} {what}. Name a file in a directory that exists")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: permission denied")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write, put in the place of another in one step: a killed process leaves the old one
    or the new, never half."""
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
