"""Rules for paths from users: a path is of the file system, never gs:// or the like, and the name
of an existing file is not a pattern, whatever its characters."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_SCHEME = re.compile(r"[a-z][a-z0-9+.:-]*", re.IGNORECASE)  # gs, s3, also tfds:gs


def require_local(arguments: Mapping[str, Any]) -> None:
    """Refuses gs://, s3://, https:// and every other SCHEME:// instead of a path. Call it where
    paths enter the program, before anything is loaded or written.

    Arguments:
      arguments: paths, or lists or tuples of paths, by the names that the user knows. Values of
        other types are ignored, so it can be a config or all arguments of a command.

    Raises: ValueError that names the first path that is not of the file system.
    """
    for name, value in arguments.items():
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(path, (str, os.PathLike)):
                continue
            text = os.fspath(path)
            # pathlib turns gs:// into gs:/.
            scheme, mark, _ = text.partition("://" if isinstance(path, str) else ":/")
            if mark and _SCHEME.fullmatch(scheme):
                raise ValueError(
                    f"{name} is {text}, but only the file system is read and written: mount the "
                    'bucket (with gcsfuse, see README, "A TPU slice") and give the mounted path, '
                    "such as /mnt/BUCKET/..."
                )


def files_named(spec: str) -> list[str]:
    """The file of that name or, if nothing has that name, the files that it matches as a pattern.

    Arguments:
      spec: a path. Its leading directories that exist are literal; the rest is the pattern.

    Returns: at least one path, sorted.

    Raises: ValueError if no file matches, for a directory, or for a pipe or a device, which can be
      read only once while callers read more than once.
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
    """Raises ValueError if the file cannot be written. Call it before computing its contents."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a directory" if path.is_dir() else f"has no directory {path.parent}"
        raise ValueError(f"{path} {problem}. Name a file in a directory that exists")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: permission denied")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to write, which then replaces `path` atomically: a killed process leaves the
    old file or the new one, never a partial one."""
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
