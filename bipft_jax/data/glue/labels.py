"""Maps the outputs of an imported classifier to a task's classes, by its label names.

Classifiers trained elsewhere may have the classes in another order or spell them differently: in
capital letters, or with TFDS's words for the benchmark's 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from bipft_jax.data.glue.tasks import GlueTask


def outputs_of_classes(task: GlueTask, names: Sequence[str]) -> list[int] | None:
    """The output number of each class of a task, in the task's order.

    Arguments:
      names: label names of the outputs, in their order.

    Returns: a permutation of the outputs; None if the names are not those of the task's classes.
    """
    spelled = [_plain(name) for name in names]
    for spelling in (*task.spellings, _numbered(task)):
        wanted = [_plain(name) for name in spelling]
        if sorted(spelled) == sorted(wanted):
            return [spelled.index(name) for name in wanted]
    return None


def are_numbers(task: GlueTask, names: Sequence[str]) -> bool:
    """Whether all names are class numbers."""
    return set(map(_plain, names)) <= set(_numbered(task))


def _numbered(task: GlueTask) -> list[str]:
    return [f"label_{number}" for number in range(task.num_outputs)]


def _plain(name: str) -> str:
    name = name.casefold().replace("-", "_").replace(" ", "_")
    return f"label_{name}" if name.isdecimal() else name
