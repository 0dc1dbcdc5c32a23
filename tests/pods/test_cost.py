"""Costs of single programs that libtpu compiles, against what their operations take at least."""

import dataclasses
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from bipft_jax.pods import compiler, cost, hlo, work
from bipft_jax.pods.bundles import Schedule
from bipft_jax.pods.chips import CHIPS
from bipft_jax.pods.compiler import Program, compiled_for_tpu, tpu
from tests.pods.test_hlo import PROGRAM

TOKENS, HIDDEN, FFN = 8192, 768, 3072
CLOCK, BYTES_A_SECOND = 1.5e9, 819e9  # v5e
PRODUCT = 2 * TOKENS * HIDDEN * FFN  # operations
BF16, INT8 = 197e12, 393e12  # operations/s


def product(accumulator, x, w):
    return jax.lax.dot(x, w, preferred_element_type=accumulator).astype(jnp.float32)


def gelu(x):
    return x * (0.5 + 0.5 * jax.lax.erf(x * np.float32(np.sqrt(0.5))))


def int8(x, w):
    return (product(jnp.int32, x, w) * 0.01).astype(jnp.bfloat16)


def int8_gelu(x, w):
    return gelu(product(jnp.int32, x, w) * 0.01).astype(jnp.bfloat16)


def bfloat16_loop(x, w):
    def step(_, x):
        return jnp.sin(product(jnp.float32, x, w)).astype(jnp.bfloat16)

    return jax.lax.fori_loop(0, 3, step, x)


def scores(q, k):
    return jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)


@pytest.fixture(scope="module")
def costs():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("pip install -e '.[tpu-compiler]'")
    chip, devices = tpu("v5e:1x1")
    assert (chip.clock, chip.bandwidth) == (CLOCK, BYTES_A_SECOND)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices[0]))

    activations = array(jnp.bfloat16, TOKENS, FFN)
    codes = array(jnp.int8, TOKENS, HIDDEN), array(jnp.int8, HIDDEN, FFN)
    floats = array(jnp.bfloat16, TOKENS, HIDDEN), array(jnp.bfloat16, HIDDEN, HIDDEN)
    heads = array(jnp.bfloat16, 2, 4, 128, 64)
    programs = {
        "copy": (lambda x: x * jnp.bfloat16(2), activations),
        "int8": (int8, *codes),
        "int8 gelu": (int8_gelu, *codes),
        "loop": (bfloat16_loop, *floats),
        "scores": (scores, heads, heads),
    }
    return {
        name: cost.of(compiled_for_tpu(jax.jit(function).lower(*arguments)), chip)
        for name, (function, *arguments) in programs.items()
    }


def test_a_copy_of_50_mb_costs_its_bytes(costs):
    expected = 2 * (TOKENS * FFN * 2) / BYTES_A_SECOND * CLOCK
    assert costs["copy"].cycles == pytest.approx(expected, rel=0.01)
    assert costs["copy"].estimated_cycles > 2 * expected  # the heuristic says otherwise


def test_an_int8_product_reaches_95_percent_of_its_peak_and_erf_costs_more(costs):
    at_peak = PRODUCT / INT8 * CLOCK
    assert at_peak <= costs["int8"].cycles <= at_peak / 0.95
    assert costs["int8 gelu"].cycles > 2 * costs["int8"].cycles
    assert costs["int8"].by_kind["matmul"] == pytest.approx(costs["int8"].cycles, rel=0.01)


def test_a_loop_runs_its_product_as_often_as_it_says(costs):
    products = sum(charge.products for charge in costs["loop"].charges)
    assert products == pytest.approx(3 * (2 * TOKENS * HIDDEN * HIDDEN) / BF16 * CLOCK)
    assert costs["loop"].cycles >= products


def test_nothing_is_below_its_products_or_its_memory(costs):
    for name, spent in costs.items():
        assert spent.cycles >= spent.memory > 0, name
        for charge in spent.charges:
            if not charge.instruction.opcode.endswith("-start"):
                assert charge.cycles >= max(charge.products, charge.memory), (name, charge)
    arrays = {
        "int8": TOKENS * HIDDEN + HIDDEN * FFN + 2 * TOKENS * FFN,
        "scores": 2 * (2 * 8 * 128 * 64) + 4 * (8 * 128 * 128),
    }
    for name, size in arrays.items():
        assert costs[name].memory == pytest.approx(size / BYTES_A_SECOND * CLOCK, rel=0.02)


def test_a_batched_product_counts_what_meets_alone(costs):
    products = sum(charge.products for charge in costs["scores"].charges)
    assert products == pytest.approx(2 * 8 * 128 * 128 * 64 / BF16 * CLOCK)


def test_no_dump_is_left(costs):
    assert list(compiler._schedules().iterdir()) == []


def test_every_large_instruction_has_a_schedule(costs):
    for name, spent in costs.items():
        missing = sum(charge.cycles for charge in spent.unscheduled)
        assert missing <= 0.001 * spent.cycles, (name, spent.unscheduled)
        assert sum(spent.by_source.values()) == pytest.approx(spent.cycles)


# A byte a cycle, a thousand operations.
CHIP = dataclasses.replace(CHIPS["v5e"], clock=1e9, peaks={"bf16": 1e12, "s8": 2e12}, bandwidth=1e9)
ARRAY = 8 * 128 * 2  # bytes: [8, 8] of bfloat16 in a tile


