"""Layers that quantise their operands: `BinaryDense`, `BinaryEmbed`, and learned scales.

A layer whose quantizer is `None` is the ordinary full-precision layer.

Learned scales are initialised to NaN ("not calibrated"). Applied with `mutable=["calibration"]`, a
module replaces every NaN scale by its quantizer's `initial_scale` of the tensor to quantise, uses
it, and reports it in the "calibration" collection (`training/state.py` writes it into the
parameters). Other scales do not change, so inherited scales keep their values (SPEC 1.4), and a
missing calibration makes the gradient NaN.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from bipft_jax.models.axes import (
    BATCH,
    constrained,
    kernel_axes,
    kernel_placement,
    splits_inputs,
)
from bipft_jax.models.normalization import LayerNorm, row_for
from bipft_jax.quantization.arithmetic import widened
from bipft_jax.quantization.binary_dot import binary_dot_general
from bipft_jax.quantization.quantizers import MeanBinarizer, Quantizer, RowBinarizer

# Names of all `BinaryDense` modules of encoder and decoder.
BINARY_LINEARS = frozenset(
    "query key value attention_output ffn_input ffn_gate ffn_output pooler".split()
)
LINEAR_INPUT = (
    "linear_input"  # the name of a linear's float input, for policies of `jax.checkpoint`
)
# The collection of kernels that are quantised already: what `kept_for_backward` returns of them.
KEPT = "kept_weights"
SCALE_SUFFIX = "_scale"  # ends the parameter names of learned scales, and no others


def _uninitialised(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    return jnp.full(shape, jnp.nan, jnp.float32)


def learned_scale(
    module: nn.Module, name: str, quantizer: Quantizer | None, x: jax.Array | None = None
):
    """The learned scalar scale `name` of `module`; None if the quantizer learns none.

    x: the tensor to quantise, needed for calibration only.
    """
    if quantizer is None or not quantizer.learned_scale:
        return None
    scale = module.param(name, _uninitialised)
    if module.is_mutable_collection("calibration"):
        scale = jnp.where(jnp.isnan(scale), quantizer.initial_scale(x).astype(scale.dtype), scale)
        module.variable("calibration", name, lambda: scale).value = scale
    return scale


def dense_initializer(initializer_range: float) -> nn.initializers.Initializer:
    """N(0, initializer_range), BERT's initialisation of every kernel."""
    return nn.initializers.normal(initializer_range)


def logits_dtype(dtype: Any) -> Any:
    """The type of logits: float32, or float64 for float64 activations. bfloat16's 8 bits would lose
    the rank order."""
    return widened(dtype)


class BinaryDense(nn.Module):
    """y = Q(x + shift) @ B(kernel) + bias (SPEC 1.5).

    use_bias: whether it has a bias.
    groups: the axis of the kernel that `tensor` splits (`models/axes.py`, by the module's name) is
      quantised in so many groups of neighbours, each with statistics of its own (BitNet SPEC 1.3).
      Groups of inputs also group the input's quantizer, and their products are added.

    Parameters: kernel float32 [in, features], bias [features]; with shifted_input also input_shift
    [in] (added before quantising, starts at 0); input_scale [] if the input quantizer learns one.
    With a variable kernel in `KEPT`, the kernel is not quantised here.
    """

    features: int
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    shifted_input: bool
    compute: str
    backward: str
    initializer_range: float
    dtype: Any
    use_bias: bool = True
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., in] -> [..., features], in `dtype`."""
        width = x.shape[-1]
        initializer = dense_initializer(self.initializer_range)
        kernel = self.param("kernel", initializer, (width, self.features), jnp.float32)
        x = x.astype(self.dtype)
        if self.shifted_input:
            shift = self.param("input_shift", nn.initializers.zeros, (width,), jnp.float32)
            x = added_to_rows(x, shift)
        x = checkpoint_name(x, LINEAR_INPUT)
        y = self._product(x, kernel if self.weight_quantizer else kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = added_to_rows(y, bias)
        return constrained(y, BATCH, *[None] * (y.ndim - 2), kernel_axes(self.name)[1])

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """[..., in] and [in, features] -> [..., features]."""
        last, of_inputs = x.ndim - 1, self.groups > 1 and splits_inputs(self.name)
        numbers = (((last,), (0,)), ((), ()))
        kernel, weight_quantizer = in_groups(self.name, kernel, self.weight_quantizer, self.groups)
        if of_inputs:
            x = _split(x, last, self.groups)
            x = constrained(x, BATCH, *[None] * (last - 1), kernel_axes(self.name)[0], None)
            numbers = (((x.ndim - 1,), (1,)), ((last,), (0,)))
        product = binary_dot_general(
            x,
            kernel,
            numbers,
            lhs_quantizer=self.input_quantizer,
            rhs_quantizer=weight_quantizer,
            lhs_scale=learned_scale(self, "input_scale", self.input_quantizer, x),
            rhs_kept=self.get_variable(KEPT, "kernel"),
            rhs_placement=kernel_placement(self.name, self.groups),
            compute=self.compute,
            backward=self.backward,
        )
        if of_inputs:
            return jnp.sum(product, axis=0)
        return product.reshape(*x.shape[:-1], self.features)


def in_groups(
    name: str | None, kernel: jax.Array, quantizer: Quantizer | None, groups: int
) -> tuple[jax.Array, Quantizer | None]:
    """The kernel [in, features] of the linear `name` with its grouped axis split in two, and the
    quantizer of the groups."""
    if groups == 1:
        return kernel, quantizer
    axis = 0 if splits_inputs(name) else 1
    if quantizer is not None:
        quantizer = dataclasses.replace(quantizer, group_axis=axis)
    return _split(kernel, axis, groups), quantizer


def _split(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """[..., n, ...] -> [..., groups, n / groups, ...]."""
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])


@jax.custom_vjp
def added_to_rows(x: jax.Array, row: jax.Array) -> jax.Array:
    """x [..., n] + row [n], in x's type. The gradient of `row` is summed in float32 or wider: more
    exact than autodiff's sum in bfloat16, and at half the cost on a TPU."""
    return x + row_for(x, row).astype(x.dtype)


