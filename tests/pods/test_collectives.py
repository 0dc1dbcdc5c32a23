"""Collectives in a program's text, where their groups lie, and the time of a step, by hand."""

import dataclasses

import numpy as np
import pytest

from bipft_jax.pods import checks, collectives, hlo, network, timeline
from bipft_jax.pods.chips import CHIPS
from bipft_jax.pods.collectives import replica_groups
from bipft_jax.pods.network import Seconds
from bipft_jax.pods.topology import Layout, Place
from bipft_jax.training.step import TEACHER_SCOPE

# Two rounds of a loop: an asynchronous gather between two fusions of 1 ms, one of which continues
# it; a scatter; a share of a sum that crosses to another slice. After it an asynchronous sum, which
# ends at once, and a sum of two arrays.
PROGRAM = """\
HloModule jit_step

FileNames
1 "/home/me/bipft_jax/models/layers.py"

FunctionNames
1 "call"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%begin (a: bf16[8,8]) -> (bf16[8,8], bf16[64,8]) {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %whole = bf16[64,8]{1,0} all-gather(%a), channel_id=3, GATHER
}

%goes_on (b: bf16[64,8]) -> bf16[64,8] {
  %b = bf16[64,8]{1,0} parameter(0)
  ROOT %more = bf16[64,8]{1,0} all-gather(%b), channel_id=3, dimensions={0}
}

%ends (c: bf16[64,8]) -> bf16[64,8] {
  %c = bf16[64,8]{1,0} parameter(0)
  ROOT %over = bf16[64,8]{1,0} custom-call(%c), channel_id=3, custom_call_target="x"
}

%all-reduce-scatter.1 (d: f32[8,4]) -> f32[1,4] {
  %d = f32[8,4]{1,0} parameter(0)
  %summed = f32[8,4]{1,0} all-reduce(%d), replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %kept = f32[1,4]{1,0} dynamic-slice(%summed)
}

%body (carry: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %carry = (s32[], bf16[8,8]{1,0}) parameter(0)
  %async-collective-start.2 = (bf16[8,8], bf16[64,8]) fusion(%carry), kind=kCustom, calls=%begin
  %first = bf16[64,8]{1,0} fusion(%async-collective-start.2), kind=kCustom, calls=%goes_on
  %second = bf16[64,8]{1,0} fusion(%carry), kind=kLoop, calls=%goes_on
  %async-collective-done.2 = bf16[64,8]{1,0} fusion(%first), kind=kCustom, calls=%ends
  %part = f32[1,4]{1,0} fusion(%carry), kind=kCustom, calls=%all-reduce-scatter.1
  %named = f32[1,4]{1,0} fusion(%part), kind=kLoop, calls=%ends, metadata={stack_frame_id=1}
  %send.1 = (f32[1,4]{1,0}, u32[], token[]) send(%named, %token), channel_id=5, TRANSFER
  %send-done.1 = token[] send-done(%send.1), channel_id=5
  ROOT %out = (s32[], bf16[8,8]{1,0}) tuple(%carry, %carry)
}

%condition (state: (s32[], bf16[8,8])) -> pred[] {
  %state = (s32[], bf16[8,8]{1,0}) parameter(0)
  %rounds = s32[] constant(2)
  ROOT %less = pred[] compare(%state, %rounds), direction=LT
}

ENTRY %main (p: f32[3]) -> f32[3] {
  %in = f32[3]{0} parameter(0)
  %loop = (s32[], bf16[8,8]{1,0}) while(%in), condition=%condition, body=%body
  %all-reduce-start = f32[3]{0} all-reduce-start(%in), replica_groups=mesh['a'=4,'b'=4] {'b'}
  %all-reduce-done = f32[3]{0} all-reduce-done(%all-reduce-start)
  ROOT %sums = (f32[3]{0}, bf16[2,5]{1,0}) all-reduce(%in, %in), to_apply=%add
}
"""
GATHER = (
    "replica_groups=[2,8]<=[8,2]T(1,0), dimensions={0}, "
    'metadata={op_name="jit(step)/layers/attention/query/dot_general" stack_frame_id=1}'
)
TRANSFER = (
    "is_host_transfer=true, frontend_attributes="
    '{_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
)
PROGRAM = PROGRAM.replace("GATHER", GATHER).replace("TRANSFER", TRANSFER)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (
            "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
    ],
)
def test_replica_groups_are_read_in_every_form(written, groups):
    attributes = f"channel_id=1, replica_groups={written}, dimensions={{0}}"
    assert replica_groups(attributes, 8) == groups
    assert replica_groups("source_target_pairs={{0,1},{1,0}}", 8) == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="cannot read these groups"):
        replica_groups("replica_groups=other[2]", 8)
    with pytest.raises(ValueError, match="cannot read these groups"):
        replica_groups("replica_groups=mesh['a'=2], device_ids=(1,0) {'a'}", 8)


