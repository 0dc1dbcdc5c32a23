"""Binary attention as one Pallas kernel per pass, for TPUs: scores and probabilities stay on chip.

XLA reads and writes arrays of [B, heads, S, S] several times per layer, and copies queries, keys
and values to split them into heads. Here a program takes the codes of 128 channels (two heads of
64) of one sequence and computes the context, or from its cotangent those of queries, keys and
values. Its intermediate arrays are [keys, queries], so a sum over keys adds whole registers; a sum
along a row would move numbers within registers.

The mathematics is that of `attention.py` (SPEC 2.2) with the quantizers `SIGNED` and `UNSIGNED`.
Softmax and elementwise operations are float32. On platforms other than TPUs the kernels are
interpreted: slow, for tests.

Dimension letters: B batch, S queries, T keys, h heads, H channels of all heads, C channels of a
program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bipft_jax.models.axes import BATCH, HEADS, on_each_device, shards
from bipft_jax.models.dropout import kept
from bipft_jax.quantization.arithmetic import backward_mode
from bipft_jax.quantization.binary_dot import kept_for_backward
from bipft_jax.quantization.elastic import (
    ElasticSigned,
    ElasticUnsigned,
    clamped,
    scale_gradient,
)

SIGNED = ElasticSigned()  # of queries, keys and values
UNSIGNED = ElasticUnsigned()  # of probabilities

CHANNELS = 128  # of a program: the number of lanes of a TPU register
_ROWS = 8  # sublanes of a TPU register
_VMEM_BYTES = 64 * 2**20  # of the 128 MiB that v5e and v6e have


class Scales(NamedTuple):
    """The learned scalar scales, float32."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    probs: jax.Array


class Residuals(NamedTuple):
    """BiPFT-B's estimated residuals: of the scores, [B, S, T], shared by all heads, and of the
    values, [B, T], shared by all channels."""

    scores: jax.Array
    values: jax.Array


class DropoutWords(NamedTuple):
    """`dropout.mask_words` of the probabilities: uint32 [B, h, S] and [T]."""

    of_queries: jax.Array
    of_keys: jax.Array


class Static(NamedTuple):
    """Static arguments of the compiled programs.

    dropout: rate, used if words are given. dtype: of the context. gradient_dtype: to which
    cotangents are rounded for products.
    """

    heads: int
    dropout: float
    dtype: Any
    gradient_dtype: Any


def fused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    scales: Scales,
    residuals: Residuals | None,
    words: DropoutWords | None,
    *,
    heads: int,
    dropout: float,
    backward: str,
) -> jax.Array:
    """Quantised softmax attention with straight-through gradients.

    Arguments:
      query, key, value: [B, S, H], float32 or bfloat16.
      mask: [B, T], 1 at real tokens.
      dropout: rate, used if `words` is not None.
      backward: as for `binary_dot_general`; "auto" is the mode for TPUs.

    Returns: context [B, S, H], in the type of the queries.

    Raises: ValueError for unsupported shapes: S must be a multiple of 128, a head's width a divisor
      of 64, and the channels per device a multiple of 128.
    """
    _check_shapes(query.shape[1], query.shape[2], heads)
    mode = backward_mode("tpu") if backward == "auto" else backward
    gradient_dtype = jnp.bfloat16 if mode == "bfloat16" else query.dtype
    static = Static(heads, dropout, query.dtype, gradient_dtype)
    return _attention(query, key, value, mask, scales, residuals, words, static)


