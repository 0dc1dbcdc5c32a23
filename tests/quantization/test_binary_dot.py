"""The binary dot against quantising each operand and multiplying the values."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bipft_jax.pods import hlo
from bipft_jax.quantization import arithmetic
from bipft_jax.quantization.binary_dot import binary_dot_general
from bipft_jax.quantization.encoded import quantize
from bipft_jax.quantization.quantizers import (
    AbsMax,
    ElasticSigned,
    ElasticUnsigned,
    MeanBinarizer,
    RowBinarizer,
    SignBinarizer,
    StepBinarizer,
    TernaryMean,
)

DENSE = (((2,), (0,)), ((), ()))
SCORES = (((3,), (3,)), ((0, 1), (0, 1)))
CONTEXT = (((3,), (2,)), ((0, 1), (0, 1)))

# name: (lhs shape, rhs shape, dimension numbers, lhs quantizer, rhs quantizer)
CASES = {
    "linear": ((2, 6, 8), (8, 5), DENSE, ElasticSigned(1), MeanBinarizer()),
    # Of more than one block of the transpose that a CPU's gradient is made with.
    "wide linear": ((2, 32, 96), (96, 5), DENSE, ElasticSigned(1), MeanBinarizer()),
    "linear, transposed kernel": (
        (2, 6, 8),
        (5, 8),
        (((2,), (1,)), ((), ())),
        ElasticSigned(2),
        MeanBinarizer(per_row=True),
    ),
    "8-bit unsigned linear": ((2, 6, 8), (8, 5), DENSE, ElasticUnsigned(8), MeanBinarizer()),
    "scores": ((2, 3, 4, 8), (2, 3, 5, 8), SCORES, ElasticSigned(1), ElasticSigned(1)),
    "context": ((2, 3, 4, 5), (2, 3, 5, 8), CONTEXT, ElasticUnsigned(1), ElasticSigned(1)),
    "4-bit context": ((2, 3, 4, 5), (2, 3, 5, 8), CONTEXT, ElasticUnsigned(4), ElasticSigned(4)),
    "two contracted axes": (
        (3, 4, 6),
        (6, 4, 5),
        (((2, 1), (0, 1)), ((), ())),
        ElasticSigned(1),
        ElasticSigned(8),
    ),
    "linear of signs": ((2, 6, 8), (8, 5), DENSE, SignBinarizer(True), RowBinarizer(axis=0)),
    "context of scores": (
        (2, 3, 4, 5),
        (2, 3, 5, 8),
        CONTEXT,
        StepBinarizer(),
        SignBinarizer(False),
    ),
    "tokens": ((2, 6, 8), (8, 5), DENSE, AbsMax(), TernaryMean()),
    "4-bit tokens": ((2, 6, 8), (8, 5), DENSE, AbsMax(bits=4), MeanBinarizer()),
    "shifted tokens": ((2, 6, 8), (8, 5), DENSE, AbsMax(shifted=True), MeanBinarizer()),
    "tokens and a learned scale": ((2, 6, 8), (8, 5), DENSE, AbsMax(), ElasticSigned(1)),
    "groups of outputs": (
        (2, 6, 8),
        (8, 3, 5),
        DENSE,
        AbsMax(),
        TernaryMean(group_axis=1),
    ),
    "groups of inputs": (
        (2, 6, 3, 8),
        (3, 8, 5),
        (((3,), (1,)), ((2,), (0,))),
        AbsMax(),
        MeanBinarizer(group_axis=0),
    ),
    "full-precision weight": ((2, 6, 8), (8, 5), DENSE, ElasticSigned(1), None),
    "full precision": ((2, 6, 8), (8, 5), DENSE, None, None),
}


def operands(name):
    left_shape, right_shape, numbers, left, right = CASES[name]
    rng = np.random.default_rng(len(name))
    lhs = jnp.asarray(rng.normal(size=left_shape), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=right_shape), jnp.float32)

    def scale(quantizer):
        return jnp.float32(0.4) if quantizer is not None and quantizer.learned_scale else None

    return (lhs, rhs, scale(left), scale(right)), numbers, left, right


def fused(numbers, left, right, compute, **more):
    def f(lhs, rhs, lhs_scale, rhs_scale):
        return binary_dot_general(
            lhs,
            rhs,
            numbers,
            lhs_quantizer=left,
            rhs_quantizer=right,
            lhs_scale=lhs_scale,
            rhs_scale=rhs_scale,
            compute=compute,
            **more,
        )

    return f


@pytest.mark.parametrize("compute", ["auto", "int8", "bfloat16", "float32", "simulated"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_quantising_first(name, compute):
    arguments, numbers, left, right = operands(name)

    def plain(lhs, rhs, lhs_scale, rhs_scale):
        lhs = lhs if left is None else quantize(lhs, lhs_scale, left)
        rhs = rhs if right is None else quantize(rhs, rhs_scale, right)
        return lax.dot_general(lhs, rhs, numbers)

    expected, plain_pullback = jax.vjp(plain, *arguments)
    value, pullback = jax.vjp(fused(numbers, left, right, compute), *arguments)
    np.testing.assert_allclose(value, expected, atol=2e-5)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=value.shape), jnp.float32)
    got, want = pullback(cotangent), plain_pullback(cotangent)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
    assert jax.tree.structure(got) == jax.tree.structure(want)


@pytest.mark.parametrize("name", ["linear", "scores", "context", "tokens"])
def test_every_compute_mode_gives_the_same_bits(name):
    arguments, numbers, left, right = operands(name)
    first, *others = (
        np.asarray(fused(numbers, left, right, compute)(*arguments))
        for compute in ("int8", "bfloat16", "float32")
    )
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_int8_mode_multiplies_int8():
    """In the compiled program, and nothing else does."""

    def integer_products(compute):
        arguments, numbers, left, right = operands("linear")
        compiled = jax.jit(fused(numbers, left, right, compute)).lower(*arguments).compile()
        module = hlo.parse(compiled.as_text())
        instructions = [i for lines in module.computations.values() for i in lines]
        shapes = {i.name: i.shape for i in instructions}
        return [
            [shapes[name].partition("[")[0] for name in (i.name, *i.operands)]
            for i in instructions
            if i.opcode == "dot"
        ]

    assert integer_products("int8") == [["s32", "s8", "s8"]]
    assert integer_products("float32") == [["f32", "f32", "f32"]]


def test_operands_are_split_into_heads_after_they_are_quantised():
    """The same as splitting them first, for the scales' gradients too."""
    (lhs, rhs, *scales), numbers, left, right = operands("scores")

    def split_before(lhs, rhs, *scales):
        return fused(numbers, left, right, "int8")(lhs, rhs, *scales)

    def split_after(lhs, rhs, *scales):
        whole = lhs.swapaxes(1, 2).reshape(2, 4, 24), rhs.swapaxes(1, 2).reshape(2, 5, 24)
        return fused(numbers, left, right, "int8", lhs_heads=3, rhs_heads=3)(*whole, *scales)

    want, want_pullback = jax.vjp(split_before, lhs, rhs, *scales)
    got, got_pullback = jax.vjp(split_after, lhs, rhs, *scales)
    np.testing.assert_array_equal(got, want)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=want.shape), jnp.float32)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        got_pullback(cotangent),
        want_pullback(cotangent),
    )


