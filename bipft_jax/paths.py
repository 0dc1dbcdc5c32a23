"""The one rule for paths that users give: they are of the file system, never gs:// or the like."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
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
