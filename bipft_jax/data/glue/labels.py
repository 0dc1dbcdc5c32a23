"""What the outputs of a classifier mean, by the names that its own configuration gives them.

Others train a task with its classes in another order, or spelled in another way: capital letters,
or the words that TFDS has for the benchmark's 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from bipft_jax.data.glue.tasks import GlueTask


def outputs_of_classes(task: GlueTask, names: Sequence[str]) -> list[int] | None:
    """The output of each class of a task, in the task's order.

    Arguments:
      names: of the outputs, in their order.

    Returns: a permutation of the outputs; None if the names are not those of the task's classes.
    """
    spelled = [_plain(name) for name in names]
    for spelling in (*task.spellings, _numbered(task)):
        wanted = [_plain(name) for name in spelling]
        if sorted(spelled) == sorted(wanted):
            return [spelled.index(name) for name in wanted]
    return None


def are_numbers(task: GlueTask, names: Sequence[str]) -> bool:
    """Whether the names are nothing but the numbers of classes."""
    return set(map(_plain, names)) <= set(_numbered(task))


def _numbered(task: GlueTask) -> list[str]:
    return [f"label_{number}" for number in range(task.num_outputs)]


def _plain(name: str) -> str:
    name = name.casefold().replace("-", "_").replace(" ", "_")
    return f"label_{name}" if name.isdecimal() else name
