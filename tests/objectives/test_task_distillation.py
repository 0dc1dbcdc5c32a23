"""Losses by hand and against float64 loops; what a student sees of itself and of its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipft_jax.models.bert import BertForSequenceClassification
from bipft_jax.models.recipes import BertConfig, recipe_named
from bipft_jax.objectives.task_distillation import (
    Behaviour,
    behaviour,
    bit_distillation,
    bit_distillation_of_scores,
    direction_matching,
    sum_of_distances,
)
from bipft_jax.training.state import calibrate, initial_params

BATCH = {
    "input_ids": jnp.asarray([[2, 5, 6, 3], [2, 7, 3, 0]]),
    "token_type_ids": jnp.zeros((2, 4), jnp.int32),
    "attention_mask": jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


def random_behaviour(seed, layers, classes=3):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    relations = {name: normal(layers, 2, 2, 4, 4) for name in ("query", "key", "value")}
    return Behaviour(normal(2, classes), normal(layers + 1, 2, 4, 6), relations)


def distance_in_float64(x, y):
    x, y = np.float64(x), np.float64(y)
    return np.linalg.norm(x / np.linalg.norm(x) - y / np.linalg.norm(y))


def test_bit_sums_over_layers_and_averages_over_classes():
    student, teacher = random_behaviour(0, 2), random_behaviour(1, 2)
    teacher = teacher._replace(hidden_states=student.hidden_states.at[1].add(3.0))
    student = student._replace(logits=jnp.zeros((2, 3)))
    terms = bit_distillation(student, teacher, None)
    np.testing.assert_allclose(terms["hidden_loss"], 9.0, rtol=1e-6)  # not divided by 3
    np.testing.assert_allclose(terms["soft_loss"], np.log(3) / 3, rtol=1e-6)
    one = bit_distillation(random_behaviour(0, 1, 1), random_behaviour(1, 1, 1), None)
    assert one["soft_loss"] == 0


def test_bits_alternative_for_scores_learns_the_teachers_score():
    student, teacher = random_behaviour(0, 2, 1), random_behaviour(1, 2, 1)
    student = student._replace(logits=jnp.asarray([[1.0], [2.0]]))
    teacher = teacher._replace(logits=jnp.asarray([[4.0], [1.5]]))
    terms = bit_distillation_of_scores(student, teacher, None)
    np.testing.assert_allclose(terms.pop("score_loss"), (9 + 0.25) / 2, rtol=1e-6)
    soft = bit_distillation(student, teacher, None)
    assert terms == {"hidden_loss": soft["hidden_loss"]}


def test_direction_matching_takes_every_second_layer_of_a_teacher_twice_as_deep():
    student, teacher = random_behaviour(0, 2), random_behaviour(1, 4)
    # What padding makes of a score counts as 0, in both.
    student.relations["key"] = student.relations["key"].at[0, 0, 0, 0, 0].set(-10000.0)
    teacher.relations["key"] = teacher.relations["key"].at[1, 1, 0, 0, 0].set(-100.0)
    teacher = teacher._replace(hidden_states=teacher.hidden_states[::2])
    terms = direction_matching(student, teacher, jnp.asarray([0, 2]))
    for name in ("query", "key", "value"):
        ours, theirs = np.array(student.relations[name]), np.array(teacher.relations[name])
        ours[ours <= -100], theirs[theirs <= -100] = 0, 0
        expected = sum(distance_in_float64(ours[i], theirs[2 * i + 1]) for i in range(2))
        np.testing.assert_allclose(terms[f"{name}_loss"], expected, rtol=1e-5)
    expected = sum(map(distance_in_float64, student.hidden_states, teacher.hidden_states))
    np.testing.assert_allclose(terms["hidden_loss"], expected, rtol=1e-5)
    log_p = np.float64(jax.nn.log_softmax(student.logits))
    soft = -np.mean(np.float64(jax.nn.softmax(teacher.logits)) * log_p)
    hard = -(log_p[0, 0] + log_p[1, 2]) / 2
    np.testing.assert_allclose(terms["task_loss"], soft + 0.5 * hard, rtol=1e-5)


def test_scores_are_matched_without_labels():
    student, teacher = random_behaviour(0, 1, 1), random_behaviour(1, 1, 1)
    terms = direction_matching(student, teacher, jnp.asarray([1.0, 2.0]))
    expected = np.mean(np.square(student.logits - teacher.logits))
    np.testing.assert_allclose(terms["task_loss"], expected, rtol=1e-6)


def test_equal_directions_have_no_distance_and_no_gradient():
    x = random_behaviour(0, 2).hidden_states
    value, gradient = jax.value_and_grad(sum_of_distances)(x, x)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("recipe", ["bibert", "bit_w1a2"])
def test_relations_are_those_of_the_real_valued_projections(recipe):
    # With a low-rank product beside each linear: it is a part of the projection.
    recipe_with_lora = recipe_named(recipe, lora_rank=1)
    config = BertConfig(recipe_with_lora, 11, 2, 8, 2, 16, max_positions=4, dropout=0.5)
    model = BertForSequenceClassification(config, 2)
    inputs = list(BATCH.values())
    params = calibrate(model, initial_params(model, jax.random.key(0), *inputs), *inputs)
    shown = behaviour(model, params, BATCH, None)
    output = model.apply({"params": params}, *inputs)
    np.testing.assert_array_equal(shown.logits, output.logits)
    assert shown.hidden_states.shape == (3, 2, 4, 8)
    for relation in shown.relations.values():
        assert relation.shape == (2, 2, 2, 4, 4)
        np.testing.assert_allclose(relation, relation.swapaxes(-1, -2), rtol=1e-6)
    dropped = behaviour(model, params, BATCH, jax.random.key(1))
    assert (dropped.hidden_states != shown.hidden_states).any()
    # Layer 0's values, from the embedding output as the layer's own linear makes them.
    layers = jax.device_get(params["bert"]["encoder"]["layers"])
    attention = jax.tree.map(lambda x: x[0], layers)["attention"]
    layer, lora = attention["value"], attention["value_lora"]
    x = np.float64(shown.hidden_states[0])
    kernel = np.float64(layer["kernel"])
    if recipe == "bibert":
        weight = np.sign(kernel - kernel.mean(0)) * np.abs(kernel).mean(0)
        values = np.sign(x) @ weight + layer["bias"]
    else:
        scale = float(layer["input_scale"])
        codes = np.clip(np.round((x + layer["input_shift"]) / scale), -2, 1)
        weight = np.sign(kernel - kernel.mean()) * np.abs(kernel).mean()
        values = scale * codes @ weight + layer["bias"]
    values = values + x @ np.float64(lora["down"]["kernel"]) @ lora["up"]["kernel"]
    heads = values.reshape(2, 4, 2, 4).transpose(0, 2, 1, 3)
    expected = heads @ heads.swapaxes(-1, -2) / 2
    np.testing.assert_allclose(shown.relations["value"][0], expected, atol=1e-6)
