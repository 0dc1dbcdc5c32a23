"""Derivatives that are written out, against autodiff of the plain formula; and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bipft_jax.models.activations import gelu
from bipft_jax.models.bert import Encoder, EncoderLayer
from bipft_jax.models.layers import BinaryDense, added_to_rows
from bipft_jax.models.normalization import RMSNorm, normalize
from bipft_jax.models.recipes import BertConfig, recipe_named


def test_layer_norm_is_flaxs():
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(1, 3, (2, 5, 16)), jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=16), jnp.float32) for _ in range(2))

    def flax(x, scale, bias):
        module = nn.LayerNorm(epsilon=1e-3, use_fast_variance=False)
        return module.apply({"params": {"scale": scale, "bias": bias}}, x)

    want, want_pullback = jax.vjp(flax, x, scale, bias)
    got, got_pullback = jax.vjp(lambda *a: normalize(*a, 1e-3), x, scale, bias)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(got_pullback(cotangent), want_pullback(cotangent)):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_rms_norm_is_flaxs_in_each_group(groups):
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(1, 3, (2, 5, 16)), jnp.float32) for _ in range(2))
    scale = jnp.asarray(rng.normal(size=16), jnp.float32)

    def flax(x, scale):
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(scale, groups))
        norm = nn.RMSNorm(epsilon=1e-3)
        return jnp.concatenate([norm.apply({"params": {"scale": s}}, y) for y, s in parts], axis=-1)

    def ours(x, scale):
        return RMSNorm(1e-3, jnp.float32, groups).apply({"params": {"scale": scale}}, x)

    want, want_pullback = jax.vjp(flax, x, scale)
    got, got_pullback = jax.vjp(ours, x, scale)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(got_pullback(cotangent), want_pullback(cotangent)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_gelu_is_the_erf_form():
    x = jnp.linspace(-6, 6, 1001)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    plain = jax.grad(lambda x: jnp.sum(jax.nn.gelu(x, approximate=False)))
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(gelu(x)))(x), plain(x), atol=2e-6)


def test_bfloat16_inputs_are_kept_as_they_are():
    x = jnp.ones((4, 8, 64), jnp.bfloat16)
    for f in (gelu, lambda x: normalize(x, jnp.ones(64), jnp.zeros(64), 1e-12)):
        _, pullback = jax.vjp(f, x)
        large = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "size", 0) == x.size]
        assert [leaf.dtype for leaf in large] == [jnp.bfloat16]


def test_a_rows_gradient_is_summed_in_float32():
    """257 is no bfloat16."""
    x = jnp.ones((257, 3), jnp.bfloat16)
    y, pullback = jax.vjp(added_to_rows, x, jnp.ones(3))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pullback(y - 1)[1], [257, 257, 257])


def test_lean_makes_the_activations_input_again_where_codes_make_it():
    def kept(recipe, **switches):
        config = BertConfig(
            recipe_named(recipe, **switches), 11, 1, 32, 2, 64, remat="lean", scan_layers=False
        )
        encoder, x, mask = Encoder(config), jnp.ones((2, 8, 32)), jnp.ones((2, 8), jnp.int32)
        params = encoder.init(jax.random.key(1), x, mask, True)["params"]
        _, pullback = jax.vjp(lambda p: encoder.apply({"params": p}, x, mask, True)[0], params)
        leaves = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "shape")]
        return [leaf.dtype for leaf in leaves if leaf.shape[-3:] == (2, 8, 64)]

    assert kept("bipft_a") == [jnp.int8]
    assert kept("fp") == [jnp.float32, jnp.float32]
    assert jnp.float32 in kept("bipft_a", full_precision_weights=True)


def test_no_float_input_of_an_encoder_linear_is_kept():
    """Of a binary layer; a full-precision one must keep them."""

    def float_inputs_kept(recipe):
        config = BertConfig(
            recipe_named(recipe), 11, 1, 32, 2, 64, dropout=0.0, compute="int8", backward="float32"
        )
        layer, mask = EncoderLayer(config), jnp.ones((2, 8), jnp.int32)
        x_key = jax.random.key(0)
        x = jax.random.normal(x_key, (2, 8, 32))
        variables = layer.init(jax.random.key(1), x, mask, True)
        # No bias or shift is 0, or an input would equal the sum that LayerNorm keeps.
        params = jax.tree.map(
            lambda p: jnp.where(jnp.isnan(p), 0.1, p + 0.2 * jax.random.normal(x_key, p.shape)),
            variables["params"],
        )
        inputs = []

        def record(call, arguments, keywords, context):
            if isinstance(context.module, BinaryDense) and context.method_name == "__call__":
                inputs.append(np.asarray(arguments[0]))
            return call(*arguments, **keywords)

        with nn.intercept_methods(record):
            layer.apply({"params": params}, x, mask, True)
        _, pullback = jax.vjp(lambda p: layer.apply({"params": p}, x, mask, True)[0], params)
        kept = [np.asarray(k) for k in jax.tree.leaves(pullback) if hasattr(k, "shape")]
        assert len(inputs) == 6
        return sum(
            any(k.shape == given.shape and np.array_equal(k, given) for k in kept)
            for given in inputs
        )

    assert float_inputs_kept("bipft_a") == 0
    assert float_inputs_kept("fp") == 6
