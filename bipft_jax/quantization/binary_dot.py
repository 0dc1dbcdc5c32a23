"""`binary_dot_general`: the only place where quantised operands are multiplied.

Forward: both operands are quantised, their *codes* are multiplied (exactly: sums of products of
small integers), and the scales are applied once to the result. Backward: straight-through, from
what each quantizer keeps (`quantizers.py`): for 1-bit signed activations and weights one byte an
element, never the float operand.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bipft_jax.quantization.quantizers import ElasticUnsigned, Encoded, Quantizer, quantize

DimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]

COMPUTE_MODES = ("auto", "int8", "bfloat16", "float32", "simulated")

# What `auto` stands for, by `jax.default_backend()`; a backend that is not listed multiplies in
# float32. Every mode gives the same integers, so this is a choice of speed alone.
AUTO_COMPUTE = {"cpu": "int8", "gpu": "int8", "tpu": "int8"}


def resolve_compute(compute: str) -> str:
    """Turns "auto" into the arithmetic that this process's backend is fast at.

    Raises: ValueError for a name that is not in `COMPUTE_MODES`.
    """
    if compute not in COMPUTE_MODES:
        raise ValueError(f"unknown compute {compute!r}: one of {', '.join(COMPUTE_MODES)}")
    if compute == "auto":
        return AUTO_COMPUTE.get(jax.default_backend(), "float32")
    return compute


def binary_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: DimensionNumbers,
    *,
    lhs_quantizer: Quantizer | None,
    rhs_quantizer: Quantizer | None,
    lhs_scale: jax.Array | None = None,
    rhs_scale: jax.Array | None = None,
    compute: str = "auto",
) -> jax.Array:
    """`lax.dot_general` of two arrays that are quantised first.

    Arguments:
      lhs, rhs: float arrays; a product of unquantised operands is made in lhs's dtype.
      dimension_numbers: as `lax.dot_general` takes them.
      lhs_quantizer, rhs_quantizer: rows of the quantizer table; None leaves an operand as it is
        (then the product is made in lhs's dtype, accumulated in float32 or wider).
      lhs_scale, rhs_scale: learned scalar scales, for the quantizers that have one.
      compute: arithmetic of the product of codes, "int8" (int8 x int8 -> int32), "bfloat16"
        (accumulated in float32), "float32", or "auto" (`AUTO_COMPUTE`). The codes are the same in
        all of them, and so are the results while sums stay below 2^24. "simulated" multiplies
        the quantised *values* in lhs's dtype and keeps them for the backward pass, as
        binarisation usually is written: for comparison.

    Returns: the product, in lhs's dtype, dimensions ordered as by `lax.dot_general`.

    Raises: ValueError for an unknown `compute`, or a rhs quantizer that needs an offset
      (unsigned, more than one bit), which only the left operand may have.
    """
    if isinstance(rhs_quantizer, ElasticUnsigned) and rhs_quantizer.bits > 1:
        raise ValueError(f"{rhs_quantizer} has an offset: only the left operand may be unsigned")
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    numbers = (
        (tuple(lhs_contract), tuple(rhs_contract)),
        (tuple(lhs_batch), tuple(rhs_batch)),
    )
    compute = resolve_compute(compute)
    if compute == "simulated":
        if lhs_quantizer is not None:
            lhs, lhs_quantizer = quantize(lhs, lhs_scale, lhs_quantizer), None
        if rhs_quantizer is not None:
            rhs, rhs_quantizer = quantize(rhs, rhs_scale, rhs_quantizer).astype(lhs.dtype), None
    return _binary_dot(
        lhs,
        rhs,
        lhs_scale,
        rhs_scale,
        numbers,
        _Static(lhs_quantizer, rhs_quantizer, compute, lhs.dtype, rhs.dtype),
    )


class _Static(NamedTuple):
    """What the compiled program depends on beside shapes."""

    lhs_quantizer: Quantizer | None
    rhs_quantizer: Quantizer | None
    compute: str
    lhs_dtype: Any
    rhs_dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _binary_dot(lhs, rhs, lhs_scale, rhs_scale, numbers, static):
    left = _encode(lhs, lhs_scale, static.lhs_quantizer)
    right = _encode(rhs, rhs_scale, static.rhs_quantizer)
    return _multiply(left, right, numbers, static.compute, lhs.dtype)


def _forward(lhs, rhs, lhs_scale, rhs_scale, numbers, static):
    left = _encode(lhs, lhs_scale, static.lhs_quantizer)
    right = _encode(rhs, rhs_scale, static.rhs_quantizer)
    product = _multiply(left, right, numbers, static.compute, lhs.dtype)
    kept_left = _residual(lhs, lhs_scale, left, static.lhs_quantizer)
    kept_right = _residual(rhs, rhs_scale, right, static.rhs_quantizer)
    return product, (kept_left, kept_right, lhs_scale, rhs_scale)


def _backward(numbers, static, kept, cotangent):
    kept_left, kept_right, lhs_scale, rhs_scale = kept
    dtype = cotangent.dtype
    left, left_factor = _factor(kept_left, lhs_scale, static.lhs_quantizer, dtype)
    right, right_factor = _factor(kept_right, rhs_scale, static.rhs_quantizer, dtype)
    to_left, to_right = _transposed_products(cotangent, left, right, numbers)
    lhs_bar, lhs_scale_bar = _pullback(
        kept_left, lhs_scale, to_left * right_factor, static.lhs_quantizer
    )
    rhs_bar, rhs_scale_bar = _pullback(
        kept_right, rhs_scale, to_right * left_factor, static.rhs_quantizer
    )
    return (
        lhs_bar.astype(static.lhs_dtype),
        rhs_bar.astype(static.rhs_dtype),
        lhs_scale_bar,
        rhs_scale_bar,
    )


_binary_dot.defvjp(_forward, _backward)


def _encode(x, scale, quantizer) -> Encoded | jax.Array:
    return x if quantizer is None else quantizer.encode(x, scale)


def _residual(x, scale, encoded, quantizer):
    return x if quantizer is None else quantizer.residual(x, scale, encoded)


def _factor(residual, scale, quantizer, dtype):
    """An operand as (array, scalar): codes, which are exact in any float type, and their scale
    where that is one number; else the values, and 1."""
    if quantizer is None:
        return residual.astype(dtype), 1.0
    encoded = quantizer.restore(residual, scale)
    if encoded.offset is None and encoded.scale.ndim == 0:
        return encoded.codes.astype(dtype), encoded.scale
    return encoded.value(dtype), 1.0


def _pullback(residual, scale, cotangent, quantizer):
    if quantizer is None:
        return cotangent, None
    return quantizer.pullback(residual, scale, cotangent)


class _Side(NamedTuple):
    """One operand of a product: the array, its axes by role, its free axes in the product."""

    array: jax.Array
    contract: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    free_in_product: tuple[int, ...]


def _transposed_products(cotangent, left, right, numbers):
    """Cotangents of both operands of `lax.dot_general(left, right, numbers)`."""
    (left_contract, right_contract), (left_batch, right_batch) = numbers
    left_free = _free_axes(left.ndim, left_contract, left_batch)
    right_free = _free_axes(right.ndim, right_contract, right_batch)
    first = len(left_batch)
    middle = first + len(left_free)
    lhs = _Side(left, left_contract, left_batch, left_free, tuple(range(first, middle)))
    rhs = _Side(
        right, right_contract, right_batch, right_free, tuple(range(middle, cotangent.ndim))
    )
    return _cotangent_of(lhs, rhs, cotangent), _cotangent_of(rhs, lhs, cotangent)


def _cotangent_of(own: _Side, other: _Side, cotangent: jax.Array) -> jax.Array:
    """The product of cotangent and other operand, in the axes of the own operand.

    Written out, because autodiff's own product for the right operand comes out transposed, and XLA
    on CPU then leaves its fast matrix product (a linear layer's backward pass took 3 times as
    long). The two factors are multiplied in the order that needs no transpose, if there is one.
    """
    batch_in_product = tuple(range(len(own.batch)))
    # The contracted axes come out in the order that they have in the other operand.
    order = sorted(range(len(own.contract)), key=other.contract.__getitem__)
    contract = tuple(own.contract[i] for i in order)
    axes = (*own.batch, *contract, *own.free)
    if axes == tuple(range(len(axes))):
        numbers = ((other.free, other.free_in_product), (other.batch, batch_in_product))
        return _product(other.array, cotangent, numbers)
    numbers = ((other.free_in_product, other.free), (batch_in_product, other.batch))
    product = _product(cotangent, other.array, numbers)
    axes = (*own.batch, *own.free, *contract)
    return lax.transpose(product, sorted(range(len(axes)), key=axes.__getitem__))


def _product(left: jax.Array, right: jax.Array, numbers: DimensionNumbers) -> jax.Array:
    """Accumulated, and returned, in float32 or wider."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    return lax.dot_general(left, right, numbers, preferred_element_type=wide)


def _free_axes(ndim: int, contract: tuple[int, ...], batch: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i not in contract and i not in batch)


def _multiply(left, right, numbers, compute: str, dtype: Any) -> jax.Array:
    """The product of two operands, each `Encoded` or a plain float array."""
    left_codes, left_scale, left_offset = left if isinstance(left, Encoded) else (left, None, None)
    right_codes, right_scale, _ = right if isinstance(right, Encoded) else (right, None, None)

    scale_type = jnp.promote_types(dtype, jnp.float32)
    if not (isinstance(left, Encoded) and isinstance(right, Encoded)):
        code_type = dtype
    else:
        code_type = {"int8": jnp.int8, "bfloat16": jnp.bfloat16, "float32": scale_type}[compute]
    if code_type == jnp.int8:
        product = lax.dot_general(
            left_codes, right_codes, numbers, preferred_element_type=jnp.int32
        ).astype(scale_type)
    else:
        product = _product(left_codes.astype(code_type), right_codes.astype(code_type), numbers)
    free = (left_codes.ndim, right_codes.ndim)
    if left_offset is not None:
        # sum_k (code * scale + offset) r = scale * sum_k code r + offset * sum_k r
        total = jnp.sum(right_codes.astype(scale_type), axis=numbers[0][1], keepdims=True)
        product = product * left_scale + left_offset * _rhs_to_output(total, numbers, free)
    elif left_scale is not None:
        product = product * _lhs_to_output(left_scale, numbers, free)
    if right_scale is not None:
        product = product * _rhs_to_output(right_scale, numbers, free)
    return product.astype(dtype)


def _lhs_to_output(scale: jax.Array, numbers: DimensionNumbers, ndims: tuple[int, int]):
    """A left operand's scale (scalar, or its shape with 1 at the contracted axes), shaped to
    broadcast over the product: [batch..., left free..., right free...]."""
    if scale.ndim == 0:
        return scale
    (contract, other_contract), (batch, _) = numbers
    free = _free_axes(ndims[0], contract, batch)
    scale = lax.transpose(scale, (*batch, *free, *contract))
    other_free = ndims[1] - len(other_contract) - len(batch)
    return scale.reshape(scale.shape[: len(batch) + len(free)] + (1,) * other_free)


def _rhs_to_output(scale: jax.Array, numbers: DimensionNumbers, ndims: tuple[int, int]):
    """The same for the right operand."""
    if scale.ndim == 0:
        return scale
    (other_contract, contract), (_, batch) = numbers
    free = _free_axes(ndims[1], contract, batch)
    scale = lax.transpose(scale, (*batch, *free, *contract))
    shape = scale.shape
    other_free = ndims[0] - len(other_contract) - len(batch)
    n = len(batch)
    return scale.reshape(shape[:n] + (1,) * other_free + shape[n : n + len(free)])