def by_name(text, schedules):
    spent = cost.of(Program(None, hlo.parse(text), schedules), CHIP)
    return spent, {(c.instruction.name, c.kind): c for c in spent.charges}


def test_the_longest_of_three_bounds_is_charged():
    schedules = {"y": Schedule(9, 7000.0, 1), "new": Schedule(9, 5.0, 0)}
    spent, charges = by_name(PROGRAM, schedules)
    assert {key: charge.cycles for key, charge in charges.items()} == {
        ("y", "matmul"): 12 * 7000,
        ("next", "elementwise"): 12 * 2,  # no schedule, no traffic: the heuristic
        ("moved", "data movement"): 2 * ARRAY,
        ("kernel", "elementwise"): 2 * ARRAY + 64,  # its second result has no tiles
        ("product", "matmul"): 2 * ARRAY,
        ("beside", "data movement"): 0,
        ("new", "optimizer"): ARRAY,  # reads from VMEM
        # What is fetched beside the rest of its computation.
        ("beside", "transfers"): ARRAY,
    }
    assert charges["y", "matmul"].unknown_loops == 1
    assert spent.cycles == sum(spent.by_kind.values())
    assert spent.memory == 12 * 3 * ARRAY + 8 * ARRAY + 64
    assert {c.instruction.name for c in spent.unscheduled} == {"next", "moved", "kernel", "product"}
    assert spent.seconds(CHIP) == pytest.approx(spent.cycles / 1e9)
    assert spent.estimated_cycles == 12 * 102 + 30 + 2 * ARRAY + 64 + 2 * ARRAY + 50


def test_what_crosses_slices_runs_beside_the_rest():
    text = PROGRAM.replace("copy-start(%k)", "send(%k, %k)").replace("copy-done", "send-done")
    text = text.replace("%beside = (bf16[8,8]{1,0:T(8,128)(2,1)S(1)}", "%beside = (f32[8,128]{1,0}")
    _, charges = by_name(text, {})
    assert charges["beside", "data movement"].cycles == 0
    assert charges["beside", "data movement"].memory == 8 * 128 * 4


def test_beside_a_long_product_a_copy_costs_nothing():
    text = PROGRAM.replace('"flops":"700000"', '"flops":"9000000"')
    _, charges = by_name(text, {"product": Schedule(9, 8000.0, 0)})
    assert charges["product", "matmul"].cycles == 9000
    assert ("beside", "transfers") not in charges


STACK = """\
HloModule stack, is_scheduled=true

%inner (r: f32[4,8,128]) -> f32[8,128] {
  %r = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %one = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%r, %zero, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128]{1,0:T(8,128)} bitcast(%one)
}

%outer (p: f32[4,8,128], q: f32[8,128], o: f32[4,8,128]) -> f32[4,8,128] {
  %p = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %q = f32[8,128]{1,0:T(8,128)} parameter(1)
  %o = f32[4,8,128]{2,1,0:T(8,128)} parameter(2)
  %slice = f32[8,128]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%inner
  %sum = f32[8,128]{1,0:T(8,128)} add(%slice, %q)
  %row = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%sum)
  %at = s32[] constant(0)
  ROOT %new = f32[4,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%o, %row, %at, %at, %at)
}

%yes (t: f32[8,128]) -> f32[8,128] {
  %t = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %negative = f32[8,128]{1,0:T(8,128)} negate(%t)
}

%no (f: f32[8,128]) -> f32[8,128] {
  %f = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %sine = f32[8,128]{1,0:T(8,128)S(1)} sine(%f)
}

ENTRY %main (a: f32[4,8,128], b: f32[8,128], c: f32[4,8,128], d: pred[]) -> f32[4,8,128] {
  %a = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  %c = f32[4,8,128]{2,1,0:T(8,128)} parameter(2)
  %d = pred[] parameter(3)
  %either = f32[8,128]{1,0:T(8,128)} conditional(%d, %b, %b), true_computation=%yes, false_computation=%no
  ROOT %stacked = f32[4,8,128]{2,1,0:T(8,128)} fusion(%a, %b, %c), kind=kLoop, calls=%outer
}
"""  # noqa: E501  (as the compiler writes it)


def test_of_a_stack_only_the_slice_counts_and_of_a_conditional_the_longer_branch():
    row = 8 * 128 * 4
    _, charges = by_name(STACK, {"sine": Schedule(1, 5.0, 0)})
    assert {name: charge.cycles for (name, _), charge in charges.items()} == {
        "stacked": 3 * row,
        "negative": 2 * row,
    }


def test_operations_of_a_dilated_convolution_are_those_that_meet_an_element():
    """Against a count of every position of a small one."""
    # Elements at 0, 3 and 6 of an image that is padded to -2 ... 9.
    meet = sum(at + tap - 2 in (0, 3, 6) for at, tap in itertools.product(range(9), range(4)))
    line = (
        "  %c = f32[9,2,6]{2,1,0} convolution(%a, %b), window={size=4 pad=2_3 lhs_dilate=3}, "
        "dim_labels=0bf_0oi->0bf"
    )
    text = f"ENTRY %main () -> f32[9,2,6] {{\n{line}\n}}"
    (instruction,) = hlo.parse(text).computations["main"]
    counted = work.operations("f32[3,2,5]", "f32[4,6,5]", instruction)
    assert counted == 2 * 2 * 5 * 6 * meet
