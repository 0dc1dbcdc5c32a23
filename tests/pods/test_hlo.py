"""Costs read from the text of a compiled program, against sums made by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from bipft_jax.pods import hlo
from bipft_jax.pods.chips import CHIPS

CHIP = dataclasses.replace(
    CHIPS["v5e"], clock=1e9, peaks={"bf16": 1e12}, bandwidth=1e9
)  # a byte a cycle

# What the TPU compiler writes, cut down: a loop of 12 rounds with a matrix product and an addition,
# and around it a copy, the optimiser, a kernel of our own and a copy beside the computation.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/bipft_jax/models/bert.py"
2 "/somewhere/bipft_jax/training/step.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}

%fused_dot (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(1)
  %dot = bf16[8,8]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
  ROOT %plus = bf16[8,8]{1,0:T(8,128)(2,1)} add(%dot, %dot)
}

%body (carry: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %carry = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %next = s32[]{:T(128)} add(%i, %one), backend_config={"estimated_cycles":"2"}
  %y = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%x, %x), kind=kOutput, calls=%fused_dot, metadata={op_name="jit(step)/while/dot_general" stack_frame_id=2}, backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) tuple(%next, %y)
}

%condition (state: (s32[], bf16[8,8])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %rounds = s32[]{:T(128)} constant(12)
  %at = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %rounds), direction=LT
}

ENTRY %main (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) while(%begin), condition=%condition, body=%body
  %z = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  %moved = bf16[8,8]{0,1:T(8,128)(2,1)} copy(%z), backend_config={"estimated_cycles":"30"}
  %kernel = (bf16[8,8]{1,0:T(8,128)(2,1)}, s8[8,8]{1,0}) custom-call(%moved), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{}}
  %product = bf16[8,8]{1,0:T(8,128)(2,1)} custom-call(%moved), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"bytes_accessed":"1","flops":"700000"}}}
  %k = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%kernel), index=0
  %beside = (bf16[8,8]{1,0}, bf16[8,8]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%k)
  %there = bf16[8,8]{1,0:S(1)} copy-done(%beside)
  ROOT %new = bf16[8,8]{1,0:T(8,128)(2,1)} multiply(%there, %there), metadata={op_name="jit(step)/optimizer/mul"}, backend_config={"estimated_cycles":"50"}
}
"""  # noqa: E501  (as the compiler writes it)


def test_a_loop_counts_as_often_as_it_runs_and_every_instruction_has_its_kind():
    charges = hlo.charges(hlo.parse(PROGRAM), CHIP)
    by_name = {charge.instruction.name: charge for charge in charges}
    assert {name: charge.cycles for name, charge in by_name.items()} == {
        "y": 1200,
        "next": 24,
        "moved": 30,
        # in 128 bytes, out 128 + 64, at a byte a cycle
        "kernel": 320,
        # 700,000 operations, a thousand a cycle
        "product": 700,
        "beside": 0,
        "new": 50,
    }
    assert not by_name["kernel"].estimated
    assert hlo.by_kind(charges) == {
        "matmul": 1200 + 700,
        "elementwise": 24 + 320,
        "data movement": 30,
        "optimizer": 50,
    }
    assert charges[0].instruction.name == "y"


def test_an_instruction_knows_its_source_line_and_who_called_it():
    module = hlo.parse(PROGRAM)
    frame = next(i.frame for i in module.computations["body"] if i.name == "y")
    assert module.locations[frame] == [
        "/somewhere/bipft_jax/models/bert.py:7",
        "/somewhere/bipft_jax/training/step.py:9",
    ]


def test_reads_what_this_backend_compiles():
    """Without estimates everything is charged by its bytes."""

    def f(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x @ w), x)

    x = jnp.ones((16, 16))
    text = jax.jit(f).lower(x, x).compile().as_text()
    charges = hlo.charges(hlo.parse(text), CHIP)
    dots = [charge for charge in charges if charge.kind == "matmul"]
    assert [charge.count for charge in dots] == [5]
    assert all(not charge.estimated for charge in charges)
    assert dots[0].cycles == 5 * 3 * 16 * 16 * 4


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("not a program")
    unknown = PROGRAM.replace("%rounds = s32[]{:T(128)} constant(12)", "%rounds = s32[] add(%at)")
    with pytest.raises(ValueError, match="loop"):
        hlo.charges(hlo.parse(unknown), CHIP)
