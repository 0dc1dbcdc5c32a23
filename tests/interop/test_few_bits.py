"""Layouts of few-bit codes: bytes by hand, and what cannot be packed or unpacked."""

import numpy as np
import pytest

from bipft_jax.interop import few_bits

CODES = np.random.default_rng(0).integers(-1, 2, (8, 128)).astype(np.int8)


def test_quarters_of_a_column_share_a_byte():
    packed = few_bits.pack_quarters(np.array([[-1], [0], [1], [1]], np.int8))
    assert packed.tolist() == [[0b10_10_01_00]]
    np.testing.assert_array_equal(few_bits.unpack_quarters(few_bits.pack_quarters(CODES)), CODES)


@pytest.mark.parametrize("layout", [few_bits.I2S_X86, few_bits.I2S_ARM])
def test_quarters_of_a_block_share_a_byte_and_the_scale_follows(layout):
    codes = np.full((1, 128), -1, np.int8)
    codes[0, :: layout.block // 4] = [1, 0] * (256 // layout.block)
    packed = layout.pack(codes, 0.5)
    assert packed[0] == 0b10_01_10_01 and not packed[1 : layout.block // 4].any()
    assert packed[-32:].tobytes() == b"\0\0\0\x3f" + bytes(28)
    again, scale = layout.unpack(layout.pack(CODES, 0.25), CODES.shape)
    np.testing.assert_array_equal(again, CODES)
    assert scale == 0.25


def test_signs_begin_with_the_lowest_bit():
    codes = np.full((1, 64), -1, np.int8)
    codes[0, [0, 33]] = 1
    assert few_bits.pack_signs(codes).tolist() == [[1, 2]]
    signs = np.where(CODES > 0, 1, -1)
    np.testing.assert_array_equal(few_bits.unpack_signs(few_bits.pack_signs(CODES)), signs)


def test_five_trits_share_a_byte():
    assert few_bits.pack_trits(np.array([[1, 0, -1, 1, -1, 1]], np.int8)).tolist() == [
        [2 + 3 + 2 * 27, 2 + 3 + 9 + 27 + 81]
    ]
    packed = few_bits.pack_trits(CODES)
    assert packed.shape == (8, 26)
    np.testing.assert_array_equal(few_bits.unpack_trits(packed, 128), CODES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: few_bits.pack_quarters(CODES[:6]), "6 rows .* multiple of 4"),
        (lambda: few_bits.unpack_quarters(np.array([[3]], np.uint8)), "11, which stands for none"),
        (lambda: few_bits.I2S_X86.pack(CODES[:, :64], 1.0), "64 columns: .* I2_S's 128"),
        (lambda: few_bits.I2S_ARM.unpack(np.zeros(64, np.uint8), (4, 64)), "64 bytes .* 4 x 64"),
        (lambda: few_bits.pack_signs(CODES[:, :40]), "40 columns .* multiple of 32"),
        (lambda: few_bits.unpack_trits(np.array([[243]], np.uint8), 5), "is 243: .* below 243"),
        (lambda: few_bits.unpack_trits(np.array([[0]], np.uint8), 6), "1 bytes .* 6 trits"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
