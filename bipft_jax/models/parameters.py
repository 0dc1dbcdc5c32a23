"""Comparing parameter trees by name: which are missing, unexpected or of another shape.

A leaf is named by its path, joined with "/": `encoder/layer/attention/query/kernel`. Restored trees
are compared before use, because a checkpoint that silently lacks a parameter trains a random one.
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
    """Whether a parameter has a leading axis of layers: `nn.scan` keeps them in one array."""
    return "layers" in path.split("/")


def is_scale(path: tuple[str, ...] | str) -> bool:
    """Whether a parameter path names a learned quantization scale."""
    return (path if isinstance(path, str) else path[-1]).endswith(SCALE_SUFFIX)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by their "/"-joined path, in the tree's own order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One sentence for each way in which `found` is not `expected`; an empty list if they agree.

    Arguments:
      found, expected: arrays or `jax.ShapeDtypeStruct`s by path, as `named_leaves` gives them.
    """
    sentences = [f"{name} is missing" for name in expected if name not in found]
    sentences += [f"{name} is unexpected" for name in found if name not in expected]
    for name, leaf in expected.items():
        if name not in found:
            continue
        if tuple(found[name].shape) != tuple(leaf.shape):
            sentences.append(
                f"{name} has shape {tuple(found[name].shape)}, expected {tuple(leaf.shape)}"
            )
        elif found[name].dtype != leaf.dtype:
            sentences.append(f"{name} has dtype {found[name].dtype}, expected {leaf.dtype}")
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
    """Compares restored parameters with those a model expects.

    Arguments:
      restored: pytree of arrays.
      expected: pytree of arrays or `jax.ShapeDtypeStruct`s, such as `jax.eval_shape` of `init`.
      allowed_missing: of a path; True where the model may create the parameter itself, because
        what was restored never had it.
      allowed_unexpected: of a path; True where a restored parameter may be dropped, such as the
        head of another task.
      source: what was restored, for the message.

    Returns:
      The paths that are missing, all of them allowed, in the order of `expected`.

    Raises:
      ValueError: naming every other missing or unexpected parameter and every one of another shape
        (with both shapes) or dtype.
    """
    wanted = named_leaves(expected)
    found = {
        name: leaf
        for name, leaf in named_leaves(restored).items()
        # A parameter that may be dropped is still taken if the model has it.
        if name in wanted or not allowed_unexpected(name)
    }
    missing = [name for name in wanted if name not in found and allowed_missing(name)]
    sentences = differences(
        found, {name: leaf for name, leaf in wanted.items() if name not in missing}
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
    """The tree of `fresh` with the restored value at every path that was restored.

    Arguments and errors are those of `check_parameters`; `fresh` is a freshly initialised tree (a
    leaf that is not allowed to be missing may be abstract, for its value is never used).
    """
    check_parameters(
        restored,
        fresh,
        allowed_missing=allowed_missing,
        allowed_unexpected=allowed_unexpected,
        source=source,
    )
    found = named_leaves(restored)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: found.get(path_name(path), leaf), fresh
    )
