"""Restored parameters are taken whole or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipft_jax.models.parameters import check_parameters, merge_parameters


def is_scale(path: str) -> bool:
    return path.endswith("/scale")


def expected():
    return {
        "encoder": {"query": {"kernel": jnp.zeros((3, 4)), "scale": jnp.full((4,), 7.0)}},
        "head": {"kernel": jnp.zeros((4, 2))},
    }


def test_merge_takes_restored_values_and_creates_only_allowed_ones():
    restored = {
        "encoder": {"query": {"kernel": np.ones((3, 4), np.float32)}},
        "head": {"kernel": np.full((4, 2), 2, np.float32)},
        "nsp": {"bias": np.zeros(2, np.float32)},
    }
    merged = merge_parameters(
        restored,
        expected(),
        allowed_missing=is_scale,
        allowed_unexpected=lambda path: path.split("/")[0] in ("nsp", "head"),
    )
    assert jax.tree.structure(merged) == jax.tree.structure(expected())
    np.testing.assert_array_equal(merged["encoder"]["query"]["kernel"], 1)
    np.testing.assert_array_equal(merged["encoder"]["query"]["scale"], 7)
    # The model has this head, so it is taken though it might have been dropped.
    np.testing.assert_array_equal(merged["head"]["kernel"], 2)


def test_missing_unexpected_and_misshaped_parameters_are_all_named():
    restored = {
        "encoder": {"query": {"kernel": jnp.zeros((3, 5))}, "key": {"kernel": jnp.zeros(1)}},
    }
    with pytest.raises(ValueError) as caught:
        check_parameters(restored, expected(), allowed_missing=is_scale, source="run7/9")
    message = str(caught.value)
    assert "run7/9" in message
    assert "encoder/query/kernel has shape (3, 5), expected (3, 4)" in message
    assert "head/kernel is missing" in message
    assert "encoder/key/kernel is unexpected" in message
    assert "encoder/query/scale" not in message


def test_without_permission_a_missing_scale_is_an_error():
    restored = expected()
    del restored["encoder"]["query"]["scale"]
    abstract = jax.eval_shape(expected)
    with pytest.raises(ValueError, match="encoder/query/scale is missing"):
        check_parameters(restored, abstract)
    assert check_parameters(restored, abstract, allowed_missing=is_scale) == ["encoder/query/scale"]


def test_a_dtype_is_not_converted_silently():
    restored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), expected())
    with pytest.raises(ValueError, match="head/kernel has dtype bfloat16, expected float32"):
        check_parameters(restored, expected())
