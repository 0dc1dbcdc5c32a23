"""A mesh of any shape makes the update of one device; codes, not weights, are gathered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bipft_jax.models.bert import BertForPreTraining
from bipft_jax.models.parameters import named_leaves
from bipft_jax.models.recipes import BertConfig, bert_config, recipe_named
from bipft_jax.objectives.mlm_nsp import MLM_NSP
from bipft_jax.training import sharding
from bipft_jax.training.optimizer import adamw
from bipft_jax.training.state import (
    abstract_state,
    calibrate,
    initial_params,
    initialization,
    new_state,
)
from bipft_jax.training.step import update
from tests.objectives import abstract_params

BATCH, LENGTH, PREDICTIONS, VOCAB = 16, 6, 2, 24
# Recipe and (fsdp, tensor) on 8 devices; `data` gets the rest.
CASES = [
    (recipe, fsdp, tensor)
    for recipe in ("fp", "bipft_a", "bipft_b")
    for fsdp in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    if fsdp * tensor <= 8
]
QUICK = {("fp", 2, 2), ("bipft_a", 2, 2), *(("bipft_b", *m) for m in ((1, 1), (2, 2), (8, 1)))}


def model_of(recipe, dtype="float64"):
    sizes = dict(vocab_size=VOCAB, layers=2, hidden=32, heads=8, intermediate=64, max_positions=8)
    config = BertConfig(recipe_named(recipe), **sizes, dropout=0.0, dtype=dtype)
    return BertForPreTraining(config)


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    mask = (np.arange(LENGTH) < rng.integers(4, LENGTH + 1, BATCH)[:, None]).astype(np.int32)
    return {
        "input_ids": rng.integers(1, VOCAB, (BATCH, LENGTH)).astype(np.int32) * mask,
        "token_type_ids": (np.arange(LENGTH) > 2).astype(np.int32) * mask,
        "attention_mask": mask,
        "mlm_positions": np.sort(rng.integers(0, 4, (BATCH, PREDICTIONS))).astype(np.int32),
        "mlm_ids": rng.integers(1, VOCAB, (BATCH, PREDICTIONS)).astype(np.int32),
        "mlm_weights": rng.integers(0, 2, (BATCH, PREDICTIONS)).astype(np.float32),
        "nsp_labels": rng.integers(0, 2, BATCH).astype(np.int32),
    }


@functools.cache
def start(recipe):
    """Parameters away from their symmetric start, calibrated on one device."""
    model, inputs = model_of(recipe), MLM_NSP.model_inputs(batch_of())
    params = initial_params(model, jax.random.key(3), *inputs)
    noisy = jax.tree.map(
        lambda p: p.astype(jnp.float64) + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape),
        params,
    )
    return jax.device_get(calibrate(model, noisy, *inputs))


def outcome(recipe, devices, fsdp=1, tensor=1):
    """Three AdamW updates: losses and gradient (Adam's first moment) of the first, and the
    parameters in the end."""
    mesh = sharding.make_mesh(fsdp, tensor, jax.devices()[:devices])
    optimizer = adamw(1e-3, weight_decay=0.01, clip_norm=1.0, eps=1e-6)
    state = sharding.put(mesh, new_state(start(recipe), optimizer))
    batch = sharding.put_batch(mesh, batch_of())
    step = jax.jit(
        update(MLM_NSP, model_of(recipe), optimizer),
        static_argnums=4,
        out_shardings=(sharding.placements(mesh, state), sharding.replicated(mesh)),
    )
    with sharding.on(mesh):
        state, metrics = step(state, None, 0, batch, True)
        gradient = jax.device_get(optax.tree.get(state.opt_state, "mu"))
        for _ in range(2):
            state, _ = step(state, None, 0, batch, True)
    losses = metrics["mlm_loss"], metrics["nsp_loss"]
    return jax.device_get((losses, gradient, state.params))


@functools.cache
def on_one_device(recipe):
    return outcome(recipe, 1)


@pytest.mark.parametrize(
    ("recipe", "fsdp", "tensor"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.long) for case in CASES],
)
def test_every_mesh_makes_the_updates_of_one_device(recipe, fsdp, tensor):
    with jax.enable_x64(True):
        expected, found = on_one_device(recipe), outcome(recipe, 8, fsdp, tensor)

    def check(path, a, b):
        assert a.dtype == np.float64
        # Some gradients are zero but for rounding.
        atol = 1e-9 * np.abs(b).max() + 1e-15
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, found, expected)


def test_weights_and_their_moments_are_split_and_the_rest_is_whole():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    optimizer = adamw(1e-3, weight_decay=0.01, clip_norm=1.0)
    config = bert_config(recipe_named("bipft_b"), "mini", 30522)
    state = sharding.placed(mesh, abstract_state(abstract_params(config, 0), optimizer))
    moments = optax.tree.get(state.opt_state, "mu")
    places = {
        path.removeprefix("bert/").removeprefix("encoder/"): tuple(leaf.sharding.spec)
        for path, leaf in named_leaves(moments).items()
    }
    assert {path: spec for path, spec in places.items() if any(spec)} == {
        "words/embedding": ("tensor", None),
        "layers/attention/query/kernel": (None, "fsdp", "tensor"),
        "layers/attention/key/kernel": (None, "fsdp", "tensor"),
        "layers/attention/value/kernel": (None, "fsdp", "tensor"),
        "layers/attention_output/kernel": (None, "tensor", "fsdp"),
        "layers/ffn_input/kernel": (None, "fsdp", "tensor"),
        "layers/ffn_output/kernel": (None, "tensor", "fsdp"),
        "pooler/kernel": ("fsdp", None),
        "mlm_dense/kernel": ("fsdp", None),
    }
    for of_moment, of_parameter in zip(jax.tree.leaves(moments), jax.tree.leaves(state.params)):
        assert of_moment.sharding == of_parameter.sharding
    # Nothing large is whole on every device.
    sizes = [leaf.size for leaf in jax.tree.leaves(moments) if not any(leaf.sharding.spec)]
    assert sum(sizes) < 0.02 * sum(leaf.size for leaf in jax.tree.leaves(moments))
    # 30522 rows are no multiple of 4: they stay whole.
    fours = sharding.placements(sharding.make_mesh(tensor=4), state.params)
    assert not any(fours["bert"]["words"]["embedding"].spec)


def test_a_weight_that_nobody_has_placed_is_refused():
    mesh = sharding.make_mesh(fsdp=2)
    known = {"nsp": {"kernel": jnp.ones((2, 2))}, "gate": {"bias": jnp.ones(2)}}
    assert not any(any(place.spec) for place in jax.tree.leaves(sharding.placements(mesh, known)))
    with pytest.raises(ValueError, match="mu/gate/kernel is in no list of models/axes.py"):
        sharding.placements(mesh, {"mu": {"gate": {"kernel": jnp.ones((2, 2))}}})


def test_a_device_holds_its_share_of_a_batch_whether_a_process_has_all_rows_or_its_own():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    rows = np.arange(24).reshape(8, 3)
    for batch in (
        sharding.put_batch(mesh, {"x": rows}),
        sharding.put_batch(mesh, {"x": rows[sharding.process_rows(mesh, 8)]}, 8),
    ):
        np.testing.assert_array_equal(batch["x"], rows)
        assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}


def test_random_parameters_depend_on_the_key_alone():
    """Not on the mesh or the batch they are made with, bit for bit."""
    model, key = model_of("bipft_b", "float32"), jax.random.key(3)
    inputs = MLM_NSP.model_inputs(batch_of())
    expected = initial_params(model, key, *inputs)
    for fsdp, tensor in ((8, 1), (2, 4)):
        mesh = sharding.make_mesh(fsdp, tensor)
        places = sharding.placements(mesh, expected)
        with sharding.on(mesh):
            made = initial_params(model, key, *[x[:8, :1] for x in inputs], places=places)
        jax.tree.map(np.testing.assert_array_equal, made, expected)
        assert jax.tree.map(lambda leaf: leaf.sharding, made) == places


def test_making_parameters_does_not_compute_the_batch():
    """Neither what it returns nor its memory grows with the batch it is given."""
    model, key = model_of("bipft_b", "float32"), jax.random.key(0)

    def program(rows):
        inputs = [
            jnp.zeros((rows, *batch_of()[name].shape[1:]), jnp.int32) for name in MLM_NSP.inputs
        ]
        return initialization(model).lower(key, *inputs)

    small, large = program(8), program(512)
    expected = named_leaves(abstract_params(model.config, 0))
    assert named_leaves(small.out_info).keys() == expected.keys()
    assert small.out_info == large.out_info
    memory = [lowered.compile().memory_analysis() for lowered in (small, large)]
    assert memory[0].temp_size_in_bytes == memory[1].temp_size_in_bytes


@dataclasses.dataclass(frozen=True)
class ChipOfASlice:
    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_weights_are_split_within_a_slice_not_across():
    mesh = sharding.make_mesh(fsdp=2, devices=[ChipOfASlice(i, i % 2) for i in range(8)])
    slices = [[chip.slice_index for chip in row[:, 0]] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(ValueError, match="fsdp 8 x tensor 1 does not divide 4 devices of each of"):
        sharding.make_mesh(fsdp=8, devices=list(mesh.devices.flat))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sharding.make_mesh(fsdp=3),
            "fsdp 3 x tensor 1 does not divide 8 devices: their product must be one of 1, 2, 4, 8",
        ),
        (lambda: sharding.make_mesh(tensor=0), "tensor 0"),
        (
            lambda: sharding.check_batch_size(12, 1, sharding.make_mesh(fsdp=2, tensor=1)),
            r"batch_size 12 is not a multiple of accumulation 1 x 8 \(data 4 x fsdp 2\)",
        ),
        (
            lambda: sharding.check_model(
                bert_config(recipe_named("fp"), "tiny", 10), sharding.make_mesh(tensor=8)
            ),
            "tensor 8 does not divide the model's heads 2",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_does_not(call, message):
    with pytest.raises(ValueError, match=message):
        call()
