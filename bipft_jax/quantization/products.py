"""Products of codes, and of codes with cotangents, in the arithmetic that `arithmetic.py` chooses.

`Numbers` are the dimension numbers of `lax.dot_general`. Operands of attention are
[batch, positions, heads * width] and are multiplied as [batch, heads, positions, width]. They are
split into heads only here, after quantisation and in the type of the product, because TPUs
transpose int8 arrays and masks slowly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bipft_jax.quantization.arithmetic import PLATFORMS, backward_mode, forward_mode, widened

Numbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

_TYPES = {"int8": jnp.int8, "bfloat16": jnp.bfloat16}


def float_product(
    left: jax.Array, right: jax.Array, numbers: Numbers, heads: tuple[int, int], dtype: Any
) -> jax.Array:
    """The product of two arrays, both cast to one float type; accumulated, and returned, in float32
    or wider.

    heads: number of heads into which the last axis of each operand is split; 0 for no split.
    """
    left, right = left.astype(dtype), right.astype(dtype)
    return _accumulated(split_heads(left, heads[0]), split_heads(right, heads[1]), numbers)


def code_product(
    left: jax.Array,
    right: jax.Array,
    numbers: Numbers,
    heads: tuple[int, int],
    compute: str,
    wide: Any,
) -> jax.Array:
    """The product of two int8 arrays of codes, the same in every mode.

    heads: as in `float_product`. wide: type of the result and of the mode "float32", float32 or
    float64.
    """

    def in_mode(mode: str) -> Callable[..., jax.Array]:
        def product(left, right):
            dtype = _TYPES.get(mode, wide)
            left, right = _split_as(dtype, left, heads[0]), _split_as(dtype, right, heads[1])
            return _accumulated(left, right, numbers).astype(wide)

        return product

    best = functools.partial(forward_mode, batched=bool(numbers[1][0]))
    return _chosen(compute, best, in_mode, left, right)


def cotangent_products(
    cotangents: tuple[jax.Array, jax.Array],
    left: jax.Array,
    right: jax.Array,
    numbers: Numbers,
    heads: tuple[int, int],
    backward: str,
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of both operands of `lax.dot_general(left, right, numbers)`, in their shapes (not
    split into heads), float32 or wider.

    cotangents: of the product, for the left and for the right operand; they differ if the left
      operand's scale belongs to the rows of the product.
    left, right: codes, or values of the cotangents' type.
    """

    def in_mode(mode: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
        def products(for_left, for_right, left, right):
            dtype = _TYPES.get(mode, for_left.dtype)
            left = _split_as(dtype, left, heads[0]) if heads[0] else left
            right = _split_as(dtype, right, heads[1]) if heads[1] else right
            cotangents = for_left.astype(dtype), for_right.astype(dtype)
            to_left, to_right = _transposed(cotangents, left, right, numbers)
            return _merged(to_left, heads[0]), _merged(to_right, heads[1])

        return products

    return _chosen(backward, backward_mode, in_mode, *cotangents, left, right)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B, S, heads * d] -> [B, heads, S, d]; returns x unchanged for 0 heads."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) if heads else x


def _accumulated(left: jax.Array, right: jax.Array, numbers: Numbers) -> jax.Array:
    """The product of two arrays of one type: int32 for int8, else float32 or wider."""
    exact = left.dtype == jnp.int8
    wide = jnp.int32 if exact else widened(left.dtype)
    return lax.dot_general(left, right, numbers, preferred_element_type=wide)


def _split_as(dtype: Any, x: jax.Array, heads: int) -> jax.Array:
    """`split_heads` of x cast to a type; without the barrier compilers cast after the split."""
    x = x.astype(dtype)
    return split_heads(lax.optimization_barrier(x), heads) if heads else x


