"""Compares parameter trees by name: missing and unexpected leaves, other shapes and dtypes.

A leaf's name is its path, joined with "/": `bert/encoder/layers/attention/query/kernel`. Restored
trees are compared before use: a parameter that a checkpoint silently lacks would be trained from
random values.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from bipft_jax.models.layers import SCALE_SUFFIX

Params = dict[str, Any]  # a pytree of arrays by module
PathPredicate = Callable[[str], bool]


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as text: dictionary keys, indices and fields joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_stacked(path: str) -> bool:
    """Whether a parameter has a leading [layers] axis, from `nn.scan`."""
    return "layers" in path.split("/")


def is_scale(path: tuple[str, ...] | str) -> bool:
    """Whether a path is that of a learned scale of a quantizer."""
    return (path if isinstance(path, str) else path[-1]).endswith(SCALE_SUFFIX)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by their "/"-joined path, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def differences(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One sentence per difference between `actual` and `expected`; an empty list if they agree.

    Arguments:
      actual, expected: arrays or `jax.ShapeDtypeStruct`s by path, as from `named_leaves`.
    """
    sentences = [f"{name} is missing" for name in expected if name not in actual]
    sentences += [f"{name} is unexpected" for name in actual if name not in expected]
    for name, leaf in expected.items():
        if name not in actual:
            continue
        if tuple(actual[name].shape) != tuple(leaf.shape):
            sentences.append(
                f"{name} has shape {tuple(actual[name].shape)}, expected {tuple(leaf.shape)}"
            )
        elif actual[name].dtype != leaf.dtype:
            sentences.append(f"{name} has dtype {actual[name].dtype}, expected {leaf.dtype}")
    return sentences


def _nothing(path: str) -> bool:
    return False


def check_parameters(
    restored: Any,
    expected: Any,
    *,
    allowed_missing: PathPredicate = _nothing,
    allowed_unexpected: PathPredicate = _nothing,
    source: str = "the checkpoint",
) -> list[str]:
    """Compares restored parameters with those that a model expects.

    Arguments:
      restored: pytree of arrays.
      expected: pytree of arrays or `jax.ShapeDtypeStruct`s, such as `jax.eval_shape` of `init`.
      allowed_missing: path -> whether the model may initialise the parameter, because the source
        never had it.
      allowed_unexpected: path -> whether the restored parameter may be dropped, such as the head of
        another task.
      source: name of the restored tree, for the message.

    Returns:
      The missing paths, all of them allowed, in the order of `expected`.

    Raises:
      ValueError: names every other missing or unexpected parameter and every one of another shape
        (with both shapes) or dtype.
    """
    wanted = named_leaves(expected)
    usable = {
        name: leaf
        for name, leaf in named_leaves(restored).items()
        # A parameter that may be dropped is still compared if the model has it.
        if name in wanted or not allowed_unexpected(name)
    }
    missing = [name for name in wanted if name not in usable and allowed_missing(name)]
    sentences = differences(
        usable, {name: leaf for name, leaf in wanted.items() if name not in missing}
    )
    if sentences:
        raise ValueError(
            f"The parameters of {source} do not fit this model: {'; '.join(sentences)}. "
            "Was it trained with another recipe, size or task?"
        )
    return missing


def merge_parameters(
    restored: Any,
    fresh: Any,
    *,
    allowed_missing: PathPredicate = _nothing,
    allowed_unexpected: PathPredicate = _nothing,
    source: str = "the checkpoint",
) -> Any:
    """The tree of `fresh`, with the restored value at every restored path.

    Arguments and errors are those of `check_parameters`; `fresh` is a freshly initialised tree (a
    leaf that may not be missing can be abstract: its value is never used).
    """
    check_parameters(
        restored,
        fresh,
        allowed_missing=allowed_missing,
        allowed_unexpected=allowed_unexpected,
        source=source,
    )
    restored_leaves = named_leaves(restored)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: restored_leaves.get(path_name(path), leaf), fresh
    )
