"""Few-bit storage of one weight matrix's codes, byte for byte (BitNet SPEC 7).

=============  =====================================================  ==============
layout         written by                                             bits a weight
=============  =====================================================  ==============
`quarters`     `transformers`' BitNet classes, beside `weight_scale`  2
`I2S_X86`      bitnet.cpp's converter (GGUF type I2_S)                2
`I2S_ARM`      bitnet.cpp on ARM                                      2
`signs`        this library, for codes -1 and 1                       1
`trits`        this library, for codes -1, 0 and 1                    1.6
=============  =====================================================  ==============

Codes are int8 [out, in].
"""

from __future__ import annotations

import dataclasses

import numpy as np

_TRITS = 5  # codes a byte: 3^5 = 243 fit
_POWERS = 3 ** np.arange(_TRITS)


def pack_quarters(codes: np.ndarray) -> np.ndarray:
    """uint8 [out / 4, in]: byte (r, c) holds code + 1 of rows r, r + out/4, r + out/2, r + 3 out/4,
    the first in its lowest two bits.

    Raises: ValueError if the number of rows is no multiple of 4.
    """
    if len(codes) % 4:
        raise ValueError(f"{len(codes)} rows of 2-bit codes: they must be a multiple of 4")
    quarters = (codes + 1).astype(np.uint8).reshape(4, len(codes) // 4, -1)
    return np.bitwise_or.reduce([quarter << 2 * n for n, quarter in enumerate(quarters)])


def unpack_quarters(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_quarters`. Raises: ValueError for a pair of bits that is no code."""
    return _codes(np.concatenate([packed >> 2 * n & 3 for n in range(4)]))


@dataclasses.dataclass(frozen=True)
class I2S:
    """Codes + 1 in row-major order, in blocks of `block`: element j of a block is in byte
    j % (block / 4), the first quarter in the top two bits. Then the scale, by which values are
    multiplied, as little-endian float32, and zeros up to 32 bytes."""

    block: int

    def pack(self, codes: np.ndarray, scale: float) -> np.ndarray:
        """uint8 [out * in / 4 + 32].

        Raises: ValueError if the blocks do not divide a row.
        """
        if codes.shape[1] % self.block:
            raise ValueError(
                f"{codes.shape[1]} columns: they must be a multiple of I2_S's {self.block}"
            )
        blocks = (codes + 1).astype(np.uint8).reshape(-1, 4, self.block // 4)
        packed = np.bitwise_or.reduce([blocks[:, n] << 6 - 2 * n for n in range(4)])
        tail = np.zeros(32, np.uint8)
        tail[:4] = np.frombuffer(np.array(scale, "<f4").tobytes(), np.uint8)
        return np.concatenate([packed.reshape(-1), tail])

    def unpack(self, packed: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.float32]:
        """(codes, scale). Raises: ValueError for bytes that do not fit the shape, or no code."""
        rows, columns = shape
        if packed.size != rows * columns // 4 + 32:
            raise ValueError(f"{packed.size} bytes of I2_S do not fit {rows} x {columns} codes")
        blocks = packed[:-32].reshape(-1, self.block // 4)
        codes = np.stack([blocks >> 6 - 2 * n & 3 for n in range(4)], axis=1)
        scale = np.frombuffer(packed[-32:-28].tobytes(), "<f4")[0]
        return _codes(codes).reshape(shape), scale


I2S_X86, I2S_ARM = I2S(block=128), I2S(block=64)


def pack_signs(codes: np.ndarray) -> np.ndarray:
    """uint32 [out, in / 32], the first column in the lowest bit, 1 for code 1; a code 0 is stored
    as -1.

    Raises: ValueError if the number of columns is no multiple of 32.
    """
    if codes.shape[1] % 32:
        raise ValueError(f"{codes.shape[1]} columns of 1-bit codes: they must be a multiple of 32")
    return np.packbits(codes > 0, axis=1, bitorder="little").view("<u4")


def unpack_signs(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_signs`."""
    bits = np.unpackbits(packed.astype("<u4").view(np.uint8), axis=1, bitorder="little")
    return (2 * bits.astype(np.int8) - 1).astype(np.int8)


def pack_trits(codes: np.ndarray) -> np.ndarray:
    """uint8 [out, ceil(in / 5)]: the sum of (code + 1) 3^i over five neighbours, filled up with
    code 0."""
    filled = np.pad(codes, ((0, 0), (0, -codes.shape[1] % _TRITS)))
    trits = (filled + 1).reshape(len(codes), -1, _TRITS)
    return (trits @ _POWERS).astype(np.uint8)


def unpack_trits(packed: np.ndarray, columns: int) -> np.ndarray:
    """The inverse of `pack_trits`. Raises: ValueError for a byte above 242, or too few bytes."""
    if packed.size and packed.max() >= 3**_TRITS:
        raise ValueError(f"a byte of five trits is {packed.max()}: it must be below {3**_TRITS}")
    if packed.shape[1] != -(-columns // _TRITS):
        raise ValueError(f"{packed.shape[1]} bytes a row do not hold {columns} trits")
    trits = packed[..., None] // _POWERS % 3
    return (trits.reshape(len(packed), -1)[:, :columns] - 1).astype(np.int8)


def _codes(values: np.ndarray) -> np.ndarray:
    if (values > 2).any():
        raise ValueError("two bits of a code are 11, which stands for none: the data are damaged")
    return values.astype(np.int8) - 1
