"""`binary_dot_general`: the only place where quantised operands are multiplied.

Forward: both operands are quantised, their *codes* are multiplied (exactly: sums of products of
small integers), and the scales are applied once to the result. Backward: straight-through, from
what each quantizer keeps (`quantizers.py`): for 1-bit signed activations and weights one byte an
element, never the float operand.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bipft_jax.quantization.quantizers import ElasticUnsigned, Encoded, Quantizer

DimensionNumbers = tuple[
    tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]
]

COMPUTE_MODES = ("auto", "int8", "bfloat16", "float32")

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
      lhs, rhs: float arrays of one dtype.
      dimension_numbers: as `lax.dot_general` takes them.
      lhs_quantizer, rhs_quantizer: rows of the quantizer table; None leaves an operand as it is
        (then the product is made in the operands' float type). None for both is an ordinary
        product, with this op's layout of the backward products.
      lhs_scale, rhs_scale: learned scalar scales, for the quantizers that have one.
      compute: arithmetic of the product of codes, "int8" (int8 x int8 -> int32), "bfloat16"
        (accumulated in float32), "float32", or "auto" (`AUTO_COMPUTE`). The codes are the same in
        all of them, and so are the results while sums stay below 2^24.

    Returns: the product, in the operands' dtype, dimensions ordered as by `lax.dot_general`.

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
    return _binary_dot(
        lhs,
        rhs,
        lhs_scale,
        rhs_scale,
        numbers,
        lhs_quantizer,
        rhs_quantizer,
        resolve_compute(compute),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _binary_dot(lhs, rhs, lhs_scale, rhs_scale, numbers, lhs_quantizer, rhs_quantizer, compute):
    left = _encode(lhs, lhs_scale, lhs_quantizer)
    right = _encode(rhs, rhs_scale, rhs_quantizer)
    return _multiply(left, right, numbers, compute, lhs.dtype)


def _forward(lhs, rhs, lhs_scale, rhs_scale, numbers, lhs_quantizer, rhs_quantizer, compute):
    left = _encode(lhs, lhs_scale, lhs_quantizer)
    right = _encode(rhs, rhs_scale, rhs_quantizer)
    product = _multiply(left, right, numbers, compute, lhs.dtype)
    kept_left = _residual(lhs, lhs_scale, left, lhs_quantizer)
    kept_right = _residual(rhs, rhs_scale, right, rhs_quantizer)
    return product, (kept_left, kept_right, lhs_scale, rhs_scale)


def _backward(numbers, lhs_quantizer, rhs_quantizer, compute, kept, cotangent):
    kept_left, kept_right, lhs_scale, rhs_scale = kept
    dtype = cotangent.dtype
    left = _restored_value(kept_left, lhs_scale, lhs_quantizer, dtype)
    right = _restored_value(kept_right, rhs_scale, rhs_quantizer, dtype)
    left_cotangent, right_cotangent = _transposed_products(cotangent, left, right, numbers)
    lhs_bar, lhs_scale_bar = _pullback(kept_left, lhs_scale, left_cotangent, lhs_quantizer)
    rhs_bar, rhs_scale_bar = _pullback(kept_right, rhs_scale, right_cotangent, rhs_quantizer)
    return lhs_bar, rhs_bar, lhs_scale_bar, rhs_scale_bar


_binary_dot.defvjp(_forward, _backward)


def _encode(x, scale, quantizer) -> Encoded | jax.Array:
    return x if quantizer is None else quantizer.encode(x, scale)


def _residual(x, scale, encoded, quantizer):
    return x if quantizer is None else quantizer.residual(x, scale, encoded)


def _restored_value(residual, scale, quantizer, dtype):
    return residual if quantizer is None else quantizer.restore(residual, scale).value(dtype)


def _pullback(residual, scale, cotangent, quantizer):
    if quantizer is None:
        return cotangent, None
    return quantizer.pullback(residual, scale, cotangent)


def _transposed_products(cotangent, left, right, numbers):
    """Cotangents of both operands of `lax.dot_general(left, right, numbers)`.

    Written out, because autodiff's own product for the right operand comes out transposed, and XLA
    on CPU then leaves its fast matrix product (measured: 5 times slower). The order of the two
    factors is chosen so that the result needs no transpose where that is possible.
    """
    (left_contract, right_contract), (left_batch, right_batch) = numbers
    batches = len(left_batch)
    left_free = _free_axes(left.ndim, left_contract, left_batch)
    right_free = _free_axes(right.ndim, right_contract, right_batch)
    out_batch = tuple(range(batches))
    out_left = tuple(range(batches, batches + len(left_free)))
    out_right = tuple(range(batches + len(left_free), cotangent.ndim))

    def product(free, contract, batch, out_free, other, other_free, other_contract, other_batch):
        """[batch, out_free..., other_contract...] or [batch, other_contract..., out_free...],
        permuted to the operand with those axes."""
        # The contracted axes come out in ascending order of the other operand's axes.
        order = sorted(range(len(contract)), key=lambda i: other_contract[i])
        own_contract = tuple(contract[i] for i in order)
        cotangent_first = (*batch, *free, *own_contract)
        other_first = (*batch, *own_contract, *free)
        if other_first == tuple(range(len(other_first))):
            numbers = ((other_free, out_free), (other_batch, out_batch))
            return lax.dot_general(other, cotangent, numbers)
        numbers = ((out_free, other_free), (out_batch, other_batch))
        result = lax.dot_general(cotangent, other, numbers)
        return lax.transpose(result, _inverse(cotangent_first))

    return (
        product(
            left_free, left_contract, left_batch, out_right,
            right, right_free, right_contract, right_batch,
        ),
        product(
            right_free, right_contract, right_batch, out_left,
            left, left_free, left_contract, left_batch,
        ),
    )  # fmt: skip


def _free_axes(ndim: int, contract: tuple[int, ...], batch: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i not in contract and i not in batch)


def _inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def _multiply(left, right, numbers, compute: str, dtype: Any) -> jax.Array:
    """The product of two operands, each `Encoded` or a plain float array."""
    if not (isinstance(left, Encoded) and isinstance(right, Encoded)):
        compute = "float32"
    left_codes, left_scale, left_offset = left if isinstance(left, Encoded) else (left, None, None)
    right_codes, right_scale, _ = right if isinstance(right, Encoded) else (right, None, None)

    scale_type = jnp.promote_types(dtype, jnp.float32)
    if compute == "int8":
        product = lax.dot_general(
            left_codes, right_codes, numbers, preferred_element_type=jnp.int32
        ).astype(scale_type)
    else:
        code_type = jnp.bfloat16 if compute == "bfloat16" else scale_type
        product = lax.dot_general(
            left_codes.astype(code_type),
            right_codes.astype(code_type),
            numbers,
            preferred_element_type=scale_type,
        )
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
