"""The decoder: what a position sees, every mesh makes one device's update, and what crosses the
network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bipft_jax.models import decoder_recipes
from bipft_jax.models.decoder import Decoder, DecoderLayer
from bipft_jax.models.decoder_recipes import (
    DecoderConfig,
    decoder_config,
    decoder_recipe_named,
)
from bipft_jax.objectives.causal_lm import CAUSAL_LM
from bipft_jax.pods import hlo
from bipft_jax.pods.network import KINDS
from bipft_jax.training import sharding
from bipft_jax.training.optimizer import adamw
from bipft_jax.training.state import initial_params, new_state
from bipft_jax.training.step import update

BATCH, LENGTH, VOCAB = 16, 6, 24


def config_of(recipe, **changes):
    sizes = dict(vocab_size=VOCAB, layers=2, hidden=32, intermediate=64, heads=8, kv_heads=4)
    # "auto" traces every product for every platform.
    return DecoderConfig(recipe, compute="int8", **sizes | changes)


def batch_of():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    return {
        "input_ids": ids[:, :-1],
        "target_ids": ids[:, 1:],
        "target_weights": rng.integers(0, 2, (BATCH, LENGTH)).astype(np.float32),
        "segment_ids": np.sort(rng.integers(1, 3, (BATCH, LENGTH))).astype(np.int32),
    }


@functools.cache
def model_and_params(dtype="float32", **recipe):
    recipe = {"name": "bitnet_b158", **recipe}
    model = Decoder(config_of(decoder_recipe_named(**recipe), dtype=dtype, tied=False))
    params = initial_params(model, jax.random.key(3), *CAUSAL_LM.model_inputs(batch_of()))
    noisy = jax.tree.map(
        lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape, p.dtype), params
    )
    return model, noisy


def logits_of(ids, segments, **recipe):
    model, params = model_and_params(**recipe)
    apply = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs).logits)
    return np.asarray(apply(jnp.asarray(ids, jnp.int32), jnp.asarray(segments, jnp.int32)))


@pytest.mark.parametrize(
    "recipe", [{}, pytest.param(dict(norm="linear", gate="silu"), marks=pytest.mark.long)]
)
def test_a_position_sees_its_own_document_up_to_itself(recipe):
    ids = np.array([[3, 1, 4, 1, 5, 9], [3, 1, 4, 2, 6, 5], [0, 7, 4, 1, 5, 9]])
    one = np.ones_like(ids)
    logits = logits_of(ids, one, **recipe)
    np.testing.assert_array_equal(logits[0, :3], logits[1, :3])  # the future differs
    assert np.abs(logits[0, 3:] - logits[2, 3:]).min(axis=-1).all()  # the past differs
    two = np.array([[1, 1, 2, 2, 2, 2]] * 3)
    apart = logits_of(ids, two, **recipe)
    np.testing.assert_allclose(apart[0, 2:], apart[2, 2:], atol=1e-6)
    # A document of its own gives the logits of a text that begins with it, padded on either side.
    alone = np.array([[4, 1, 5, 9, 0, 0], [0, 0, 4, 1, 5, 9]])
    padded = logits_of(alone, alone > 0, **recipe)
    np.testing.assert_allclose(padded[0, :4], apart[0, 2:], atol=2e-5)
    np.testing.assert_allclose(padded[1, 2:], padded[0, :4], atol=2e-5)
    assert np.isfinite(padded).all()


def outcome(recipe, devices, fsdp=1, tensor=1):
    """Gradient (Adam's first moment) and loss of an update, and the parameters after it."""
    model, params = model_and_params("float64", **recipe)
    mesh = sharding.make_mesh(fsdp, tensor, jax.devices()[:devices])
    sharding.check_model(model.config, mesh)
    optimizer = adamw(1e-3, weight_decay=0.01, clip_norm=1.0, eps=1e-6)
    wide = jax.tree.map(np.float64, params)
    state = sharding.put(mesh, new_state(wide, optimizer))
    step = jax.jit(
        update(CAUSAL_LM, model, optimizer),
        static_argnums=4,
        out_shardings=(sharding.placements(mesh, state), sharding.replicated(mesh)),
    )
    with sharding.on(mesh):
        state, metrics = step(state, None, 0, sharding.put_batch(mesh, batch_of()), True)
    moments = optax.tree.get(state.opt_state, "mu")
    return jax.device_get((moments, metrics["loss"], state.params))


@pytest.mark.parametrize(
    ("recipe", "fsdp", "tensor"),
    [
        (dict(name="bitnet_b158"), 2, 2),
        (dict(name="bitnet_b1", groups=2), 2, 2),
        pytest.param(dict(name="bitnet_b1", groups=4), 1, 4, marks=pytest.mark.long),
        pytest.param(dict(name="bitnet_b158"), 1, 1, marks=pytest.mark.long),
        pytest.param(dict(name="bitnet_fp"), 8, 1, marks=pytest.mark.long),
        pytest.param(
            dict(name="bitnet_b158", groups=4, norm="linear"), 2, 4, marks=pytest.mark.long
        ),
    ],
)
def test_every_mesh_makes_the_updates_of_one_device(recipe, fsdp, tensor):
    with jax.enable_x64(True):
        expected, found = outcome(recipe, 1), outcome(recipe, 8, fsdp, tensor)

    def check(path, a, b):
        assert a.dtype == np.float64
        atol = 1e-9 * np.abs(b).max() + 1e-15
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, found, expected)