def _check_shapes(length: int, hidden: int, heads: int) -> None:
    width, channels = hidden // heads, hidden // shards(HEADS)
    if length % CHANNELS or (CHANNELS // 2) % width or channels % CHANNELS:
        raise ValueError(
            f"fused attention takes sequences of a multiple of {CHANNELS} tokens, heads whose "
            f"width divides {CHANNELS // 2} and a multiple of {CHANNELS} channels on a device, not "
            f"{length} tokens, heads of {width} and {channels} channels"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(query, key, value, mask, scales, residuals, words, static):
    return _forward(query, key, value, mask, scales, residuals, words, static)[0]


def _forward(query, key, value, mask, scales, residuals, words, static):
    operands = zip((query, key, value), scales, strict=False)  # probabilities keep no codes
    codes = tuple(kept_for_backward(x, scale, SIGNED) for x, scale in operands)
    operands = _operands(codes, mask, scales, residuals, words, static)
    (context,) = _on_each_device(_call_forward, operands, static, [_SLAB])
    return context, (codes, mask, scales, residuals, words)


def _backward(static, held, cotangent):
    codes, mask, scales, residuals, words = held
    operands = _operands(codes, mask, scales, residuals, words, static)
    operands["cotangent"] = cotangent
    out_axes = [_SLAB, _SLAB, _SLAB, (BATCH, HEADS, None, None)]
    if residuals is not None:
        out_axes += [(HEADS, BATCH, None, None)] * 2
    of_query, of_key, of_value, sums, *of_residuals = _on_each_device(
        _call_backward, operands, static, out_axes
    )
    batch, length, hidden = cotangent.shape
    factors = Scales(*(clamped(scale, scale) for scale in scales))
    products, values, probs = jnp.sum(sums, axis=(0, 1, 3))[:3]
    elements = batch * length * hidden, batch * static.heads * length * length
    of_scales = Scales(
        scale_gradient(products * factors.key, elements[0], SIGNED.highest, scales.query),
        scale_gradient(products * factors.query, elements[0], SIGNED.highest, scales.key),
        scale_gradient(values * factors.probs, elements[0], SIGNED.highest, scales.value),
        scale_gradient(probs, elements[1], UNSIGNED.highest, scales.probs),
    )
    if residuals is not None:
        scores, values = (jnp.sum(part, axis=0) for part in of_residuals)
        of_residuals = Residuals(
            scores.swapaxes(1, 2).astype(residuals.scores.dtype),
            values[..., 0].astype(residuals.values.dtype),
        )
    return of_query, of_key, of_value, None, of_scales, of_residuals or None, None


_attention.defvjp(_forward, _backward)

_SLAB = (BATCH, None, HEADS)  # the axes of [B, S, H]
_AXES = {
    "scales": (None,),
    "bias": (BATCH, None, None),
    "score_residual": (BATCH, None, None),
    "value_residual": (BATCH, None, None),
    "query_words": (BATCH, HEADS, None, None),
    "key_words": (None, None),
    **dict.fromkeys(("query", "key", "value", "cotangent"), _SLAB),
}


def _operands(codes, mask, scales, residuals, words, static: Static) -> dict[str, jax.Array]:
    """The inputs of the kernels by name, in the layout that they read."""
    query, key, value = codes
    lowest = float(jnp.finfo(static.dtype).min)
    operands = {
        "scales": jnp.stack([clamped(scale, scale).astype(jnp.float32) for scale in scales]),
        "query": query,
        "key": key,
        "value": value,
        "bias": (1 - mask).astype(jnp.float32)[:, None] * lowest,  # [B, 1, T]
    }
    if residuals is not None:
        operands["score_residual"] = residuals.scores.swapaxes(1, 2)  # [B, T, S]
        operands["value_residual"] = residuals.values.astype(jnp.float32)[:, None]
    if words is not None:
        batch, heads, length = words.of_queries.shape
        together = max(1, CHANNELS * heads // query.shape[2])  # heads per program
        operands["query_words"] = words.of_queries.reshape(batch, -1, together, length)
        operands["key_words"] = words.of_keys[:, None]
    return operands


def _on_each_device(call: Callable, operands: dict[str, jax.Array], static: Static, out_axes):
    names = tuple(operands)

    def local(*arrays):
        parts = dict(zip(names, arrays, strict=True))
        of_platform = {
            name: functools.partial(call, width=width, static=static, interpret=name != "tpu")
            for name in ("tpu", "default")
        }
        return lax.platform_dependent(parts, **of_platform)

    width = operands["query"].shape[2] // static.heads
    in_axes = [_AXES[name] for name in names]
    return on_each_device(local, in_axes, out_axes)(*operands.values())


def _call_forward(operands, *, width: int, static: Static, interpret: bool):
    query = operands["query"]
    specs = _specs(operands, width)
    shapes = (jax.ShapeDtypeStruct(query.shape, static.dtype),)
    return pl.pallas_call(
        functools.partial(_forward_kernel, tuple(operands), width, static),
        out_shape=shapes,
        grid=(query.shape[0], query.shape[2] // CHANNELS),
        in_specs=[specs[name] for name in operands],
        out_specs=(specs["query"],),
        **_options("binary_attention", operands, shapes, 2, width, interpret),
    )(*operands.values())


def _call_backward(operands, *, width: int, static: Static, interpret: bool):
    batch, length, channels = operands["query"].shape
    slabs = channels // CHANNELS
    specs = _specs(operands, width)
    specs["sums"] = pl.BlockSpec((1, 1, _ROWS, CHANNELS), lambda b, c: (b, c, 0, 0))
    shapes = [jax.ShapeDtypeStruct(operands["query"].shape, static.dtype)] * 3
    shapes.append(jax.ShapeDtypeStruct((batch, slabs, _ROWS, CHANNELS), jnp.float32))
    results = ["query", "key", "value", "sums"]
    if "score_residual" in operands:
        # All programs of a sequence add to the same blocks.
        specs["of_scores"] = pl.BlockSpec((1, 1, length, length), lambda b, c: (0, b, 0, 0))
        specs["of_values"] = pl.BlockSpec((1, 1, length, 1), lambda b, c: (0, b, 0, 0))
        shapes.append(jax.ShapeDtypeStruct((1, batch, length, length), jnp.float32))
        shapes.append(jax.ShapeDtypeStruct((1, batch, length, 1), jnp.float32))
        results += ["of_scores", "of_values"]
    return pl.pallas_call(
        functools.partial(_backward_kernel, tuple(operands), width, static),
        out_shape=tuple(shapes),
        grid=(batch, slabs),
        in_specs=[specs[name] for name in operands],
        out_specs=tuple(specs[name] for name in results),
        **_options("binary_attention_gradient", operands, shapes, 5, width, interpret),
    )(*operands.values())


def _options(
    name: str, operands, shapes, products: int, width: int, interpret: bool
) -> dict[str, Any]:
    """shapes: of the results. products: number of S x T x width matrix products per head."""
    batch, length, channels = operands["query"].shape
    moved = [*operands.values(), *shapes]
    return dict(
        name=name,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * length * length * channels,
            transcendentals=batch * (channels // width) * length * length,
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
        ),
    )


def _specs(operands: dict[str, jax.Array], width: int) -> dict[str, pl.BlockSpec]:
    """The blocks that the program (sequence, slab of channels) reads, by operand."""
    length = operands["query"].shape[1]
    slab = pl.BlockSpec((1, length, CHANNELS), lambda b, c: (b, 0, c))
    row = pl.BlockSpec((1, 1, length), lambda b, c: (b, 0, 0))
    return {
        "scales": pl.BlockSpec(memory_space=pltpu.SMEM),
        "bias": row,
        "score_residual": pl.BlockSpec((1, length, length), lambda b, c: (b, 0, 0)),
        "value_residual": row,
        "query_words": pl.BlockSpec((1, 1, CHANNELS // width, length), lambda b, c: (b, c, 0, 0)),
        "key_words": pl.BlockSpec((length, 1), lambda b, c: (0, 0)),
        **dict.fromkeys(("query", "key", "value", "cotangent"), slab),
    }


class _Program:
    """The blocks of a program, and the computations that both kernels share."""

    def __init__(self, names, refs, width: int, static: Static, product_dtype: Any):
        self.refs = dict(zip(names, refs, strict=True))
        self.width, self.static = width, static
        scales = self.refs["scales"]
        self.scales = Scales(*(scales[i] for i in range(len(Scales._fields))))
        self.query, self.key, self.value = (
            self.codes(name).astype(product_dtype) for name in ("query", "key", "value")
        )
        self.bias_Tx1 = _column(self.refs["bias"][0])
        self.keep = 1.0 - static.dropout if "query_words" in self.refs else 1.0
        self.dv_Tx1 = None
        if "value_residual" in self.refs:
            self.dv_Tx1 = _column(self.refs["value_residual"][0])

    def codes(self, name: str) -> jax.Array:
        """[S, C], float32."""
        return jnp.clip(self.refs[name][0].astype(jnp.float32), -1.0, 1.0)

    def passed(self, name: str, cotangent: jax.Array) -> jax.Array:
        """The cotangent inside the window that the operand's kept codes mark, else 0."""
        inside = jnp.abs(self.refs[name][0].astype(jnp.float32)) <= 1.0
        return jnp.where(inside, cotangent, 0.0)

    def heads(self):
        """The heads of the program: (number, mask of its channels [1, C])."""
        of_channel = lax.div(lax.broadcasted_iota(jnp.int32, (1, CHANNELS), 1), self.width)
        return [(head, of_channel == head) for head in range(CHANNELS // self.width)]

    def exponentials(self, in_head) -> tuple[jax.Array, jax.Array]:
        """Numerator [T, S] and denominator [1, S] of one head's softmax."""
        query = jnp.where(in_head, self.query, 0.0).astype(self.query.dtype)
        scores_TxS = _product(self.key, query, 1, 1) * (self.scales.query * self.scales.key)
        if "score_residual" in self.refs:
            scores_TxS = scores_TxS + self.refs["score_residual"][0].astype(jnp.float32)
        scores_TxS = scores_TxS * (1.0 / math.sqrt(self.width)) + self.bias_Tx1
        e_TxS = jnp.exp(scores_TxS - jnp.max(scores_TxS, axis=0, keepdims=True))
        return e_TxS, jnp.sum(e_TxS, axis=0, keepdims=True)

    def kept(self, head: int) -> jax.Array | None:
        """The dropout mask of a head's probabilities, [T, S]; None without dropout."""
        if "query_words" not in self.refs:
            return None
        of_queries = self.refs["query_words"][0, 0, head : head + 1]
        return kept(of_queries + self.refs["key_words"][...], self.static.dropout)


def _forward_kernel(names, width: int, static: Static, *refs):
    *refs, context_ref = refs
    program = _Program(names, refs, width, static, static.dtype)
    context_SxC = jnp.zeros(context_ref.shape[1:], jnp.float32)
    for head, in_head in program.heads():
        e_TxS, sums_1xS = program.exponentials(in_head)
        # p / keep > scale / 2, without a division
        on_TxS = e_TxS > sums_1xS * (0.5 * program.keep * program.scales.probs)
        if (kept_TxS := program.kept(head)) is not None:
            on_TxS = on_TxS & kept_TxS
        on_TxS = jnp.where(on_TxS, 1.0, 0.0).astype(static.dtype)
        if program.dv_Tx1 is None:
            part_SxC = _product(on_TxS, program.value, 0, 0) * program.scales.value
        else:
            # The channels of the other heads are free: there the product sums the residuals.
            value = jnp.where(in_head, program.value.astype(jnp.float32), program.dv_Tx1)
            part_SxC = _product(on_TxS, value.astype(static.dtype), 0, 0)
            part_SxC = part_SxC * program.scales.value + pltpu.roll(part_SxC, width, 1)
        context_SxC = jnp.where(in_head, part_SxC, context_SxC)
    context_ref[0] = (context_SxC * program.scales.probs).astype(context_ref.dtype)


def _backward_kernel(names, width: int, static: Static, *refs):
    program = _Program(names, refs[: len(names)], width, static, static.gradient_dtype)
    of_query_ref, of_key_ref, of_value_ref, sums_ref, *of_residuals = refs[len(names) :]
    cotangent = program.refs["cotangent"][0].astype(static.gradient_dtype)
    if of_residuals:

        @pl.when(pl.program_id(1) == 0)
        def _():
            for ref in of_residuals:
                ref[...] = jnp.zeros_like(ref)

    to_query = to_key = to_value = jnp.zeros(cotangent.shape, jnp.float32)
    along_1xS = jnp.zeros((1, cotangent.shape[0]), jnp.float32)
    for head, in_head in program.heads():
        of_head = jnp.where(in_head, cotangent, 0.0).astype(cotangent.dtype)
        query = jnp.where(in_head, program.query, 0.0).astype(cotangent.dtype)
        e_TxS, sums_1xS = program.exponentials(in_head)
        probs_TxS = e_TxS * (1.0 / sums_1xS)
        ratio_TxS = probs_TxS * (1.0 / (program.keep * program.scales.probs))
        kept_TxS = program.kept(head)
        if kept_TxS is not None:
            ratio_TxS = jnp.where(kept_TxS, ratio_TxS, 0.0)
        on_TxS = jnp.where(ratio_TxS > 0.5, 1.0, 0.0)
        passed_TxS = ratio_TxS <= 1.0

        of_probs_TxS = _product(program.value, of_head, 1, 1) * program.scales.value
        if program.dv_Tx1 is not None:
            ones = jnp.ones((_ROWS, CHANNELS), cotangent.dtype)
            of_probs_TxS = of_probs_TxS + program.dv_Tx1 * _product(ones, of_head, 1, 1)[:1]
        slope_TxS = jnp.where(passed_TxS, on_TxS - ratio_TxS, 1.0)
        along_1xS = along_1xS + jnp.sum(of_probs_TxS * slope_TxS, axis=0, keepdims=True)
        if kept_TxS is not None:
            passed_TxS = passed_TxS & kept_TxS
        of_softmax_TxS = jnp.where(passed_TxS, of_probs_TxS * (1.0 / program.keep), 0.0)
        mean_1xS = jnp.sum(of_softmax_TxS * probs_TxS, axis=0, keepdims=True)
        of_scores_TxS = probs_TxS * (of_softmax_TxS - mean_1xS) * (1.0 / math.sqrt(width))
        if of_residuals:
            of_residuals[0][0, 0] += of_scores_TxS

        of_scores_TxS = of_scores_TxS.astype(cotangent.dtype)
        to_query = jnp.where(in_head, _product(of_scores_TxS, program.key, 0, 0), to_query)
        to_key = to_key + _product(of_scores_TxS, query, 1, 0)
        to_value = to_value + _product(on_TxS.astype(cotangent.dtype), of_head, 1, 0)

    for name, ref, cotangent, factor in (
        ("query", of_query_ref, to_query, program.scales.key),
        ("key", of_key_ref, to_key, program.scales.query),
        ("value", of_value_ref, to_value, program.scales.probs),
    ):
        ref[0] = program.passed(name, cotangent * factor).astype(ref.dtype)
    sums_ref[...] = jnp.zeros_like(sums_ref)
    sums_ref[0, 0, 0:1] = jnp.sum(to_query * program.codes("query"), axis=0, keepdims=True)
    sums_ref[0, 0, 1:2] = jnp.sum(to_value * program.codes("value"), axis=0, keepdims=True)
    for first in range(0, along_1xS.shape[1], CHANNELS):
        sums_ref[0, 0, 2:3] += along_1xS[:, first : first + CHANNELS]
    if of_residuals:
        summed_Tx1 = jnp.sum(to_value, axis=1, keepdims=True)
        of_residuals[1][0, 0] += program.scales.probs * summed_Tx1


def _column(row_1xT: jax.Array) -> jax.Array:
    """[1, T] -> [T, 1]."""
    return jnp.transpose(jnp.broadcast_to(row_1xT, (_ROWS, row_1xT.shape[1])))[:, :1]


def _product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """The product of two matrices, contracted along those axes, accumulated in float32."""
    exact = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
