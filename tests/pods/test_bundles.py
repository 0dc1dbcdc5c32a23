"""Counting bundles of schedules that are written by hand, as libtpu dumps them."""

import pytest

from bipft_jax.pods import bundles

HEAD = """\
= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %2 = vsyncpa [#allocation1], 0  ;;  %s8_s0 = smov.u32 0 }
"""
# A body of 4 bundles, one of them empty, whose test is labelled.
PIPELINE = """\
   0x1 LB: > { %s4_s1 = sphi %s8_s0, %s5_s1 /* phi copy :: iteration index, stage = 0 */ }
   0x2   : > { %9 = dma.hbm_to_vmem [thread:$0] /*hbm=*/%s1_s0 /*
window_bounds: (128, 8)
iteration_bounds: (8, 3)
strides: (128, 8) */ }
   0x3   :  {}
   0x4   : > { %p1_p0 = scmp.ge.s32.totalorder %s5_s1, 26 /* loop exit test */ }
   0x5   :  { %7 = sbr.rel (!%p1_p0) target = $region3 }
"""
# 5 rounds of 3 bundles, of which the second runs until 8 more each time pass 24: 4 times.
NESTED = """\
   0x1 LB: > { %s4_s1 = sphi %s8_s0, %s5_s1 /* phi copy */ }
   0x2 LB: >> { %s6_s2 = sadd.s32 8, %s7_s2  ;;  %p1_p0 = scmp.gt.s32.totalorder %s6_s2, 24 }
   0x3   : > { %7 = sbr.rel (!%p1_p0) target = $r3  ;;  %p2_p0 = scmp.ge.s32.totalorder %s5_s1, 5 }
   0x4   :  { %8 = sbr.rel (!%p2_p0) target = $region4 }
"""


def test_a_pipeline_counts_its_windows_not_the_rounds_that_fill_it():
    assert bundles.schedule(HEAD + PIPELINE) == bundles.Schedule(6, 2 + 24 * 4, 0)
    # The program knows the number too; then the comments are not asked.
    plain = PIPELINE.replace("iteration_bounds: (8, 3)\n", "")
    assert bundles.schedule(HEAD + plain, windows=25).cycles == 2 + 25 * 4
    assert bundles.schedule(HEAD + plain).cycles == 2 + 26 * 4
    # A loop that is no pipeline runs as often as it says.
    loop = PIPELINE.replace("iteration index, stage = 0", "copy for cssa")
    assert bundles.schedule(HEAD + loop, windows=25).cycles == 2 + 26 * 4


def test_loops_in_loops_multiply_and_steps_are_read():
    assert bundles.schedule(HEAD + NESTED) == bundles.Schedule(5, 1 + 5 * (1 + 4 + 1) + 1, 0)


def test_a_loop_of_unknown_length_is_counted_once_and_reported():
    unknown = PIPELINE.replace(", 26 /* loop exit test */", ", %s9_s9")
    assert bundles.schedule(HEAD + unknown) == bundles.Schedule(6, 6, 1)


def test_files_are_read_by_the_name_of_their_instruction(tmp_path):
    for name in (
        "12-fusion.3-01-final_bundles.txt",
        "12-fusion.3-00-schedule-analysis_final_bundles.txt",
        "11-TLP-hlo.txt",
    ):
        (tmp_path / name).write_text(HEAD + PIPELINE)
    schedules = bundles.read(tmp_path.iterdir(), {"fusion.3": 25})
    assert schedules["fusion.3"].cycles == pytest.approx(2 + 25 * 4)
    assert "TLP" not in schedules
