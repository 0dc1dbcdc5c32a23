"""An update cut into micro-batches, over devices, with a teacher; losses by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bipft_jax.models.bert import (
    SEQUENCE_INPUTS,
    BertForPreTraining,
    BertForSequenceClassification,
    PretrainingOutput,
)
from bipft_jax.models.parameters import is_scale
from bipft_jax.models.recipes import BertConfig, recipe_named
from bipft_jax.objectives.classification import classification
from bipft_jax.objectives.distillation import Targets, distillation_loss, make_teacher
from bipft_jax.objectives.losses import (
    Counts,
    classification_counts,
    classification_loss,
    pretraining_loss,
)
from bipft_jax.objectives.mlm_nsp import MLM_NSP
from bipft_jax.objectives.task_distillation import TaskTeacher, bit_distillation
from bipft_jax.training import sharding
from bipft_jax.training.learner import Learner
from bipft_jax.training.optimizer import adamw
from bipft_jax.training.state import abstract_state, calibrate, initial_params, new_state
from bipft_jax.training.step import accumulated_gradients, update

LENGTH, PREDICTIONS, VOCAB = 12, 3, 17


def config_of(recipe, **overrides):
    sizes = dict(vocab_size=VOCAB, layers=2, hidden=16, heads=2, intermediate=32, max_positions=16)
    return BertConfig(recipe_named(recipe), **{**sizes, "dropout": 0.0, **overrides})


def batch_of(sequences, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, LENGTH + 1, sequences)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    # Micro-batches with different numbers of masked tokens: a mean of means would be wrong.
    weights = (np.arange(PREDICTIONS) < rng.integers(1, PREDICTIONS + 1, sequences)[:, None]) * 1.0
    return {
        "input_ids": rng.integers(1, VOCAB, (sequences, LENGTH)).astype(np.int32) * mask,
        "token_type_ids": (np.arange(LENGTH) > 4).astype(np.int32) * mask,
        "attention_mask": mask,
        "mlm_positions": np.sort(rng.integers(0, 6, (sequences, PREDICTIONS))).astype(np.int32),
        "mlm_ids": rng.integers(1, VOCAB, (sequences, PREDICTIONS)).astype(np.int32),
        "mlm_weights": weights.astype(np.float32),
        "nsp_labels": rng.integers(0, 2, sequences).astype(np.int32),
    }


def one_update(recipe, batch, *, accumulation=1, devices=1, with_teacher=False):
    """The gradient of an update, read off the parameters that plain SGD makes with rate -1."""
    model = BertForPreTraining(config_of(recipe))
    inputs = MLM_NSP.model_inputs(batch)
    params = initial_params(model, jax.random.key(3), *inputs)
    params = jax.tree.map(
        lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    params = calibrate(model, params, *inputs)
    teacher, teacher_params = None, None
    if with_teacher:
        fp = config_of("fp")
        theirs = initial_params(BertForPreTraining(fp), jax.random.key(5), *inputs)
        teacher, teacher_params = make_teacher(
            fp, theirs, model.config, dropout=False, mlm_weight=0.5
        )
    optimizer = optax.sgd(-1.0)
    step = update(MLM_NSP, model, optimizer, accumulation=accumulation, teacher=teacher)
    step = jax.jit(step, static_argnums=4)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    state = sharding.put(mesh, new_state(params, optimizer))
    teacher_params = sharding.put(mesh, teacher_params)
    state, metrics = step(state, teacher_params, 0, sharding.put_batch(mesh, batch), True)
    host = jax.device_get((state.params, params))
    gradient = jax.tree.map(lambda new, old: new - old, *host)
    return gradient, jax.device_get(metrics)


def assert_close(got, expected):
    def check(path, a, b):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 2e-6, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, got, expected)


@pytest.mark.parametrize("recipe", ["fp", "bipft_b"])
def test_four_micro_batches_of_eight_are_one_batch_of_32(recipe):
    batch = batch_of(32)
    whole, metrics = one_update(recipe, batch, with_teacher=True)
    cut, cut_metrics = one_update(recipe, batch, accumulation=4, with_teacher=True)
    assert_close(cut, whole)
    assert metrics.keys() == cut_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(cut_metrics[name], value, rtol=1e-4, err_msg=name)
    if recipe == "bipft_b":
        scales = [
            value
            for path, value in jax.tree_util.tree_leaves_with_path(whole)
            if is_scale(path[-1].key)
        ]
        # Far above the tolerance: without its correction a scale's gradient would be off by half.
        assert len(scales) == 11 and sum(np.abs(value).max() > 2e-5 for value in scales) >= 8


def test_latent_weights_narrower_than_float32_are_refused():
    model, batch = BertForPreTraining(config_of("bipft_a")), batch_of(2)
    params = MLM_NSP.abstract_params(model.config)
    params["mlm_bias"] = jax.ShapeDtypeStruct(params["mlm_bias"].shape, jnp.bfloat16)
    optimizer = optax.sgd(1.0)
    step = jax.jit(update(MLM_NSP, model, optimizer), static_argnums=4)
    with pytest.raises(ValueError, match=r"must be float32, but mlm_bias \(bfloat16\): small upd"):
        step.trace(abstract_state(params, optimizer), None, 0, batch, True)


def test_a_binary_model_learns_a_batch_by_heart():
    batch = batch_of(8)
    model = BertForPreTraining(config_of("bipft_b"))
    inputs = MLM_NSP.model_inputs(batch)
    params = calibrate(model, initial_params(model, jax.random.key(0), *inputs), *inputs)
    optimizer = adamw(3e-3, weight_decay=0.0, clip_norm=1.0)
    step = jax.jit(update(MLM_NSP, model, optimizer), static_argnums=4)
    state = new_state(params, optimizer)
    losses = []
    for _ in range(150):
        state, metrics = step(state, None, 0, batch, True)
        losses.append([float(metrics["mlm_loss"]), float(metrics["nsp_loss"])])
    # It begins at guessing among 17 tokens and two labels.
    np.testing.assert_allclose(losses[0], [np.log(VOCAB), np.log(2)], atol=0.3)
    assert losses[-1][0] < 0.5 and losses[-1][1] < 0.1


def test_eight_devices_make_the_update_of_one():
    batch = batch_of(16)
    one, _ = one_update("bipft_b", batch)
    eight, _ = one_update("bipft_b", batch, devices=8, accumulation=2)
    assert_close(eight, one)


@pytest.mark.parametrize(("recipe", "labels"), [("bipft_b", "classes"), ("fp", "scores")])
@pytest.mark.parametrize("taught", [False, True])
def test_finetuning_in_micro_batches_over_devices_is_one_batch_on_one(recipe, labels, taught):
    batch = {name: batch_of(16)[name] for name in SEQUENCE_INPUTS}
    rng = np.random.default_rng(1)
    classes = 3 if labels == "classes" else 1
    batch["labels"] = (
        rng.integers(0, 3, 16).astype(np.int32)
        if labels == "classes"
        else rng.normal(size=16).astype(np.float32)
    )
    batch["weights"] = np.ones(16, np.float32)
    objective, optimizer = classification(classes), optax.sgd(-1.0)
    model = objective.model(config_of(recipe))
    params = initial_params(model, jax.random.key(3), *objective.model_inputs(batch))
    params = jax.tree.map(
        lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    params = calibrate(model, params, *objective.model_inputs(batch))
    theirs = teacher = None
    if taught:
        fp = objective.model(config_of("fp"))
        theirs = initial_params(fp, jax.random.key(5), *objective.model_inputs(batch))
        teacher = TaskTeacher(fp, bit_distillation, dropout=False)

    def gradient(devices, accumulation, fsdp=1):
        mesh = sharding.make_mesh(fsdp, devices=jax.devices()[:devices])
        learner = Learner(objective, model, optimizer, None, mesh, accumulation, teacher)
        state = sharding.put(mesh, new_state(params, optimizer))
        with sharding.on(mesh):
            rows, seed = sharding.put_batch(mesh, batch), sharding.put(mesh, np.int32(0))
            state, metrics = learner.update(state, sharding.put(mesh, theirs), seed, rows, True)
        new, metrics = jax.device_get((state.params, metrics))
        return jax.tree.map(lambda a, b: a - np.asarray(b), new, params), metrics

    whole, metrics = gradient(1, 1)
    cut, cut_metrics = gradient(4, 4, fsdp=2)
    assert_close(cut, whole)
    assert ("hidden_loss" in metrics) == taught
    for name, value in metrics.items():
        np.testing.assert_allclose(cut_metrics[name], value, rtol=1e-4, err_msg=name)


def loss_by_step(step, state, *arguments):
    """The losses of updates 0, 0 again and 1 on one batch, from the same parameters."""
    states = (state, state, state.replace(step=state.step + 1))
    return [float(step(each, *arguments)[1]["loss"]) for each in states]


def test_dropout_is_a_function_of_the_update_and_not_shared_with_the_teacher():
    batch, config = batch_of(4), config_of("fp", dropout=0.5)
    model = BertForPreTraining(config)
    params = initial_params(model, jax.random.key(3), *MLM_NSP.model_inputs(batch))
    teacher, theirs = make_teacher(config, params, config, dropout=True, mlm_weight=1.0)
    optimizer = optax.sgd(0.0)
    step = jax.jit(update(MLM_NSP, model, optimizer, teacher=teacher), static_argnums=4)
    state = new_state(params, optimizer)
    first, again, second = loss_by_step(step, state, theirs, 0, batch, True)
    assert first == again != second
    # The teacher is the student: with the same draws their hidden states would be the same.
    assert step(state, theirs, 0, batch, True)[1]["hidden_loss"] > 0.1


def test_dropout_of_finetuning_is_a_function_of_the_update():
    objective = classification(2)
    batch = {name: batch_of(4)[name] for name in objective.inputs}
    batch |= {"labels": np.array([0, 1, 1, 0]), "weights": np.ones(4, np.float32)}
    model = BertForSequenceClassification(config_of("fp", dropout=0.5), 2)
    params = initial_params(model, jax.random.key(3), *objective.model_inputs(batch))
    optimizer = optax.sgd(0.0)
    step = jax.jit(update(objective, model, optimizer), static_argnums=4)
    first, again, second = loss_by_step(step, new_state(params, optimizer), None, 0, batch, True)
    assert first == again != second


def test_micro_batches_have_draws_of_their_own():
    def loss_of(params, micro, key):
        draw = jax.random.uniform(key)
        return params["w"] * draw, {"draw": draw, "square": draw**2}

    batch = {"x": jnp.zeros((2, 1))}
    params = {"w": jnp.ones(())}
    _, sums = accumulated_gradients(loss_of, params, batch, jax.random.key(0), 2)
    assert sums["square"] / 2 - (sums["draw"] / 2) ** 2 > 1e-3  # the variance of two draws


def test_pretraining_loss_counts_masked_tokens_only():
    logits = np.zeros((2, 2, 4), np.float32)
    logits[0, 0, 1] = np.log(3.0)  # p(1) = 3/6
    output = PretrainingOutput(
        jnp.asarray(logits), jnp.asarray([[0.0, 0.0], [np.log(4.0), 0.0]]), None
    )
    batch = {
        "mlm_ids": jnp.asarray([[1, 2], [3, 0]]),
        "mlm_weights": jnp.asarray([[1.0, 0.0], [1.0, 0.0]]),
        "nsp_labels": jnp.asarray([1, 0]),
    }
    loss, metrics = pretraining_loss(output, batch, Counts(jnp.float32(2), jnp.float32(2)))
    mlm = (np.log(2) + np.log(4)) / 2
    nsp = (np.log(2) + np.log(5 / 4)) / 2
    np.testing.assert_allclose(metrics["mlm_loss"], mlm, rtol=1e-6)
    np.testing.assert_allclose(metrics["nsp_loss"], nsp, rtol=1e-6)
    np.testing.assert_allclose(loss, mlm + nsp, rtol=1e-6)
    assert metrics["mlm_accuracy"] == 0.5 and metrics["nsp_accuracy"] == 0.5


def test_distillation_halves_the_cross_entropy_and_averages_over_hidden_states():
    ours = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4, 5)), jnp.float32)
    theirs = ours.at[1].add(2.0)  # one of three hidden states is off by 2 everywhere
    output = PretrainingOutput(None, jnp.zeros((2, 2)), ours)
    counts = Counts(jnp.float32(2), jnp.float32(1))
    targets = Targets(theirs, jnp.asarray([[9.0, 1.0], [0.0, 3.0]]), None)
    loss, metrics = distillation_loss(output, targets, {}, counts)
    np.testing.assert_allclose(metrics["hidden_loss"], 4 / 3, rtol=1e-6)
    # A uniform student has cross entropy log 2 with any target; averaged over 2 classes: half.
    np.testing.assert_allclose(metrics["nsp_soft_loss"], np.log(2) / 2, rtol=1e-6)
    np.testing.assert_allclose(loss, 4 / 3 + np.log(2) / 2, rtol=1e-6)
    _, without_nsp = distillation_loss(output, Targets(theirs, None, None), {}, counts)
    assert list(without_nsp) == ["hidden_loss"]


def test_distributions_of_masked_tokens_are_imitated_where_there_is_one():
    states = jnp.zeros((1, 1, 2, 3))
    ours = jnp.log(jnp.asarray([[[0.5, 0.5], [0.9, 0.1]]]))
    theirs = jnp.log(jnp.asarray([[[0.25, 0.75], [0.5, 0.5]]]))
    output = PretrainingOutput(ours, jnp.zeros((1, 2)), states)
    batch = {"mlm_weights": jnp.asarray([[1.0, 0.0]])}  # the second place is padding
    counts = Counts(jnp.float32(1), jnp.float32(2))  # another micro-batch has a masked token, too
    loss, metrics = distillation_loss(output, Targets(states, None, theirs), batch, counts, 3.0)
    divergence = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)  # of ours from theirs
    np.testing.assert_allclose(metrics["mlm_soft_loss"], divergence / 2, rtol=1e-5)
    np.testing.assert_allclose(loss, 3 * divergence / 2, rtol=1e-5)


def test_a_teacher_of_another_width_is_refused_and_one_without_nsp_head_is_noticed():
    student, teacher_config = config_of("bipft_b"), config_of("fp")
    with pytest.raises(ValueError, match="the teacher has hidden 32, the student 16"):
        make_teacher(dataclasses.replace(teacher_config, hidden=32), {}, student, dropout=True)
    teacher, used = make_teacher(teacher_config, {"bert": {}, "mlm_bias": 0}, student, dropout=True)
    assert not teacher.has_nsp and list(used) == ["bert"]
    with pytest.raises(ValueError, match="teacher has no mlm_dense.* leave mlm_distillation at 0"):
        make_teacher(teacher_config, {"bert": {}}, student, dropout=True, mlm_weight=1.0)


def test_regression_and_padded_rows():
    batch = {"labels": jnp.asarray([1.0, 3.0, 9.0]), "weights": jnp.asarray([1.0, 1.0, 0.0])}
    logits = jnp.asarray([[2.0], [1.0], [0.0]])
    np.testing.assert_allclose(
        classification_loss(logits, batch, classification_counts(batch)), (1 + 4) / 2
    )


def test_cross_entropy_is_the_mean_over_real_rows():
    logits = jnp.log(jnp.asarray([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]))
    batch = {"labels": jnp.asarray([0, 0, 1]), "weights": jnp.asarray([1.0, 1.0, 0.0])}
    expected = -(np.log(0.5) + np.log(0.2)) / 2
    np.testing.assert_allclose(
        classification_loss(logits, batch, classification_counts(batch)), expected, rtol=1e-6
    )
