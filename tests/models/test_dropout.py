"""The cheap mask is as good as independent coins, and the same wherever it is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bipft_jax.models.dropout import dropout, keep_mask


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_mask_is_like_independent_coins(rate):
    """Shares and correlations within five standard deviations of what coins show."""
    rows, columns = 4096, 768
    keep = np.asarray(keep_mask(jax.random.key(3), rate, (64, 64, columns))).reshape(rows, columns)
    coin = np.sqrt(rate * (1 - rate))
    assert abs(keep.mean() - (1 - rate)) < 5 * coin / np.sqrt(keep.size)
    # Each row and each column has its share ...
    assert np.abs(keep.mean(0) - (1 - rate)).max() < 5 * coin / np.sqrt(rows)
    assert np.abs(keep.mean(1) - (1 - rate)).max() < 5.5 * coin / np.sqrt(columns)
    # ... which says nothing of any other row or column.
    centred = (keep - keep.mean()) / coin
    for lines, size in ((centred[:512], columns), (centred.T[:512], rows)):
        correlation = lines @ lines.T / size
        np.fill_diagonal(correlation, 0)
        assert np.abs(correlation).max() < 6 / np.sqrt(size)


def test_another_key_is_another_mask():
    masks = [np.asarray(keep_mask(jax.random.key(k), 0.5, (64, 64))) for k in range(2)]
    assert abs((masks[0] == masks[1]).mean() - 0.5) < 0.05


def test_keeps_the_expectation_and_passes_gradients_where_it_passes_values():
    key, x = jax.random.key(1), jnp.ones((128, 256))
    y, pullback = jax.vjp(lambda x: dropout(x, key, 0.25), x)
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75])
    assert abs(y.mean() - 1) < 0.02
    np.testing.assert_array_equal(pullback(x)[0], y)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "size", 0) >= 128]
    assert not kept  # the key, and no mask


def test_the_mask_does_not_depend_on_how_it_is_sharded():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    make = jax.jit(lambda: keep_mask(jax.random.key(5), 0.1, (16, 4, 32)), out_shardings=split)
    whole = keep_mask(jax.random.key(5), 0.1, (16, 4, 32))
    np.testing.assert_array_equal(make(), whole)
