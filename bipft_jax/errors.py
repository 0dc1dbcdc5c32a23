"""Errors that several programs raise: an unknown name, and a runtime that is not installed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """A ValueError with the unknown name, the nearest known names, and all known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(known)}")


def runtime_missing(error: ImportError) -> SystemExit:
    """The end of a program that needs the distribution `bipft_runtime`, which is not installed."""
    return SystemExit(
        f"error: packed models need the runtime ({error}): pip install ./bipft_jax/runtime in a "
        "checkout (launch/test.sh and launch/quickstart.sh install it)"
    )
