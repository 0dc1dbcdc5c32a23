"""The packed model in NumPy against the JAX model: layer by layer, and from tokens to logits."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from bipft_runtime.numpy_encoder import NumpyEncoder, _gelu, erf, unpacked

from bipft_jax.interop.pack import packed
from bipft_jax.models.activations import gelu
from tests.runtime.packing import in_jax, inputs, packed_source, random_source

RECIPES = [("bipft_b", 3), ("bit_w1a1", -1), ("bibert", -1)]


@pytest.mark.parametrize(("recipe", "rank"), RECIPES)
def test_every_layer_has_the_hidden_states_of_the_jax_model(recipe, rank):
    source, model = packed_source(recipe, rank=rank, seed=3)
    encoder = NumpyEncoder(model)
    ids, segments, _ = (x[0] for x in inputs(np.random.default_rng(1), 1, 24))
    logits, states, hidden, pooled = in_jax(source, ids, segments)
    np.testing.assert_allclose(encoder.embedded(ids, segments), states[0], atol=2e-6)
    for number in range(len(states) - 1):
        np.testing.assert_allclose(
            encoder.layer(number, states[number]), states[number + 1], atol=2e-5
        )
    ours, ours_pooled = encoder(ids, segments)
    np.testing.assert_allclose(ours, hidden, atol=2e-5)
    np.testing.assert_allclose(ours_pooled, pooled, atol=2e-5)
    tensors = model.tensors
    np.testing.assert_allclose(
        tensors["classifier.kernel"] @ ours_pooled + tensors["classifier.bias"], logits, atol=2e-5
    )


def test_zero_codes_of_weights_and_activations_are_exact():
    """Without biases and shifts many inputs are 0; a kernel around an exact mean has zeros."""
    source = random_source("bipft_a", seed=5)
    bert = source.params["bert"]
    layers = bert["encoder"]["layers"]
    for module in (*layers["attention"].values(), *layers.values(), bert["pooler"]):
        for name in ("bias", "input_shift"):
            if isinstance(module, dict) and name in module and "kernel" in module:
                module[name] = np.zeros_like(module[name])
    kernel = layers["ffn_input"]["kernel"]
    signs = np.where(np.arange(kernel.size).reshape(kernel.shape) % 2, 0.0625, -0.0625)
    signs[:, 7, 10:14] = signs[1, 100, 2:6] = 0
    layers["ffn_input"]["kernel"] = signs.astype(np.float32)
    model = packed(source)
    assert model.tensors["layers.ffn_input.zeros"].size == 12
    ids, segments, _ = (x[0] for x in inputs(np.random.default_rng(2), 1, 24))
    _, states, _, _ = in_jax(source, ids, segments)
    for number in range(len(states) - 1):
        layer = NumpyEncoder(model).layer(number, states[number])
        np.testing.assert_allclose(layer, states[number + 1], atol=2e-5)


def test_bits_are_little_endian_and_zeros_are_listed():
    bits = np.array([[0b00000101, 0b10000000]], np.uint8)
    codes = unpacked(bits, np.array([1, 9]))
    assert codes.tolist() == [[1, 0, 1, -1, -1, -1, -1, -1, -1, 0, -1, -1, -1, -1, -1, 1]]


def test_erf():
    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    exact = np.array([math.erf(value) for value in x.tolist()])
    assert np.abs(erf(x) - exact).max() < 4e-7


def test_the_sign_of_gelu_is_that_of_the_jax_model():
    """It is a code where inputs have no shift; XLA's own border of underflow is blurred."""
    x = np.linspace(-9, 3, 12001, dtype=np.float32)
    x = x[(x < -5.45) | (x > -5.15)]
    np.testing.assert_array_equal(np.sign(_gelu(x)), np.sign(np.asarray(gelu(jnp.asarray(x)))))
