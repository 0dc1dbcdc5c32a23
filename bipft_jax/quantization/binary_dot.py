"""`binary_dot_general`: the only place where quantised operands are multiplied.

Forward: quantises both operands, multiplies their *codes* (exact: sums of products of small
integers), and applies the scales once to the result. Backward: straight-through, from the residuals
of the quantizers (`quantizers.py`): for weights, for 1-bit signed activations and for BitNet's
integers one byte per element, never the float operand. `arithmetic.py` chooses the arithmetic of
both.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from bipft_jax.quantization.arithmetic import check_modes, widened
from bipft_jax.quantization.encoded import Encoded, quantize, total
from bipft_jax.quantization.products import (
    Numbers,
    code_product,
    cotangent_products,
    float_product,
    free_axes,
    split_heads,
)
from bipft_jax.quantization.quantizers import Quantizer

# The checkpoint name of the codes kept for the backward pass, for policies of `jax.checkpoint`.
CODES = "codes"


class Placement(NamedTuple):
    """Sharding of the right operand over the mesh of `jax.set_mesh`: where it is stored and where
    it is used. In both passes its *codes* are transferred between the two, one byte per element;
    its gradient has the stored sharding."""

    stored: PartitionSpec
    used: PartitionSpec


def binary_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Numbers,
    *,
    lhs_quantizer: Quantizer | None,
    rhs_quantizer: Quantizer | None,
    lhs_scale: jax.Array | None = None,
    rhs_scale: jax.Array | None = None,
    lhs_heads: int = 0,
    rhs_heads: int = 0,
    rhs_kept: Any = None,
    rhs_placement: Placement | None = None,
    compute: str = "auto",
    backward: str = "float32",
) -> jax.Array:
    """`lax.dot_general` of two arrays that are quantised first.

    Arguments:
      lhs, rhs: float arrays.
      dimension_numbers: as for `lax.dot_general`.
      lhs_quantizer, rhs_quantizer: rows of the quantizer table; None leaves an operand unquantised
        (the product is then computed in lhs's dtype, accumulated in float32 or wider).
      lhs_scale, rhs_scale: learned scalar scales, for quantizers that have one. Other scales are
        the quantizers' own: scalars, or arrays that broadcast to the operand, of size 1 along the
        contracted axes (a scale per token, per row of a weight, per index of a batch axis).
      lhs_heads, rhs_heads: if not 0, that operand is [B, S, heads * d] and is multiplied as
        [B, heads, S, d], to which the dimension numbers refer.
      rhs_kept: None, or what `kept_for_backward` gave of rhs, which is then not quantised again and
        only receives its gradient. Without effect in the mode "simulated".
      rhs_placement: of the right operand, if it is gathered before the product.
      compute: arithmetic of the product of codes, one of `arithmetic.COMPUTE_MODES`. All give the
        same result while sums stay below 2^24. "simulated" multiplies the quantised *values* in
        lhs's dtype and keeps them for the backward pass, as most implementations do: for
        comparison.
      backward: arithmetic of the two products of the backward pass if both operands are quantised,
        one of `arithmetic.BACKWARD_MODES`; "float32" means the cotangent's own type.

    Returns: the product, in lhs's dtype, dimensions in the order of `lax.dot_general`.

    Raises: ValueError for an unknown `compute` or `backward`, or a rhs quantizer with an offset
      (unsigned or shifted), which only the left operand may have.
    """
    if rhs_quantizer is not None and rhs_quantizer.has_offset:
        raise ValueError(f"{rhs_quantizer} has an offset: only the left operand may be unsigned")
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    numbers = (
        (tuple(lhs_contract), tuple(rhs_contract)),
        (tuple(lhs_batch), tuple(rhs_batch)),
    )
    check_modes(compute, backward)
    if compute == "simulated":
        if lhs_quantizer is not None:
            lhs, lhs_quantizer = quantize(lhs, lhs_scale, lhs_quantizer), None
        if rhs_quantizer is not None:
            rhs, rhs_quantizer = quantize(rhs, rhs_scale, rhs_quantizer).astype(lhs.dtype), None
            rhs_kept = None
    return _binary_dot(
        lhs,
        rhs,
        lhs_scale,
        rhs_scale,
        rhs_kept,
        numbers,
        _Static(
            lhs_quantizer,
            rhs_quantizer,
            compute,
            backward,
            lhs.dtype,
            rhs.dtype,
            lhs_heads,
            rhs_heads,
            rhs_placement,
        ),
    )


class _Static(NamedTuple):
    """Static arguments of the compiled program."""

    lhs_quantizer: Quantizer | None
    rhs_quantizer: Quantizer | None
    compute: str
    backward: str
    lhs_dtype: Any
    rhs_dtype: Any
    lhs_heads: int
    rhs_heads: int
    rhs_placement: Placement | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _binary_dot(lhs, rhs, lhs_scale, rhs_scale, rhs_kept, numbers, static):
    return _forward(lhs, rhs, lhs_scale, rhs_scale, rhs_kept, numbers, static)[0]


def _forward(lhs, rhs, lhs_scale, rhs_scale, rhs_kept, numbers, static):
    kept_left = kept_for_backward(lhs, lhs_scale, static.lhs_quantizer)
    kept_right = rhs_kept
    if rhs_kept is None:
        kept_right = kept_for_backward(rhs, rhs_scale, static.rhs_quantizer)
    # Restores the codes from the residuals: else compilers write both to memory.
    left = _restored(kept_left, lhs_scale, static.lhs_quantizer)
    right = _restored(kept_right, rhs_scale, static.rhs_quantizer)
    right = _gathered(right, static.rhs_placement)
    product = _multiply(left, right, numbers, static, lhs.dtype)
    return product, (kept_left, kept_right, lhs_scale, rhs_scale)


def _backward(numbers, static, kept, cotangent):
    kept_left, kept_right, lhs_scale, rhs_scale = kept
    left = _restored(kept_left, lhs_scale, static.lhs_quantizer)
    right = _restored(kept_right, rhs_scale, static.rhs_quantizer)
    left_array, left_scales, left_factor = _factors(left, cotangent.dtype, separable=True)
    right_array, _, right_factor = _factors(right, cotangent.dtype, separable=False)
    for_right = cotangent
    if left_scales is not None:
        ndims = left_array.ndim + bool(static.lhs_heads), right_array.ndim + bool(static.rhs_heads)
        for_right = _scaled(cotangent, _lhs_to_output(left_scales, numbers, ndims))
    placement = static.rhs_placement
    coded = isinstance(left, Encoded) and isinstance(right, Encoded)
    to_left, to_right = cotangent_products(
        (cotangent, for_right),
        left_array,
        _gathered(right_array, placement),
        numbers,
        (static.lhs_heads, static.rhs_heads),
        # Unquantised operands keep their precision.
        static.backward if coded else "float32",
    )
    to_left, to_right = to_left.astype(static.lhs_dtype), to_right.astype(static.rhs_dtype)
    if placement is not None:
        to_right = jax.lax.with_sharding_constraint(to_right, placement.stored)
    # <cotangent, left right> = <to_left, left> = <to_right, right>: the gradients of both scales
    # need it, and the smaller operand gives it at the lower cost. A left operand with separate
    # scales learns none, and `to_left` lacks them.
    if left_scales is None and left_array.size < right_array.size:
        inner = total(to_left, left_array)
    else:
        inner = total(to_right, right_array)
    lhs_bar, lhs_scale_bar = _pullback(
        kept_left, lhs_scale, to_left, right_factor, inner, static.lhs_quantizer
    )
    rhs_bar, rhs_scale_bar = _pullback(
        kept_right, rhs_scale, to_right, left_factor, inner, static.rhs_quantizer
    )
    return lhs_bar, rhs_bar, lhs_scale_bar, rhs_scale_bar, None


_binary_dot.defvjp(_forward, _backward)


def kept_for_backward(x, scale, quantizer):
    """The residual of an operand for the backward pass, its codes named `CODES`."""
    if quantizer is None:
        return x
    residual = quantizer.residual(x, scale, quantizer.encode(x, scale))
    if isinstance(residual, Encoded):  # its scales are few
        return jax.tree.map(lambda leaf: checkpoint_name(leaf, CODES), residual)
    return jax.tree.map(
        lambda leaf: checkpoint_name(leaf, CODES) if leaf.dtype == jnp.int8 else leaf, residual
    )


def _restored(residual, scale, quantizer) -> Encoded | jax.Array:
    return residual if quantizer is None else quantizer.restore(residual, scale)


def _gathered(operand, placement: Placement | None):
    """The right operand, or its codes, with the sharding of its use."""
    if isinstance(operand, Encoded):
        return operand._replace(codes=_gathered(operand.codes, placement))
    # Constrains both shardings: else XLA may gather the float weights and encode them afterwards.
    for spec in placement or ():
        operand = jax.lax.with_sharding_constraint(operand, spec)
    return operand


def _factors(operand, dtype, separable: bool):
    """An operand as (array, scales, scalar), whose product is the operand.

    The array is the codes, exact in any float type, if there is no offset and either the scale is a
    scalar or `separable` allows separate scales (None if there are none): the caller multiplies the
    cotangent by them. Else the array is the values. For a weight, which is smaller than the
    cotangent, that costs less.
    """
    if not isinstance(operand, Encoded):
        return operand.astype(dtype), None, 1.0
    if operand.offset is None and operand.scale.ndim == 0:
        return operand.codes, None, operand.scale
    if operand.offset is None and separable:
        return operand.codes, operand.scale, 1.0
    return operand.value(dtype), None, 1.0


def _scaled(cotangent: jax.Array, factor: jax.Array | float) -> jax.Array:
    """cotangent * factor, multiplied in float32 or wider, in the cotangent's type."""
    wide = cotangent.astype(widened(cotangent.dtype))
    return (wide * jnp.asarray(factor, wide.dtype)).astype(cotangent.dtype)


def _pullback(residual, scale, cotangent, factor, inner, quantizer):
    cotangent = _scaled(cotangent, factor)
    if quantizer is None:
        return cotangent, None
    inner = inner * jnp.asarray(factor, inner.dtype)
    return quantizer.pullback(residual, scale, cotangent, inner)


def _multiply(left, right, numbers, static: _Static, dtype: Any) -> jax.Array:
    """The product of two operands, each `Encoded` or a plain float array."""
    left_codes, left_scale, left_offset = left if isinstance(left, Encoded) else (left, None, None)
    right_codes, right_scale, _ = right if isinstance(right, Encoded) else (right, None, None)

    scale_type = widened(dtype)
    left_scale, right_scale = (
        scale if scale is None else scale.astype(scale_type) for scale in (left_scale, right_scale)
    )
    heads = static.lhs_heads, static.rhs_heads
    if isinstance(left, Encoded) and isinstance(right, Encoded):
        product = code_product(left_codes, right_codes, numbers, heads, static.compute, scale_type)
    else:
        product = float_product(left_codes, right_codes, numbers, heads, dtype)
    left_codes, right_codes = map(split_heads, (left_codes, right_codes), heads)
    free = (left_codes.ndim, right_codes.ndim)
    if left_offset is not None:
        # sum_k (code * scale + offset) r = scale * sum_k code r + offset * sum_k r
        sums = jnp.sum(right_codes.astype(scale_type), axis=numbers[0][1], keepdims=True)
        product = product * _lhs_to_output(left_scale, numbers, free)
        product = product + _lhs_to_output(left_offset, numbers, free) * _rhs_to_output(
            sums, numbers, free
        )
    elif left_scale is not None:
        product = product * _lhs_to_output(left_scale, numbers, free)
    if right_scale is not None:
        product = product * _rhs_to_output(right_scale, numbers, free)
    return product.astype(dtype)


def _lhs_to_output(scale: jax.Array, numbers: Numbers, ndims: tuple[int, int]):
    """The scale of the left operand (scalar, or the operand's shape with 1 at contracted axes),
    reshaped to broadcast over the product [batch..., left free..., right free...]."""
    if scale.ndim == 0:
        return scale
    (contract, other_contract), (batch, _) = numbers
    free = free_axes(ndims[0], contract, batch)
    scale = jnp.transpose(scale, (*batch, *free, *contract))
    other_free = ndims[1] - len(other_contract) - len(batch)
    return scale.reshape(scale.shape[: len(batch) + len(free)] + (1,) * other_free)


def _rhs_to_output(scale: jax.Array, numbers: Numbers, ndims: tuple[int, int]):
    """The same for the right operand."""
    if scale.ndim == 0:
        return scale
    (other_contract, contract), (_, batch) = numbers
    free = free_axes(ndims[1], contract, batch)
    scale = jnp.transpose(scale, (*batch, *free, *contract))
    shape = scale.shape
    other_free = ndims[0] - len(other_contract) - len(batch)
    n = len(batch)
    return scale.reshape(shape[:n] + (1,) * other_free + shape[n : n + len(free)])
