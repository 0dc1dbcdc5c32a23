"""BitNet's quantizers, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipft_jax.quantization.encoded import quantize
from bipft_jax.quantization.quantizers import AbsMax, MeanBinarizer, TernaryMean


def test_ternary_ties_round_to_even_and_tiny_weights_meet_the_floor():
    # mean|w| = 1, so every half is a tie; 1.5 rounds to 2 and is clipped.
    halves = TernaryMean().encode(jnp.asarray([[0.5, -0.5, 1.5], [-1.5, 0.25, 1.75]]))
    np.testing.assert_array_equal(halves.codes, [[0, 0, 1], [-1, 0, 1]])
    assert halves.scale == 1
    # Relative to their own mean, 4.5e-6, all would be 1 or -1.
    tiny = TernaryMean().encode(jnp.asarray([6e-6, -6e-6, 3e-6, 3e-6]))
    np.testing.assert_array_equal(tiny.codes, [1, -1, 0, 0])
    np.testing.assert_allclose(tiny.scale, 1e-5, rtol=1e-6)
    zeros = TernaryMean().encode(jnp.zeros((2, 3)))
    assert not zeros.codes.any() and jnp.isfinite(zeros.scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_token_is_scaled_by_its_largest_magnitude_and_rounds_half_to_even(dtype):
    x = jnp.asarray(
        [
            [127, 0.5, 1.5, 2.5, -0.5, -2.5],
            [-254, 1, 3, 5, 0, -1],
            [0, 0, 0, 0, 0, 0],
            [2e-6, -1e-6, 0, 0, 0, 0],  # the floor: 127 / 1e-5 * 2e-6 = 25.4
        ],
        dtype,
    )
    expected = [
        [127, 0, 2, 2, 0, -2],
        [-127, 0, 2, 2, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [25, -13, 0, 0, 0, 0],
    ]
    encoded = AbsMax().encode(x)
    np.testing.assert_array_equal(encoded.codes, expected)
    assert encoded.scale.shape == (4, 1) and encoded.scale.dtype == jnp.float32
    four = AbsMax(bits=4).encode(jnp.asarray([7, 3.5, -7, 2.5, 0.5]))
    np.testing.assert_array_equal(four.codes, [7, 4, -7, 2, 0])
    # One scale for all tokens; shifted, codes count from the minimum.
    np.testing.assert_array_equal(AbsMax(per_tensor=True).encode(x[:2]).codes[0, :3], [64, 0, 1])
    shifted = AbsMax(shifted=True).encode(jnp.asarray([[-27.0, 100, 0]]))
    np.testing.assert_array_equal(shifted.codes, [[0, 127, 27]])
    np.testing.assert_allclose(shifted.value(jnp.float32), [[-27, 100, 0]], atol=1e-5)
    with pytest.raises(ValueError, match=r"AbsMax\(bits=3\): bits must be one of"):
        AbsMax(bits=3)


@pytest.mark.parametrize("quantizer", [TernaryMean(), TernaryMean(1), AbsMax(), MeanBinarizer(0)])
def test_the_gradient_is_the_identity_everywhere(quantizer):
    x = jnp.asarray([[5.0, -0.1, 0], [1e-7, 0.3, -80]])
    cotangent = jnp.asarray([[1.0, -2, 3], [4, 5, -6]])
    (gradient,) = jax.vjp(lambda x: quantize(x, None, quantizer), x)[1](cotangent)
    np.testing.assert_array_equal(gradient, cotangent)


def test_a_group_has_statistics_of_its_own():
    w = jnp.asarray([[1.0, 10.0], [3.0, -30.0]])
    ternary = TernaryMean(group_axis=1).encode(w)
    np.testing.assert_array_equal(ternary.codes, [[0, 0], [1, -1]])
    np.testing.assert_array_equal(ternary.scale, [[2, 20]])
    binary = MeanBinarizer(group_axis=1).encode(w)  # centres 2 and -10
    np.testing.assert_array_equal(binary.codes, [[-1, 1], [1, -1]])
    np.testing.assert_array_equal(binary.scale, [[2, 20]])
