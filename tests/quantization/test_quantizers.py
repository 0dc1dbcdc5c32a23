"""Each quantizer against values worked out by hand, and against float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipft_jax.quantization.binarizers import binarize_rows
from bipft_jax.quantization.encoded import quantize
from bipft_jax.quantization.quantizers import (
    ElasticSigned,
    ElasticUnsigned,
    MeanBinarizer,
    RowBinarizer,
    SignBinarizer,
    StepBinarizer,
)


def gradients(quantizer, x, scale, cotangent):
    x, scale, cotangent = (jnp.asarray(a, jnp.float32) for a in (x, scale, cotangent))
    value, pullback = jax.vjp(lambda x, a: quantize(x, a, quantizer), x, scale)
    return value, *pullback(cotangent)


def test_mean_binarizer_subtracts_the_mean_but_scales_by_the_uncentred_magnitude():
    w = jnp.asarray([[1.0, 3.0], [-1.0, 1.0]])  # mean 1, mean|w| 1.5; two entries equal the mean
    value, pullback = jax.vjp(lambda w: quantize(w, None, MeanBinarizer()), w)
    np.testing.assert_array_equal(value, [[0.0, 1.5], [-1.5, 0.0]])
    cotangent = jnp.asarray([[5.0, -7.0], [0.5, 100.0]])
    np.testing.assert_array_equal(pullback(cotangent)[0], cotangent)  # identity, no window


def test_rows_have_their_own_scale_and_the_whole_tables_centre():
    table = jnp.asarray([[0.0, 0.0], [1.0, 3.0], [-2.0, 4.0]])  # mean 1
    expected = [[0.0, 0.0], [0.0, 2.0], [-3.0, 3.0]]
    np.testing.assert_array_equal(quantize(table, None, MeanBinarizer(per_row=True)), expected)
    looked_up = table[jnp.asarray([2, 1])]
    rows, pullback = jax.vjp(
        lambda rows, table: binarize_rows(rows, table, MeanBinarizer(per_row=True)),
        looked_up,
        table,
    )
    np.testing.assert_array_equal(rows, [expected[2], expected[1]])
    row_gradient, table_gradient = pullback(jnp.ones((2, 2)))
    np.testing.assert_array_equal(row_gradient, np.ones((2, 2)))
    assert not table_gradient.any()
    # Without scales of their own, rows have the whole table's: mean|x| = 10/6.
    whole = MeanBinarizer().lookup(looked_up, table)
    np.testing.assert_allclose(whole, np.asarray([[-10, 10], [0, 10]]) / 6, rtol=1e-6)


def test_signed_one_bit_window_is_inclusive_and_zero_stays_zero():
    x = [-0.6, -0.5, 0.0, 0.5, 0.6]
    value, dx, dscale = gradients(ElasticSigned(1), x, 0.5, [1, 2, 4, 8, 16])
    np.testing.assert_array_equal(value, [-0.5, -0.5, 0, 0.5, 0.5])
    np.testing.assert_array_equal(dx, [0, 2, 4, 8, 0])
    # sum g sgn(x) = -1 - 2 + 8 + 16, over sqrt(5 * 1): entries outside the window count too
    np.testing.assert_allclose(dscale, 21 / np.sqrt(5), rtol=1e-6)


def test_signed_two_bits_rounds_half_to_even_between_minus_two_and_one():
    x = [-3.0, -2.0, -0.5, 0.5, 1.5, 0.75]
    value, dx, dscale = gradients(ElasticSigned(2), x, 1.0, [1, 2, 4, 8, 16, 32])
    np.testing.assert_array_equal(value, [-2, -2, 0, 0, 1, 1])
    np.testing.assert_array_equal(dx, [0, 2, 4, 8, 0, 32])
    # below: Qn g; above: Qp g; inside: (rnd(r) - r) g
    slope_sum = -2 * 1 + 0 * 2 + 0.5 * 4 - 0.5 * 8 + 1 * 16 + 0.25 * 32
    np.testing.assert_allclose(dscale, slope_sum / np.sqrt(6 * 1), rtol=1e-6)


def test_unsigned_one_bit_rounds_one_half_down():
    x = [-0.1, 0.0, 0.25, 0.3, 0.5, 0.6]
    value, dx, dscale = gradients(ElasticUnsigned(1), x, 0.5, [1, 2, 4, 8, 16, 32])
    np.testing.assert_array_equal(value, [0, 0, 0, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(dx, [0, 2, 4, 8, 16, 0])
    slope_sum = 0 * 1 + 0 * 2 - 0.5 * 4 + 0.4 * 8 + 0 * 16 + 1 * 32
    np.testing.assert_allclose(dscale, slope_sum / np.sqrt(6), rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unsigned_many_bits_shifts_by_the_minimum_of_the_whole_tensor(bits):
    rng = np.random.default_rng(bits)
    x, g = rng.normal(size=(3, 5, 7)), rng.normal(size=(3, 5, 7))
    scale, highest = 4.0 / 2**bits, 2**bits - 1
    value, dx, dscale = gradients(ElasticUnsigned(bits), x, scale, g)
    ratio = (x - x.min()) / scale
    np.testing.assert_allclose(
        value, scale * np.clip(np.round(ratio), 0, highest) + x.min(), atol=2e-6
    )
    inside = (ratio >= 0) & (ratio <= highest)
    np.testing.assert_allclose(dx, np.where(inside, g, 0), rtol=1e-6)
    slope = np.where(inside, np.round(ratio) - ratio, highest)
    np.testing.assert_allclose(
        dscale, np.sum(g * slope) / np.sqrt(x.size * highest), rtol=2e-4, atol=1e-6
    )
    assert inside.any() and not inside.all()


@pytest.mark.parametrize("scale", [1e-5, 0.0, -3.0])
def test_a_scale_at_or_below_the_smallest_acts_as_the_smallest_but_still_learns(scale):
    value, dx, dscale = gradients(ElasticSigned(1), [2.0, 5e-6], scale, [1.0, 1.0])
    np.testing.assert_allclose(value, [1e-5, 1e-5], rtol=1e-6)
    np.testing.assert_array_equal(dx, [0, 1])
    np.testing.assert_allclose(dscale, 2 / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("quantizer", "factor"),
    [
        (ElasticSigned(1), 2.0),
        (ElasticSigned(4), 2.0 / np.sqrt(7)),
        (ElasticUnsigned(1), 4.0),
        (ElasticUnsigned(2), 4.0 / np.sqrt(3)),
    ],
)
def test_initial_scale(quantizer, factor):
    x = jnp.asarray([[1.0, -2.0], [0.0, 5.0]])
    np.testing.assert_allclose(quantizer.initial_scale(x), 2.0 * factor, rtol=1e-6)


def test_codes_of_bfloat16_activations_are_those_of_the_same_numbers_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=200), jnp.bfloat16)
    for quantizer in (ElasticSigned(1), ElasticSigned(4), ElasticUnsigned(1), ElasticUnsigned(8)):
        narrow = quantizer.encode(x, jnp.float32(0.37))
        wide = quantizer.encode(x.astype(jnp.float32), jnp.float32(0.37))
        np.testing.assert_array_equal(narrow.codes, wide.codes)
        assert narrow.codes.dtype == jnp.int8


def test_row_binarizer_has_a_window_and_a_gradient_through_the_centring():
    # Row means 1, -1 (a tie) and 0; the row lies along axis 1.
    w = jnp.asarray([[0.0, 2.0, 1.0], [-3.5, -1.0, 1.5], [0.25, -0.5, 0.25]])
    value, pullback = jax.vjp(lambda w: quantize(w, None, RowBinarizer(axis=1)), w)
    np.testing.assert_allclose(value, [[-1, 1, 0], [-2, 0, 2], [1 / 3, -1 / 3, 1 / 3]], rtol=1e-6)
    (gradient,) = pullback(jnp.asarray([[3.0, 6.0, 9.0], [3.0, 6.0, 9.0], [0.0, 0.0, 9.0]]))
    # |w - mean| is 1 (inside), 1, 0; then 2.5 (outside), 0, 2.5; then all inside.
    np.testing.assert_allclose(gradient, [[-3, 0, 3], [-2, 4, -2], [-3, -3, 6]], atol=1e-6)
    kernel = jax.vjp(lambda w: quantize(w, None, RowBinarizer(axis=0)), w.T)
    np.testing.assert_array_equal(kernel[0], value.T)
    table = jnp.concatenate([w, 5 + w])  # the other rows do not matter
    np.testing.assert_array_equal(RowBinarizer(axis=1).lookup(w, table), value)


def test_unscaled_signs_differ_in_the_ends_of_their_windows():
    x = jnp.asarray([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
    g = jnp.asarray([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    for quantizer, value, gradient in (
        (SignBinarizer(True), [-1, -1, -1, 0, 1, 1, 1], [0, 2, 4, 8, 16, 32, 0]),
        (SignBinarizer(False), [-1, -1, -1, 0, 1, 1, 1], [0, 0, 4, 8, 16, 0, 0]),
        (StepBinarizer(), [0, 0, 0, 0, 1, 1, 1], [0, 0, 4, 8, 16, 0, 0]),
    ):
        got, pullback = jax.vjp(lambda x, q=quantizer: quantize(x, None, q), x)
        np.testing.assert_array_equal(got, value)
        np.testing.assert_array_equal(pullback(g)[0], gradient)


def test_unsupported_bits_are_refused():
    with pytest.raises(ValueError, match="bits must be one of"):
        ElasticSigned(bits=3)