@pytest.mark.parametrize("name", ["linear", "wide linear", "scores", "two contracted axes"])
def test_a_bfloat16_backward_pass_rounds_the_cotangent_and_nothing_else(name):
    """With a cotangent that bfloat16 holds exactly, gradients are those of float32."""
    arguments, numbers, left, right = operands(name)

    def gradients(backward, cotangent):
        f = fused(numbers, left, right, "float32", backward=backward)
        return jax.vjp(f, *arguments)[1](cotangent)

    shape = jax.eval_shape(fused(numbers, left, right, "float32"), *arguments).shape
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    rounded = cotangent.astype(jnp.bfloat16).astype(jnp.float32)
    for got, same, near in zip(
        gradients("bfloat16", cotangent),
        gradients("float32", rounded),
        gradients("float32", cotangent),
    ):
        if got is not None:
            np.testing.assert_allclose(got, same, atol=1e-5)
            assert 0 < np.linalg.norm(got - near) < 1e-2 * np.linalg.norm(near)


@pytest.mark.parametrize(
    ("flags", "forward", "backward"),
    [
        ("avx512_vnni amx_int8 avx512_bf16", "int8", "bfloat16"),
        ("avx512_vnni avx512_bf16", "bfloat16", "bfloat16"),
        ("avx_vnni", "int8", "float32"),
    ],
)
def test_auto_follows_the_machine(monkeypatch, flags, forward, backward):
    monkeypatch.setattr(arithmetic, "_cpu_flags", lambda: frozenset(flags.split()))
    arithmetic._of_cpu.cache_clear()
    assert arithmetic.forward_mode("cpu", batched=False) == forward
    assert arithmetic.backward_mode("cpu") == backward
    arithmetic._of_cpu.cache_clear()


