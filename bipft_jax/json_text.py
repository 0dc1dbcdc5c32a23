"""Parses JSON from outside; every defect is a ValueError."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Arguments:
      text: bytes are UTF-8, with or without a byte-order mark.

    Raises: ValueError with the reason, for text that the decoder cannot parse (syntax, bytes that
      are not UTF-8, too deep nesting, an integer with too many digits), and for an object with a
      duplicate key, of which one value would be lost.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if "\n" in error.doc else ""
        raise ValueError(f"{error.msg} at character {error.colno}{line}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return values