def walked(seconds):
    module = hlo.parse(PROGRAM)
    compute = {"first": 1e-3, "second": 1e-3, "named": 5e-3}
    return timeline.step_of(module, compute, 16, seconds)


def test_a_step_waits_for_what_no_computation_hides():
    def seconds(collective):
        if collective.between_slices:
            return Seconds(0.0, 7e-3)
        return Seconds(
            {"all-gather": 5e-3, "reduce-scatter": 2e-3, "all-reduce": 1e-3}[collective.kind], 0.0
        )

    step = walked(seconds)
    seen = [
        (one.collective.kind, one.collective.size, one.count, one.in_loop, one.collective.group[:3])
        for one in step.collectives
    ]
    assert seen == [
        ("all-gather", 64 * 8 * 2, 2, True, (0, 2, 4)),
        ("reduce-scatter", 8 * 4 * 4, 2, True, (0, 2)),
        ("all-reduce", 4 * 4, 2, True, ()),
        ("all-reduce", 3 * 4, 1, False, (0, 1, 2)),
        ("all-reduce", 3 * 4 + 10 * 2, 1, False, (0, 1, 2)),
    ]
    gather, scatter, between, *_ = step.collectives
    assert gather.beside == pytest.approx(2e-3) and gather.hidden == pytest.approx(2e-3)
    assert scatter.beside == between.beside == 0
    assert step.compute == pytest.approx(2 * (1e-3 + 1e-3 + 5e-3))
    assert step.exposed == pytest.approx(2 * (3e-3 + 2e-3 + 7e-3) + 1e-3 + 1e-3)
    assert step.communication == pytest.approx((2 * 7e-3 + 2e-3, 2 * 7e-3))
    # The transfer's own instruction has no line: that of its operand.
    assert gather.collective.source == between.collective.source == "models/layers.py:7"


def layout_of(slices=1, length=4, tensor=1):
    """A square torus of each slice, along whose rows the partition numbers run; hosts are 2 x 2."""
    x, y = np.divmod(np.arange(length * length), length)
    one = np.stack([x, y, np.zeros_like(x)], axis=1)
    number = np.repeat(np.arange(slices), length * length)
    hosts = np.tile(x // 2 * (length // 2) + y // 2, slices) + 100 * number
    size = slices * length * length // tensor
    axes = {"data": size, "fsdp": 1, "tensor": tensor}
    return Layout(axes, np.tile(one, (slices, 1)), number, hosts, ring=16)


def test_a_group_is_placed_in_the_torus():
    small, large, two = layout_of(), layout_of(length=16), layout_of(slices=2)
    assert small.place(range(16)) == Place(16, 1, (4, 4, 1), (False, False, False))
    assert large.place(range(256)) == Place(256, 1, (16, 16, 1), (True, True, False))
    assert large.place(range(16)) == Place(16, 1, (1, 16, 1), (False, True, False))
    assert large.place(range(0, 256, 32)) == Place(8, 1, (8, 1, 1), (False, False, False))
    assert two.place(range(32)) == Place(32, 2, (4, 4, 1), (False, False, False))
    assert (two.place([0, 16]).network, two.place([0, 15]).network) == ("DCN", "ICI")
    cubes = dataclasses.replace(layout_of(length=8), ring=4)
    assert cubes.place(range(8)).rings == (False, True, False)
    assert cubes.place(range(4)).rings == (False, False, False)  # half of it has no link back
    split = layout_of(tensor=4)
    assert split.spanned([0, 1, 2, 3]) == {"tensor"} and split.spanned([0, 4, 8]) == {"data"}
    assert split.along({"data"}) == [0, 4, 8, 12] and split.along({"tensor"}) == [0, 1, 2, 3]


def test_time_of_a_sum_by_hand():
    v5e = CHIPS["v5e"]  # 50 GB/s a link and direction
    size = 100e6
    ring = network.seconds("all-reduce", size, layout_of(length=16).place(range(256)), v5e)
    # Both ways of two rings of 16: 200 GB/s, 8 hops each.
    assert ring == pytest.approx((2e-6 + 2 * (size * 255 / 256 / 200e9 + 16e-6), 0))
    line = network.seconds("all-gather", size, layout_of().place(range(4)), v5e)
    assert line == pytest.approx((2e-6 + size * 3 / 4 / 50e9 + 3e-6, 0))
    # Half of a share of 1/16 leaves and comes, at 25 Gb/s.
    both = network.seconds("all-reduce", size, layout_of(slices=2).place(range(32)), v5e)
    assert both.dcn == pytest.approx(100e-6 + 2 * size / 16 / 2 / (25e9 / 8))
    assert both.ici == pytest.approx(2e-6 + 2 * (size * 15 / 16 / 100e9 + 6e-6))


def test_time_of_what_is_sent_but_not_summed():
    v5e, size = CHIPS["v5e"], 100e6
    # The whole array over one link to the next chip.
    sent = network.seconds("collective-permute", size, layout_of().place([0, 1]), v5e)
    assert sent == pytest.approx((2e-6 + size / 50e9 + 1e-6, 0))
    assert network.between("collective-permute", size, 2, v5e) == pytest.approx(
        100e-6 + size / (25e9 / 8)
    )
    # Of 16 devices' arrays, a quarter crosses the middle of a ring of two ways.
    ring = network.seconds("all-to-all", size, layout_of(length=16).place(range(16)), v5e)
    assert ring == pytest.approx((2e-6 + size * 15 / 16 / 4 / 100e9 + 8e-6, 0))


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("(f32[8], f32[6], f32[16], f32[12], u32[]) all-gather-start(%p, %q)", 4 * 28),
        ("f32[8] all-to-all(%p)", 4 * 8 * 2),  # one device's part of two
        ("f32[8] collective-permute(%p)", 4 * 8),
    ],
)
def test_a_collective_counts_all_that_it_moves(written, size):
    module = hlo.parse(
        "ENTRY %main (p: f32[8], q: f32[6]) -> f32[8] {\n  %p = f32[8] parameter(0)\n"
        f"  %q = f32[6] parameter(1)\n  ROOT %r = {written}, replica_groups={{{{0,1}}}}\n}}\n"
    )
    moving = module.computations[module.entry][-1]
    assert collectives.started(module, moving, 2).size == size


