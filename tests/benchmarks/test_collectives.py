"""Bytes of collectives: by hand, and of an update compiled for eight devices."""

import jax
import pytest

from bipft_jax.benchmarks.collectives import collective_bytes, lowered_update
from bipft_jax.benchmarks.workload import Workload
from bipft_jax.pods import hlo
from bipft_jax.training import sharding

# In a loop of three rounds: a gather of 64 bytes that an async fusion begins and the next goes on
# with, a sum of [8, 4] floats of which a chip keeps a row, one of two arrays that all get. Outside,
# a gather of 64 bytes, one of two arrays at once, and another such sum.
PROGRAM = """\
HloModule jit_step

%begin (a: s8[8,8]) -> (s8[8,8], s8[64,8]) {
  %a = s8[8,8]{1,0} parameter(0)
  %whole = s8[64,8]{1,0} all-gather(%a), dimensions={0}
  ROOT %both = (s8[8,8]{1,0}, s8[64,8]{1,0}) tuple(%a, %whole)
}

%goes_on (b: s8[64,8]) -> s8[64,8] {
  %b = s8[64,8]{1,0} parameter(0)
  ROOT %more = s8[64,8]{1,0} all-gather(%b), dimensions={0}
}

%all-reduce-scatter.1 (c: f32[8,4]) -> f32[1,4] {
  %c = f32[8,4]{1,0} parameter(0)
  %summed = f32[8,4]{1,0} all-reduce(%c), to_apply=%add
  ROOT %kept = f32[1,4]{1,0} dynamic-slice(%summed)
}

%body (carry: (s32[], s8[8,8])) -> (s32[], s8[8,8]) {
  %carry = (s32[], s8[8,8]{1,0}) parameter(0)
  %x = s8[8,8]{1,0} get-tuple-element(%carry), index=1
  %g = f32[8,4]{1,0} get-tuple-element(%carry), index=2
  %async-collective-start.2 = (s8[8,8]{1,0}, s8[64,8]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %y = s8[64,8]{1,0} fusion(%async-collective-start.2), kind=kCustom, calls=%goes_on
  %part = f32[1,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %sums = (f32[3]{0}, bf16[2,5]{1,0}) all-reduce(%p, %q), to_apply=%add
  %p = f32[3]{0} parameter(1)
  %q = bf16[2,5]{1,0} parameter(2)
  ROOT %out = (s32[], s8[8,8]{1,0}) tuple(%i, %x)
}

%condition (state: (s32[], s8[8,8])) -> pred[] {
  %state = (s32[], s8[8,8]{1,0}) parameter(0)
  %rounds = s32[] constant(3)
  %at = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%at, %rounds), direction=LT
}

ENTRY %main (p: s8[8,8]) -> s8[64,8] {
  %in = s8[8,8]{1,0} parameter(0)
  %begin_loop = (s32[], s8[8,8]{1,0}) tuple(%zero, %in)
  %loop = (s32[], s8[8,8]{1,0}) while(%begin_loop), condition=%condition, body=%body
  %started = (s8[8,8]{1,0}, s8[64,8]{1,0}) all-gather-start(%in), dimensions={0}
  %small = s8[2,8]{1,0} parameter(2)
  %two = (s8[8,8]{1,0}, s8[2,8]{1,0}, s8[64,8]{1,0}, s8[16,8]{1,0}) all-gather-start(%in, %small)
  %scattered = f32[1,4]{1,0} reduce-scatter(%floats), to_apply=%add
  %floats = f32[8,4]{1,0} parameter(1)
  ROOT %done = s8[64,8]{1,0} all-gather-done(%started)
}
"""


def test_every_collective_counts_once_a_round_with_the_whole_array():
    counted = collective_bytes(hlo.parse(PROGRAM), partitions=8)
    assert counted == {
        "all-gather": 3 * 512 + 512 + (512 + 128),
        "reduce-scatter": 3 * 128 + 128,
        "all-reduce": 3 * (12 + 20),
        "all-to-all": 0,
        "collective-permute": 0,
    }


@pytest.mark.parametrize(("recipe", "bytes_a_weight"), [("fp", 4), ("bipft_a", 1)])
def test_codes_are_gathered_not_weights(recipe, bytes_a_weight):
    """Of float32 activations: in both passes every split weight once, at its size."""
    mesh = sharding.make_mesh(fsdp=4)
    workload = Workload("tiny", 16, 16, "float32", vocab_size=64)
    lowered, state = lowered_update(workload, recipe, "auto", mesh)
    program = hlo.parse(lowered.compile().as_text())
    gathered = collective_bytes(program, mesh.size)["all-gather"]
    split = {
        path: leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if "fsdp" in leaf.sharding.spec
    }
    head = sum(size for path, size in split.items() if "mlm_dense" in str(path))
    assert head == 128 * 128
    expected = 2 * bytes_a_weight * (sum(split.values()) - head)
    assert expected <= gathered <= expected + 2 * 4 * head
