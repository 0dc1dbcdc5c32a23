"""Flip ratios and scales as telemetry names them."""

import jax.numpy as jnp
import numpy as np
import pytest

from bipft_jax.quantization.quantizers import MeanBinarizer, TernaryMean
from bipft_jax.training.weight_statistics import binary_codes, flip_ratios, scales, zero_ratios


def params(first_layer, pooler):
    stacked = jnp.asarray([first_layer, [[-1.0, 1.0], [-1.0, 1.0]]])
    layers = {"query": {"kernel": stacked, "input_shift": jnp.zeros((2, 2))}}
    layers["query"]["input_scale"] = jnp.asarray([0.5, 0.25])
    layers["norm"] = {"scale": jnp.ones((2, 2))}
    head = {"kernel": jnp.asarray(pooler), "input_shift": jnp.zeros(2), "input_scale": jnp.ones(())}
    classifier = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}  # full precision
    return {"bert": {"encoder": {"layers": layers}, "pooler": head}, "classifier": classifier}


def test_flips_are_counted_around_each_layers_own_mean():
    before = params([[-1.0, 1.0], [-1.0, 1.0]], [[-2.0, 2.0]])
    # Adding a constant flips nothing: a layer is binarised around its own mean.
    after = params([[4.0, 6.0], [6.0, 4.0]], [[-2.0, 2.0]])
    quantizer = MeanBinarizer()
    got = flip_ratios(binary_codes(before, quantizer), binary_codes(after, quantizer))
    expected = {"flips/query/0": 0.5, "flips/query/1": 0.0, "flips/pooler": 0.0}
    expected["flip_ratio"] = 2 / 10
    assert {name: float(value) for name, value in got.items()} == pytest.approx(expected)


def test_codes_of_a_group_are_around_its_own_mean():
    """The outputs of a query have groups; the inputs of an output linear do."""
    kernel = jnp.asarray(
        [[[0.0, 1.0, 10.0, 11.0]] * 4, [[0.0] * 4, [1.0] * 4, [10.0] * 4, [11.0] * 4]]
    )
    params = {"layers": {"query": {"kernel": kernel}, "ffn_output": {"kernel": kernel}}}
    codes = binary_codes(params, MeanBinarizer(), groups=2)
    np.testing.assert_array_equal(codes["layers/query"][0], [[-1, 1, -1, 1]] * 4)
    np.testing.assert_array_equal(codes["layers/ffn_output"][1].T, [[-1, 1, -1, 1]] * 4)


def test_zeros_are_counted_below_half_of_each_layers_own_mean_magnitude():
    # Mean magnitudes 2 and 1 (the second layer's weights are 1 and -1), and 3.
    tree = params([[-0.9, 1.1], [0.0, 6.0]], [[-1.4, 1.6, 6.0, 3.0]])
    got = zero_ratios(binary_codes(tree, TernaryMean()), TernaryMean())
    expected = {"zeros/query/0": 0.5, "zeros/query/1": 0.0, "zeros/pooler": 0.25}
    expected["zero_ratio"] = 3 / 12
    assert {name: float(value) for name, value in got.items()} == pytest.approx(expected)
    assert zero_ratios(binary_codes(tree, MeanBinarizer()), MeanBinarizer()) == {}
    assert zero_ratios({}, None) == {}


def test_full_precision_has_no_flips():
    assert flip_ratios(binary_codes(params([[1.0, 2.0], [3.0, 4.0]], [[1.0]]), None), {}) == {}


def test_scales_are_listed_by_layer():
    named = scales(params([[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0]]))
    expected = {
        "scales/query/input_scale/0": 0.5,
        "scales/query/input_scale/1": 0.25,
        "scales/pooler/input_scale": 1.0,
    }
    assert {name: float(np.asarray(value)) for name, value in named.items()} == expected