def _added_backward(row, cotangent):
    wide = cotangent.astype(np.promote_types(cotangent.dtype, row.dtype))
    return cotangent, jnp.sum(wide, axis=range(cotangent.ndim - 1)).astype(row.dtype)


added_to_rows.defvjp(lambda x, row: (added_to_rows(x, row), row), _added_backward)


class LowRank(nn.Module):
    """A full-precision map of low rank, x A B, without bias (SPEC 2.3, `improve_linear`).

    Parameters: down/kernel [in, rank], up/kernel [rank, features].
    """

    rank: int
    features: int
    initializer_range: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., in] -> [..., features]."""
        for name, width in (("down", self.rank), ("up", self.features)):
            x = nn.Dense(
                width,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=dense_initializer(self.initializer_range),
                name=name,
            )(x)
        return x


class BinaryEmbed(nn.Module):
    """Word embedding that binarises the looked-up rows (SPEC 1.6).

    padded: whether id 0 is padding, whose row starts at zero (SPEC 2.4) and whose lookups have no
      gradient.

    Parameter: embedding [vocab, features].
    """

    vocab_size: int
    features: int
    quantizer: MeanBinarizer | RowBinarizer | None
    initializer_range: float
    dtype: Any
    padded: bool = True

    def setup(self):
        """Declares the table."""

        def initializer(key, shape, dtype):
            table = dense_initializer(self.initializer_range)(key, shape, dtype)
            return table.at[0].set(0.0) if self.padded else table

        shape = self.vocab_size, self.features
        self.embedding = self.param("embedding", initializer, shape, jnp.float32)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids: int [...] -> [..., features]."""
        rows = self.embedding[ids]
        if self.padded:
            rows = jnp.where((ids == 0)[..., None], jax.lax.stop_gradient(rows), rows)
        if self.quantizer is not None:
            flat = rows.reshape(-1, self.features)
            rows = self.quantizer.lookup(flat, self.embedding).reshape(rows.shape)
        return rows.astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """x: [..., features] -> logits [..., vocab], float32: x times the *latent* embedding
        (SPEC 2.2)."""
        table = self.embedding.astype(self.dtype)
        return jnp.matmul(x, table.T, preferred_element_type=logits_dtype(self.dtype))


def binary_dense(config, features: int, input_quantizer, name: str | None) -> BinaryDense:
    """The recipe's linear; input_quantizer: the recipe's quantizer of its input."""
    return BinaryDense(
        features,
        config.recipe.weight,
        input_quantizer,
        config.recipe.shifted_input,
        config.compute,
        config.backward,
        config.initializer_range,
        jnp.dtype(config.dtype),
        name=name,
    )


def layer_norm(config, name: str | None) -> LayerNorm:
    """The recipe's LayerNorm."""
    return LayerNorm(config.layer_norm_epsilon, jnp.dtype(config.dtype), name=name)


def low_rank(config, name: str) -> LowRank:
    """The recipe's low-rank correction of a linear with `hidden` outputs."""
    return LowRank(
        config.recipe.lora_rank,
        config.hidden,
        config.initializer_range,
        jnp.dtype(config.dtype),
        name=name,
    )