def test_a_loop_that_waits_for_another_slice_is_named():
    step = walked(lambda collective: Seconds(0.0, 1e-3 * collective.between_slices))
    (reason,) = checks.loops(step.collectives)
    assert "in each of its 2 rounds (all-reduce, models/layers.py:7): each costs 1.00 ms" in reason
    assert not checks.loops(walked(lambda collective: Seconds(1e-3, 0.0)).collectives)


@pytest.mark.parametrize(
    ("kernel", "tensor", "refused"),
    [
        (("bert/attention/query", (2, 64, 8)), 1, True),
        (("bert/attention/query", (2, 64, 16)), 2, True),  # half of it, as `tensor` splits it
        (("bert/attention/query", (2, 32, 8)), 1, False),  # another array
        (("bert/attention/key", (2, 64, 8)), 1, False),  # another module's
    ],
)
def test_a_binarised_kernel_that_is_gathered_as_floats_is_named(kernel, tensor, refused):
    step = walked(lambda collective: Seconds(0.0, 0.0))
    reasons = checks.gathers(step.collectives, dict([kernel]), tensor)
    taught = [
        dataclasses.replace(
            timed,
            collective=dataclasses.replace(
                timed.collective,
                operation=timed.collective.operation.replace(
                    "layers", f"jvp({TEACHER_SCOPE})/layers"
                ),
            ),
        )
        for timed in step.collectives
    ]
    assert not checks.gathers(taught, dict([kernel]), tensor)
    assert [r.partition(", not")[0] for r in reasons] == refused * [
        "the binarised kernel bert/attention/query is gathered as bf16[64,8]"
    ]


def test_a_host_that_makes_rows_that_it_does_not_hold_is_named(monkeypatch):
    layout = layout_of()
    held = {host: layout.rows_held(32, host) for host in range(4)}
    assert held[1] == {4, 5, 6, 7, 12, 13, 14, 15}
    assert layout_of(tensor=4).rows_held(8, 1) == {0, 1, 2, 3}

    def honest(mesh, size, host):
        return np.array(sorted(held[host]))

    def from_first_to_last(mesh, size, host):
        return np.arange(min(held[host]), max(held[host]) + 1)

    monkeypatch.setattr(checks.sharding, "process_rows", honest)
    assert checks.rows(None, layout, 32) == []
    monkeypatch.setattr(checks.sharding, "process_rows", from_first_to_last)
    reasons = checks.rows(None, layout, 32)
    assert len(reasons) == 4
    assert "host 1 makes 12 rows of a batch of 32, of which its devices hold 8" in reasons[1]
