"""BitNet's quantizers: ternary weights, and activations scaled by their largest magnitude."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from bipft_jax.quantization.encoded import Encoded, clipped, mean_of_groups, scale_type

SMALLEST_MAGNITUDE = 1e-5  # smaller means and maxima act as this one, so that zeros stay zeros
ABSMAX_BITS = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class TernaryMean:
    """Weights -1, 0, 1 times their mean magnitude (Ma et al. 2024, arXiv:2402.17764; BitNet SPEC
    1.2). Not centred.

    group_axis: every index of this axis is a group with a scale of its own (BitNet SPEC 1.3); None:
      one scale for the tensor.
    """

    group_axis: int | None = None
    learned_scale = False
    has_offset = False

    def encode(self, x: jax.Array, scale: None = None) -> Encoded:
        """codes clip(rnd(x * s), -1, 1) with s = 1 / mean|x|, scale 1 / s. Multiplies by s, as the
        authors do: dividing by the mean rounds differently at a tie."""
        wide = x.astype(scale_type(x))
        multiplier = _over_magnitude(1, mean_of_groups(jnp.abs(wide), self.group_axis))
        codes = clipped(jnp.round(wide * multiplier), -1, 1)
        return Encoded(codes.astype(jnp.int8), 1 / multiplier)

    def residual(self, x: jax.Array, scale: None, encoded: Encoded) -> Encoded:
        """Keeps the int8 codes and the scale."""
        return encoded

    def restore(self, residual: Encoded, scale: None) -> Encoded:
        """The residual, which is already encoded."""
        return residual

    def pullback(self, residual: Encoded, scale: None, cotangent: jax.Array, inner):
        """Identity: no window, and no gradient through the scale."""
        return cotangent, None


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """Activations as integers relative to the largest magnitude (Wang et al. 2023,
    arXiv:2310.11453; BitNet SPEC 2).

    per_tensor: one scale for the whole array instead of one for each vector along the last axis (a
      token, or one group of its features). A token's codes then depend on the rest of the batch.
    shifted: subtracts the minimum first, so that codes are not negative, and adds it back.

    Raises: ValueError for an unsupported number of bits.
    """

    bits: int = 8
    per_tensor: bool = False
    shifted: bool = False
    learned_scale = False

    def __post_init__(self):
        if self.bits not in ABSMAX_BITS:
            raise ValueError(
                f"AbsMax(bits={self.bits}): bits must be one of {ABSMAX_BITS}; leave the quantizer "
                "out (None) for full precision"
            )

    @property
    def has_offset(self) -> bool:
        """Whether the values have an offset."""
        return self.shifted

    @property
    def highest(self) -> int:
        """The largest code, 2^(bits-1) - 1."""
        return 2 ** (self.bits - 1) - 1

    def encode(self, x: jax.Array, scale: None = None) -> Encoded:
        """codes clip(rnd(z * s), lowest, highest) with s = highest / max|z|, scale 1 / s; z = x, or
        x - min x, with offset min x."""
        wide = x.astype(scale_type(x))
        over = dict(axis=None if self.per_tensor else -1, keepdims=not self.per_tensor)
        offset = None
        if self.shifted:
            offset = jnp.min(wide, **over)
            wide = wide - offset
        multiplier = _over_magnitude(self.highest, jnp.max(jnp.abs(wide), **over))
        lowest = 0 if self.shifted else -(self.highest + 1)
        codes = clipped(jnp.round(wide * multiplier), lowest, self.highest)
        return Encoded(codes.astype(jnp.int8), 1 / multiplier, offset)

    def residual(self, x: jax.Array, scale: None, encoded: Encoded) -> Encoded:
        """Keeps the int8 codes, and scale and offset of each token."""
        return encoded

    def restore(self, residual: Encoded, scale: None) -> Encoded:
        """The residual, which is already encoded."""
        return residual

    def pullback(self, residual: Encoded, scale: None, cotangent: jax.Array, inner):
        """Identity, also at the ends of the range; no gradient through maximum and minimum."""
        return cotangent, None


def _over_magnitude(highest: int, magnitude: jax.Array) -> jax.Array:
    return highest / jnp.maximum(magnitude, jnp.asarray(SMALLEST_MAGNITUDE, magnitude.dtype))