@pytest.mark.parametrize("recipe", ["bitnet_b1", "bitnet_b158"])
def test_with_a_group_per_device_no_statistic_crosses_the_network(recipe):
    """A block communicates the sums of its two output linears and nothing else."""

    def communicated(groups):
        layer = DecoderLayer(config_of(decoder_recipe_named(recipe, groups=groups)))
        mesh = sharding.make_mesh(1, 2, jax.devices()[:2])
        rows = sharding.batch_sharding(mesh)
        x = jax.ShapeDtypeStruct((2, LENGTH, 32), jnp.float32, sharding=rows)
        segments = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32, sharding=rows)
        params = jax.eval_shape(layer.init, jax.random.key(0), x, segments)["params"]
        forward = jax.jit(lambda p, *inputs: layer.apply({"params": p}, *inputs)[0])
        with sharding.on(mesh):
            lowered = forward.lower(sharding.placed(mesh, params), x, segments)
        module = hlo.parse(lowered.compile().as_text())
        return [
            instruction.shape.partition("{")[0]
            for instructions in module.computations.values()
            for instruction in instructions
            if instruction.opcode.removesuffix("-start") in KINDS
        ]

    assert communicated(groups=2) == [f"f32[2,{LENGTH},32]"] * 2
    assert f"f32[2,{LENGTH}]" in communicated(groups=1)  # largest magnitudes of tokens


@pytest.mark.long
def test_lean_rematerialisation_and_bfloat16_keep_the_gradient():
    model, params = model_and_params()
    batch = batch_of()

    def gradient(**changes):
        changed = Decoder(dataclasses.replace(model.config, **changes))

        def loss_of(params):
            output = changed.apply({"params": params}, *CAUSAL_LM.model_inputs(batch))
            return CAUSAL_LM.loss(output, batch, CAUSAL_LM.counts(batch))[0]

        return jax.flatten_util.ravel_pytree(jax.jit(jax.grad(loss_of))(params))[0]

    expected = gradient()
    np.testing.assert_allclose(gradient(remat="lean"), expected, atol=1e-6)
    half = gradient(dtype="bfloat16", backward="bfloat16")
    assert half.dtype == jnp.float32
    assert np.dot(half, expected) > 0.95 * np.linalg.norm(half) * np.linalg.norm(expected)


def test_a_size_has_its_rotary_base_unless_another_is_given():
    recipe = decoder_recipe_named("bitnet_b158")
    assert decoder_config(recipe, "tiny", 9).rope_theta == 10_000
    assert decoder_config(recipe, "2b", 9).rope_theta == 500_000
    given = decoder_config(recipe, "2b", 9, rope_theta=1e6)
    assert given.rope_theta == 1e6 and decoder_recipes.architecture(given)["rope_theta"] == 1e6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decoder_recipe_named("bitnet_b2"), "unknown recipe 'bitnet_b2': did you mean"),
        (lambda: decoder_recipe_named("bitnet_b1", gate="gelu"), "unknown gate 'gelu'"),
        (lambda: decoder_recipe_named("bitnet_b1", norm="layer"), "unknown place of norms"),
        (lambda: decoder_recipe_named("bitnet_b1", groups=0), "groups is 0"),
        (
            lambda: decoder_config(decoder_recipe_named("bitnet_b1", groups=3), "tiny", 9),
            "2 kv_heads are no multiple of the groups, 3",
        ),
        (lambda: decoder_config(decoder_recipe_named("bitnet_fp"), "base", 9), "unknown size"),
        (
            lambda: sharding.check_model(
                config_of(decoder_recipe_named("bitnet_b1", groups=2)), sharding.make_mesh(1, 4)
            ),
            "tensor 4 does not divide the model's groups 2",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
