"""Points of a sweep: maps from config keys to values, their combinations and their names."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Point = dict[str, Any]

_LONGEST_NAME = 120  # characters; file systems take 255 bytes


def product(*lists: Sequence[Mapping[str, Any]], **values: Iterable[Any]) -> list[Point]:
    """Every combination of the points of the lists and the named values, the last one varying
    fastest: `product(zipped(size=("tiny", "mini"), learning_rate=(2e-3, 1e-3)), seed=(0, 1))`.

    Raises: ValueError for a duplicate key, or a single value instead of a list of values.
    """
    factors = [*lists, *([{key: value} for value in _values(key, values[key])] for key in values)]
    points = []
    for combination in itertools.product(*factors):
        point: Point = {}
        for part in combination:
            if twice := point.keys() & part.keys():
                raise ValueError(f"{min(twice)} is named twice in one product")
            point.update(part)
        points.append(point)
    return points


def zipped(**values: Iterable[Any]) -> list[Point]:
    """A point of the first values of all keys, then one of the second values, and so on.

    Raises: ValueError for lists of unequal length, or a single value instead of a list of values.
    """
    columns = {key: _values(key, column) for key, column in values.items()}
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{key} has {len(column)}" for key, column in columns.items())
        raise ValueError(f"values taken together must be equally many: {lengths}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _values(key: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{key} is {values!r}: give a tuple of values")
    return [value.item() if hasattr(value, "item") else value for value in values]


def point_name(point: Mapping[str, Any]) -> str:
    """The name of a point's directory, such as `learning_rate=0.0003,seeds=0`, independent of the
    order of its keys. Characters unfit for a file name are replaced, and a hash keeps such names
    unique.

    Raises: ValueError for a point without values.
    """
    if not point:
        raise ValueError("a point has no values: give it at least one key")
    values = {key: point[key] for key in sorted(point)}
    text = label(values, separator=",")
    name = re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)
    ambiguous = any(re.search("[,=]", value_text(value)) for value in values.values())
    if name == text and not ambiguous and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"


def value_text(value: Any) -> str:
    """A value as text for a name, an axis or a legend; the parts of a tuple are joined by "+"."""
    return "+".join(map(value_text, value)) if isinstance(value, (tuple, list)) else str(value)


def label(values: Mapping[str, Any], separator: str = ", ") -> str:
    """KEY=VALUE of all entries, joined by the separator."""
    return separator.join(f"{key}={value_text(value)}" for key, value in values.items())


def named(points: Iterable[Mapping[str, Any]]) -> dict[str, Point]:
    """The points by name, in order.

    Raises: ValueError for no points, or two points with the same name.
    """
    by_name: dict[str, Point] = {}
    for point in points:
        name = point_name(point)
        if name in by_name:
            raise ValueError(f"the sweep names the point {name} twice: leave one out")
        by_name[name] = dict(point)
    if not by_name:
        raise ValueError("the sweep has no points")
    return by_name
