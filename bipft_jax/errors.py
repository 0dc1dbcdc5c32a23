"""Error messages that help: an unknown name lists the names nearest to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """A ValueError that names what was not known, the nearest known names, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(known)}")
