"""The kernels, interpreted, against attention as XLA makes it, and compiled for a TPU."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bipft_jax.benchmarks import tpu_cost
from bipft_jax.models.attention import SelfAttention
from bipft_jax.models.parameters import named_leaves
from bipft_jax.models.recipes import BertConfig, recipe_named
from bipft_jax.training import sharding

BATCH, LENGTH = 4, 128


def config_of(recipe="bipft_b", **overrides) -> BertConfig:
    """Two programs of four heads for each sequence."""
    sizes = dict(vocab_size=11, layers=1, hidden=256, heads=8, intermediate=8)
    return BertConfig(recipe_named(recipe), **{**sizes, "dropout": 0.1, **overrides})


@functools.cache
def problem(recipe):
    """Parameters whose probabilities straddle their threshold and its window, input, mask, and the
    cotangent of the context."""
    rng = np.random.default_rng(1)
    x, cotangent = (jnp.asarray(rng.normal(size=(BATCH, LENGTH, 256)), jnp.float32) for _ in "xc")
    mask = jnp.asarray(np.arange(LENGTH) < np.array([[LENGTH], [100], [7], [64]]), jnp.int32)
    module = SelfAttention(config_of(recipe))
    variables = module.init(jax.random.key(0), x, mask, True)
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), variables["params"]
    )
    _, found = module.apply({"params": params}, x, mask, True, mutable=["calibration"])
    calibrated = {**flatten_dict(params), **flatten_dict(found["calibration"])}
    return unflatten_dict(calibrated), x, mask, cotangent


def context_and_gradients(config, params, x, mask, cotangent):
    """Context, and the gradients of its product with the cotangent, by name."""

    def loss(params, x):
        key = jax.random.key(5)
        context = SelfAttention(config).apply(
            {"params": params}, x, mask, False, rngs={"dropout": key}
        )
        return jnp.sum(context * cotangent), context

    (_, context), (of_params, of_x) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(params, x)
    return context, {**named_leaves(of_params), "x": of_x}


def assert_close(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # These shift all scores of a query alike: softmax gives them no gradient but noise.
        if name not in ("key_estimator/bias", "key_residual_estimator/bias"):
            error = jnp.linalg.norm(got[name] - value) / jnp.linalg.norm(value)
            assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("recipe", ["bipft_a", "bipft_b", "bit_w1a1"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_makes_what_separate_products_make(recipe, dropout):
    separate = config_of(recipe, dropout=dropout)
    fused = dataclasses.replace(separate, fused_attention=True)
    expected, expected_gradients = context_and_gradients(separate, *problem(recipe))
    context, gradients = context_and_gradients(fused, *problem(recipe))
    np.testing.assert_allclose(context, expected, atol=1e-5)
    assert_close(gradients, expected_gradients, 2e-5)


def test_bfloat16_rounds_gradients_by_less_than_a_hundredth():
    fused = config_of(fused_attention=True)
    exact = context_and_gradients(fused, *problem("bipft_b"))[1]
    rounded = dataclasses.replace(fused, backward="bfloat16")
    got = context_and_gradients(rounded, *problem("bipft_b"))[1]
    # Those of scales are sums whose terms nearly cancel: as far off without the kernels.
    of_arrays = {name: value for name, value in exact.items() if value.ndim}
    assert_close({name: got[name] for name in of_arrays}, of_arrays, 1e-2)
    assert not np.array_equal(got["x"], exact["x"])


def test_a_mesh_changes_nothing():
    """Sequences over four devices, heads over two."""
    fused = config_of(fused_attention=True)
    expected, expected_gradients = context_and_gradients(fused, *problem("bipft_b"))
    with sharding.on(sharding.make_mesh(fsdp=2, tensor=2)):
        context, gradients = context_and_gradients(fused, *problem("bipft_b"))
    np.testing.assert_allclose(context, expected, atol=1e-5)
    assert_close(gradients, expected_gradients, 2e-5)


def test_what_it_is_not_written_for_is_an_error():
    with pytest.raises(ValueError, match="'fp' has no fused attention.*bipft_a, bipft_b, bit_w1a1"):
        config_of("fp", fused_attention=True)
    params, x, mask, _ = problem("bipft_b")
    module = SelfAttention(config_of(fused_attention=True))
    with pytest.raises(ValueError, match="multiple of 128 tokens.* not 100 tokens"):
        module.apply({"params": params}, x[:, :100], mask[:, :100], True)
    for deterministic in (True, False):
        rngs = {"dropout": jax.random.key(0)}
        with (
            sharding.on(sharding.make_mesh(tensor=4)),
            pytest.raises(ValueError, match="multiple of 128 channels on a device.* 64 channels"),
        ):
            module.apply({"params": params}, x, mask, deterministic, rngs=rngs)
    with pytest.raises(ValueError, match="fused_attention multiplies codes.*'simulated'"):
        config_of(fused_attention=True, compute="simulated")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install -e '.[tpu-compiler]'"
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_compiles_for_a_tpu_and_keeps_scores_on_the_chip(topology):
    workload = tpu_cost.Workload("tiny", 2, 256, "bfloat16", remat="lean", fused_attention=True)
    row = tpu_cost.row(workload, "bipft_a", "auto", topology, costliest=10_000)
    kernels = [item for item in row["costliest"] if item["operation"] == "pallas_call"]
    assert {item["instruction"].partition(".")[0] for item in kernels} == {
        "binary_attention",
        "binary_attention_gradient",
    }
    assert not any("256,256]" in item["shape"] for item in row["costliest"])
