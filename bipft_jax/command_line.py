"""Parses the flags of the programs in launch/, with one-line errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from absl import flags


def parse(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses flags with absl. For a mistyped config key ml_collections suggests similar ones.

    Returns: the positional arguments, the program's name first.

    Raises: ValueError that names the flag; OSError for a file that cannot be read.
    """
    try:
        return values(argv)
    except (AttributeError, LookupError) as error:
        message = error.args[0]
        while isinstance(message, BaseException):  # an inner KeyError, whose str is a repr
            message = message.args[0]
        # A nested key whose section does not exist, or is not a section.
        if inside := re.search(r"(?:lookup:|\(in:) ([^\s)]+)", message):
            message = repr(inside[1])
        raise ValueError(f"unknown config key {message}") from error
    except (flags.Error, TypeError) as error:
        raise ValueError(str(error)) from error


def parse_or_exit(argv: list[str]) -> list[str]:
    """The flags_parser of `app.run`: exits with the message of an error."""
    try:
        return parse(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
