"""Counting bundles of schedules that are written by hand, as libtpu dumps them."""

from bipft_jax.pods import bundles

HEAD = """\
= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %2 = vsyncpa [#allocation1], 0  ;;  %s8_s0 = smov.u32 0 }
"""
# 5 windows in 7 rounds: the first only fetches, the last only writes. %s6_s2 counts 0, 1, 2,
# 0, ...; where its spilled copy of the round before is 0, with the first and the fourth window, a
# sum is finished.
PIPELINE = """\
   0x1   :  { %s8_s0 = smov.u32 0  ;;  %s9_s0 = smov.u32 0  ;;  %s3_s0 = smov.u32 1 }
   0x2   :  { %50 = sst [smem:[#allocation4_spill]] %s3_s0 }
   0x3 LB: > { %s4_s1 = sphi %s8_s0, %s5_s1 /* phi copy */  ;;  %s6_s2 = sphi %s9_s0, %s7_s2 }
   0x4   : > { %p1_p0 = scmp.ge.s32.totalorder %s4_s1, 1  ;;  %p2_p1 = scmp.lt.s32.totalorder %s4_s1, 6 }
   0x5   : > { %p3_p0 = pnand %p1_p0, %p2_p1  ;;  %s5_s1 = sadd.s32 1, %s4_s1 }
   0x6   : > { %s2_s3 = sld [smem:[#allocation4_spill]]  ;;  %s10_s3 = sadd.s32 1, %s6_s2 }
   0x7   : > { %p5_p0 = scmp.ge.s32.totalorder %s10_s3, 3  ;;  %51 = sst [smem:[#allocation4_spill]] %s6_s2 }
   0x8   : > { %70 = sbr.rel (%p3_p0) target = $region9 }
   0x9   :  {}
   0xa   :  {}
   0xb   :  {}
   0xc   :  {} /* End region 7 */
   0xd   : > { %v1_v0 = vld [vmem:[#allocation5] sm:$0xff] /* Start region 8 */ }
   0xe   : > { %p6_p0 = scmp.ne.s32.totalorder %s2_s3, 0 }
   0xf   : > { %71 = sbr.rel (%p6_p0) target = $region10 }
  0x10   :  {}
  0x11   :  {}
  0x12   :  {}
  0x13   :  {}
  0x14   : > { %v2_v0 = vadd.f32 %v1_v0, %v1_v0 }
  0x15   : > { %v3_v0 = vadd.f32 %v2_v0, %v2_v0 } /* End region 8 */
  0x16 PF: > { %p7_p0 = scmp.ge.s32.totalorder %s5_s1, 7 /* loop exit test */ } /* Start/End empty region 10 :: Start region 9 */
  0x17   :  { %72 = sbr.rel (!%p7_p0) target = $region11 }
  0x18   :  { %s7_s2 = smov.u32 (%p5_p0, %s10_s3), 0 /* copy for cssa */ }
  0x19   :  { %73 = vsyncpa [#allocation1], 1 }
"""  # noqa: E501  (as the compiler writes it)
# 5 rounds of 3 bundles, of which the second runs until 8 more each time pass 24: 4 times.
NESTED = """\
   0x1 LB: > { %s4_s1 = sphi %s8_s0, %s5_s1 /* phi copy */ }
   0x2 LB: >> { %s6_s2 = sadd.s32 8, %s7_s2  ;;  %p1_p0 = scmp.gt.s32.totalorder %s6_s2, 24 }
   0x3   : > { %7 = sbr.rel (!%p1_p0) target = $r3  ;;  %p2_p0 = scmp.ge.s32.totalorder %s5_s1, 5 }
   0x4   :  { %8 = sbr.rel (!%p2_p0) target = $region4 }
"""


def test_what_branches_skip_is_not_counted():
    """Before and after the loop 6 bundles, 11 in each of its rounds, 7 more for each window and 2
    for each sum."""
    body = 7 * (6 + 4 + 1) + 5 * (3 + 4) + 2 * 2
    assert bundles.schedule(HEAD + PIPELINE) == bundles.Schedule(26, 6 + body, 0)


def test_a_branch_that_cannot_be_followed_skips_nothing():
    body = 7 * (6 + 4 + 1) + 5 * (3 + 4) + 5 * 2
    unknown = PIPELINE.replace("ne.s32.totalorder %s2_s3, 0", "ne.s32.totalorder %s1_s9, 0")
    assert bundles.schedule(HEAD + unknown).cycles == 6 + body


def test_loops_in_loops_multiply_and_steps_are_read():
    assert bundles.schedule(HEAD + NESTED) == bundles.Schedule(5, 1 + 5 * (1 + 4 + 1) + 1, 0)


def test_a_loop_of_unknown_length_is_counted_once_and_reported():
    unknown = PIPELINE.replace(", 7 /* loop exit test */", ", %s9_s9")
    assert bundles.schedule(HEAD + unknown) == bundles.Schedule(26, 26, 1)


def test_files_are_read_by_the_name_of_their_instruction(tmp_path):
    for name in (
        "12-fusion.3-01-final_bundles.txt",
        "12-fusion.3-00-schedule-analysis_final_bundles.txt",
        "11-TLP-hlo.txt",
    ):
        (tmp_path / name).write_text(HEAD + PIPELINE)
    schedules = bundles.read(tmp_path.iterdir())
    assert schedules["fusion.3"] == bundles.schedule(HEAD + PIPELINE)
    assert "TLP" not in schedules