def test_a_machine_without_fast_arithmetic_says_so_once(monkeypatch):
    monkeypatch.setattr(arithmetic, "_cpu_flags", lambda: frozenset())
    arithmetic._of_cpu.cache_clear()
    with pytest.warns(UserWarning, match="float32, with the same results") as warned:
        assert [arithmetic.forward_mode("cpu", False) for _ in range(2)] == ["float32"] * 2
    assert len(warned) == 1
    arithmetic._of_cpu.cache_clear()
    with warnings.catch_warnings():  # nothing to say where it was told what to use
        warnings.simplefilter("error")
        arguments, numbers, left, right = operands("linear")
        product, pullback = jax.vjp(fused(numbers, left, right, "int8"), *arguments)
        pullback(jnp.ones_like(product))
    arithmetic._of_cpu.cache_clear()


@pytest.mark.parametrize("name", ["linear", "tokens"])
def test_a_quantised_linear_keeps_one_byte_an_element(name):
    """And a scale per token, if tokens have their own."""
    arguments, numbers, left, right = operands(name)
    _, pullback = jax.vjp(fused(numbers, left, right, "int8"), *arguments)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "ndim", 0) > 0]
    elements = sum(leaf.size for leaf in kept if leaf.dtype == jnp.int8)
    assert elements == arguments[0].size + arguments[1].size
    others = [leaf.shape for leaf in kept if leaf.dtype != jnp.int8]
    assert others == ([(2, 6, 1)] if name == "tokens" else [])


def test_integer_sums_are_exact_zeros_where_signs_cancel():
    """A context of one-bit operands has true zeros, not rounding noise (SPEC quirk 24)."""
    probabilities = jnp.full((1, 1, 1, 6), 0.3)
    values = jnp.asarray([0.1, -0.7, 0.3, -0.2, 0.9, -0.4]).reshape(1, 1, 6, 1)
    f = fused(CONTEXT, ElasticUnsigned(1), ElasticSigned(1), "float32")
    assert f(probabilities, values, jnp.float32(0.37), jnp.float32(0.11)) == 0


def test_unknown_compute_lists_the_known_ones():
    arguments, numbers, left, right = operands("linear")
    with pytest.raises(ValueError, match="'int4': one of auto, int8, bfloat16, float32, simulated"):
        fused(numbers, left, right, "int4")(*arguments)


def test_an_offset_on_the_right_is_refused():
    arguments, numbers, _, _ = operands("context")
    with pytest.raises(ValueError, match="only the left operand may be unsigned"):
        fused(numbers, ElasticSigned(1), ElasticUnsigned(2), "auto")(*arguments)
