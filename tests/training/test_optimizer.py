"""Optimisers and schedule against values by hand, and against SPEC 5 written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bipft_jax.training.optimizer import (
    adamw,
    bert_adam,
    first_stage_decay,
    linear_schedule,
    two_stage_schedule,
)
from bipft_jax.training.state import new_state
from bipft_jax.training.step import next_state


@pytest.mark.parametrize(("clip_norm", "factor"), [(0.0, 1.0), (2.0, 0.2), (20.0, 1.0)])
def test_clipping_bounds_the_global_norm(clip_norm, factor):
    """Adam forgets a constant factor of all gradients, so look at its first moment."""
    gradients = {"bias": jnp.asarray([6.0]), "scale": jnp.asarray([0.0, 8.0])}  # norm 10
    optimizer = adamw(0.1, weight_decay=0.0, clip_norm=clip_norm)
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
    moments = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moments["bias"], 0.1 * factor * 6.0, rtol=1e-5)
    np.testing.assert_allclose(moments["scale"], [0.0, 0.1 * factor * 8.0], rtol=1e-5)


def test_schedule_warms_up_and_decays_to_zero():
    schedule = linear_schedule(2.0, warmup_updates=4, num_updates=12)
    rates = [float(schedule(t)) for t in (0, 1, 4, 8, 12)]
    np.testing.assert_allclose(rates, [0.0, 0.5, 2.0, 1.0, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="warmup_updates 12"):
        linear_schedule(1.0, 12, 12)


def test_weight_decay_spares_biases_norms_and_scales():
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "input_scale": jnp.ones(())}}
    params |= {"norm": {"scale": jnp.ones(2)}, "words": {"embedding": jnp.ones((3, 2))}}
    optimizer = adamw(0.1, weight_decay=0.5, clip_norm=0.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    decayed = {
        jax.tree_util.keystr(path) for path, u in jax.tree_util.tree_leaves_with_path(updates)
        if np.any(u)
    }  # fmt: skip
    assert decayed == {"['a']['kernel']", "['words']['embedding']"}
    with pytest.raises(ValueError, match="gate/weight is in no list .* as decayed or not decayed"):
        optimizer.init({"gate": {"weight": jnp.ones((2, 2))}})


def test_the_second_stage_has_its_own_peak_and_no_weight_decay():
    schedule = two_stage_schedule(3.0, 2.0, warmup_updates=2, num_updates=8)
    rates = [float(schedule(t)) for t in (0, 1, 2, 3, 4, 6, 8)]
    np.testing.assert_allclose(rates, [0, 1.5, 3, 2.5, 4 / 3, 2 / 3, 0], rtol=1e-6)
    decay = first_stage_decay(0.5, num_updates=3)
    assert [float(decay(t)) for t in range(3)] == [0.5, 0, 0]
    optimizer = adamw(0.1, weight_decay=decay, clip_norm=0.0)
    params, zero = {"kernel": jnp.ones((1, 1))}, {"kernel": jnp.zeros((1, 1))}
    state = optimizer.init(params)
    for expected in (-0.05, 0.0):
        updates, state = optimizer.update(zero, state, params)
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)


def test_a_skipped_update_counts_for_rate_and_decay():
    optimizer = adamw(
        linear_schedule(1.0, 0, 4), weight_decay=first_stage_decay(1.0, 4), clip_norm=0.0
    )
    params = {"kernel": jnp.ones((1, 1))}
    bad = {"kernel": jnp.full((1, 1), jnp.nan)}, {"loss": jnp.ones(())}
    state = new_state(params, optimizer)
    for _ in range(2):
        state, metrics = next_state(optimizer, state, *bad)
        assert metrics["skipped"]
    zero = {"kernel": jnp.zeros((1, 1))}, {"loss": jnp.ones(())}
    state, _ = next_state(optimizer, state, *zero)  # the third update is in the second stage
    assert state.params["kernel"] == 1


def bert_adam_in_float64(w, gradients, rates, decay):
    """SPEC 5 for one tensor."""
    w, m, v = np.float64(w), 0.0, 0.0
    for g, rate in zip(np.float64(gradients), rates, strict=True):
        g = g * min(1.0, 1.0 / (np.linalg.norm(g) + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * (m / (np.sqrt(v) + 1e-6) + decay * w)
    return w


def test_bert_adam_treats_every_layer_as_a_tensor_and_scales_by_their_own_rate():
    rng = np.random.default_rng(0)
    steps, total, warmup = 7, 10, 2.5
    shapes = {"kernel": (2, 3, 4), "bias": (2, 4), "input_scale": (2,)}
    start = {"layers": {name: rng.normal(size=shape) for name, shape in shapes.items()}}
    start |= {"head": {"kernel": rng.normal(size=(3, 2)), "input_scale": rng.normal(size=())}}
    # Some far above the norm that is clipped, some far below.
    gradients = [
        jax.tree.map(lambda x: rng.normal(size=x.shape) * rng.choice([0.1, 10.0]), start)
        for _ in range(steps)
    ]
    optimizer = bert_adam(
        linear_schedule(1e-2, warmup, total),
        scale_schedule=linear_schedule(1e-3, warmup, total),
        weight_decay=0.01,
    )
    params = jax.tree.map(jnp.float32, start)
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, g), state, params)
        params = optax.apply_updates(params, updates)

    shape = [min(t / warmup, (total - t) / (total - warmup)) for t in range(steps)]
    for group, leaves in start.items():
        for name, value in leaves.items():
            rates = np.multiply(shape, 1e-3 if name == "input_scale" else 1e-2)
            decay = 0.01 if name == "kernel" else 0.0
            for at in range(2) if group == "layers" else [...]:
                expected = bert_adam_in_float64(
                    value[at], [g[group][name][at] for g in gradients], rates, decay
                )
                np.testing.assert_allclose(params[group][name][at], expected, atol=2e-6)
