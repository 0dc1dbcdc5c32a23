"""What the text of a compiled program says, against what was written into it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from bipft_jax.pods import hlo

# What the TPU compiler writes, cut down: a loop of 12 rounds with a matrix product and an addition,
# and around it a copy, the optimiser, a kernel of our own and a copy beside the computation.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/bipft_jax/models/bert.py"
2 "/somewhere/bipft_jax/training/step.py"
3 "/somewhere/site-packages/flax/core/scan.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=9 end_line=9 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=5 end_line=5 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=1}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=3 parent_frame_id=4}

%fused_dot (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(1)
  %dot = bf16[8,8]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
  ROOT %plus = bf16[8,8]{1,0:T(8,128)(2,1)} add(%dot, %dot)
}

%body (carry: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %carry = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %one = s32[]{:T(128)S(6)} constant(1)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%carry), index=0
  %x = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %next = s32[]{:T(128)S(6)} add(%i, %one), backend_config={"estimated_cycles":"2"}
  %y = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%x, %x), kind=kOutput, calls=%fused_dot, metadata={op_name="jit(step)/while/dot_general" stack_frame_id=3}, backend_config={"window_config":{"estimated_cycles":"100"}}
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
  %moved = bf16[8,8]{0,1:T(8,128)(2,1)} copy(%z), metadata={stack_frame_id=4}, backend_config={"estimated_cycles":"30"}
  %kernel = (bf16[8,8]{1,0:T(8,128)(2,1)}, s8[8,8]{1,0}) custom-call(%moved), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{}}
  %product = bf16[8,8]{1,0:T(8,128)(2,1)} custom-call(%moved), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"bytes_accessed":"1","flops":"700000"}}}
  %k = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%kernel), index=0
  %beside = (bf16[8,8]{1,0:T(8,128)(2,1)S(1)}, bf16[8,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%k)
  %fetched = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} copy-done(%beside)
  ROOT %new = bf16[8,8]{1,0:T(8,128)(2,1)} multiply(%fetched, %fetched), metadata={op_name="jit(step)/optimizer/mul"}, backend_config={"estimated_cycles":"50"}
}
"""  # noqa: E501  (as the compiler writes it)


def test_a_loop_counts_as_often_as_it_runs_and_names_count_nothing():
    counts = {i.name: count for i, count in hlo.executed(hlo.parse(PROGRAM))}
    once = dict.fromkeys(("moved", "kernel", "product", "beside", "new"), 1)
    assert counts == {"next": 12, "y": 12} | once


def test_attributes_of_instructions():
    by_name = {i.name: i for i, _ in hlo.executed(hlo.parse(PROGRAM))}
    assert by_name["y"].estimated_cycles == 100
    assert by_name["kernel"].estimated_cycles is None
    assert by_name["product"].flops == 700_000


def test_an_instruction_knows_its_source_line_and_who_called_it():
    module = hlo.parse(PROGRAM)
    by_name = {i.name: i for i, _ in hlo.executed(module)}
    assert module.locations[by_name["y"].frame] == [
        "/somewhere/site-packages/flax/core/scan.py:5",
        "/somewhere/bipft_jax/models/bert.py:7",
        "/somewhere/bipft_jax/training/step.py:9",
    ]
    assert hlo.source(module, by_name["y"]) == "models/bert.py:7"
    assert hlo.source(module, by_name["moved"]) == "flax/core/scan.py:5"
    assert hlo.source(module, by_name["new"]) == "?"


def test_an_instruction_knows_its_module_and_pass():
    (instruction, _), *_ = hlo.executed(hlo.parse(PROGRAM))
    before, back = "jit(f)/jvp(Bert)/bert", "jit(f)/transpose(jvp(Bert))/bert"
    names = {
        f"{before}/while/body/closed_call/ffn/cond/branch_0_fun/dot_general": "bert/ffn forward",
        f"{back}/while/body/closed_call/checkpoint/ffn/mul": "bert/ffn backward",
        f"{back}/while/body/closed_call/ffn/ffn._product/mul": "bert/ffn backward",
        f"{back}/while/body/checkpoint/rematted_computation/ffn/mul": "bert/ffn again",
        "jit(f)/while/body/add": "?",
        "": "?",
    }
    for name, expected in names.items():
        assert hlo.scope(dataclasses.replace(instruction, op_name=name)) == expected


def test_arrays_in_hbm_take_whole_tiles_and_those_in_vmem_nothing():
    assert hlo.memory_bytes("f32[100,130]{1,0:T(8,128)}") == 104 * 256 * 4
    assert hlo.memory_bytes("bf16[3,20,768]{2,0,1:T(8,128)(2,1)}") == 20 * 8 * 768 * 2
    assert hlo.memory_bytes("s8[64]{0:T(1024)}") == 1024
    assert hlo.memory_bytes("(f32[8]{0}, f32[8,128]{1,0:T(8,128)S(1)})") == 32


def test_reads_what_this_backend_compiles():
    def f(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x @ w), x)

    x = jnp.ones((16, 16))
    module = hlo.parse(jax.jit(f).lower(x, x).compile().as_text())
    executed = [(hlo.opcodes(module, i), count) for i, count in hlo.executed(module)]
    assert [count for opcodes, count in executed if "dot" in opcodes] == [5]


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("not a program")
    unknown = PROGRAM.replace("%rounds = s32[]{:T(128)} constant(12)", "%rounds = s32[] add(%at)")
    with pytest.raises(ValueError, match="loop"):
        list(hlo.executed(hlo.parse(unknown)))
