"""Flags of the programs in launch/, with errors of one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from absl import flags


def parse(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """absl's parser; of a mistyped config key, ml_collections names those near it.

    Returns: the arguments that are no flags, the program's name first.

    Raises: ValueError that names the flag; OSError for a file that cannot be read.
    """
    try:
        return values(argv)
    except (AttributeError, LookupError) as error:
        message = error.args[0]
        while isinstance(message, BaseException):  # a KeyError inside, whose str is a repr
            message = message.args[0]
        # Of a key inside another: one of a section that is not there, or of what is no section.
        if inside := re.search(r"(?:lookup:|\(in:) ([^\s)]+)", message):
            message = repr(inside[1])
        raise ValueError(f"unknown config key {message}") from error
    except (flags.Error, TypeError) as error:
        raise ValueError(str(error)) from error


def parse_or_exit(argv: list[str]) -> list[str]:
    """The flags_parser for `app.run`: an error ends the program with its message."""
    try:
        return parse(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