def _merged(x: jax.Array, heads: int) -> jax.Array:
    """The inverse of `split_heads`."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1) if heads else x


def _chosen(mode: str, best: Callable[[str], str], in_mode: Callable, *operands):
    """in_mode(mode)(*operands); for "auto", with the best mode of the target platform."""
    if mode != "auto":
        return in_mode(mode)(*operands)
    branches = {platform: in_mode(best(platform)) for platform in PLATFORMS}
    return lax.platform_dependent(*operands, default=in_mode("float32"), **branches)


class _Side(NamedTuple):
    """One operand of a product: the array, its axes by role, its free axes in the product."""

    array: jax.Array
    contract: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    free_in_product: tuple[int, ...]


def _transposed(cotangents, left, right, numbers):
    for_left, for_right = cotangents
    (left_contract, right_contract), (left_batch, right_batch) = numbers
    left_free = free_axes(left.ndim, left_contract, left_batch)
    right_free = free_axes(right.ndim, right_contract, right_batch)
    first = len(left_batch)
    middle = first + len(left_free)
    lhs = _Side(left, left_contract, left_batch, left_free, tuple(range(first, middle)))
    rhs = _Side(
        right, right_contract, right_batch, right_free, tuple(range(middle, for_right.ndim))
    )
    return _cotangent_of(lhs, rhs, for_left), _cotangent_of(rhs, lhs, for_right)


def _cotangent_of(own: _Side, other: _Side, cotangent: jax.Array) -> jax.Array:
    """The cotangent of the own operand: the product of `cotangent` and the other operand.

    Written out, because autodiff gives the cotangent of the right operand as a transposed product,
    for which XLA on CPU does not use its fast matrix product (a linear layer's backward pass took 3
    times as long). The order of the factors avoids a transpose of the result where possible.
    """
    batch_in_product = tuple(range(len(own.batch)))
    # The product has the contracted axes in their order in the other operand.
    order = sorted(range(len(own.contract)), key=other.contract.__getitem__)
    contract = tuple(own.contract[i] for i in order)
    axes = (*own.batch, *contract, *own.free)
    if axes == tuple(range(len(axes))):
        numbers = ((other.free, other.free_in_product), (other.batch, batch_in_product))
        return _mixed_product(other.array, cotangent, numbers)
    numbers = ((other.free_in_product, other.free), (batch_in_product, other.batch))
    product = _accumulated(cotangent, other.array.astype(cotangent.dtype), numbers)
    axes = (*own.batch, *own.free, *contract)
    return lax.transpose(product, sorted(range(len(axes)), key=axes.__getitem__))


def _mixed_product(codes: jax.Array, cotangent: jax.Array, numbers: Numbers) -> jax.Array:
    """The product of codes with a cotangent, in the cotangent's type.

    In bfloat16 a CPU is fast only if the left operand contracts its last axis (twice as fast, for a
    linear layer's kernel), so on a CPU the codes are transposed first, as bytes.
    """

    def plain(codes, cotangent):
        return _accumulated(codes.astype(cotangent.dtype), cotangent, numbers)

    def transposing(codes, cotangent):
        rows, columns = _matrix(codes), _matrix(cotangent)
        left = _transpose_in_blocks(rows).astype(columns.dtype)
        product = _accumulated(left, columns, (((1,), (0,)), ((), ())))
        return product.reshape(codes.shape[-1:] + cotangent.shape[-1:])

    of_all_but_last = tuple(range(codes.ndim - 1))
    is_of_rows = numbers == ((of_all_but_last, of_all_but_last), ((), ()))
    if cotangent.dtype != jnp.bfloat16 or not is_of_rows or codes.ndim != cotangent.ndim:
        return plain(codes, cotangent)
    return lax.platform_dependent(codes, cotangent, cpu=transposing, default=plain)


def _matrix(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _transpose_in_blocks(x: jax.Array, block: int = 32) -> jax.Array:
    """x.T, in a form that XLA does not recognise as a transpose, which it would fold into the
    product again. Blocks are as large as the shape's factors allow, at most 32 x 32."""
    rows, columns = x.shape
    down, across = math.gcd(rows, block), math.gcd(columns, block)
    blocks = x.reshape(rows // down, down, columns // across, across)
    return blocks.transpose(2, 3, 0, 1).reshape(columns, rows)


def free_axes(ndim: int, contract: tuple[int, ...], batch: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that are neither contracted nor batch axes."""
    return tuple(i for i in range(ndim) if i not in contract and i not in batch)
