"""Bytes to and from HBM, by hand."""

from bipft_jax.pods import hlo
from bipft_jax.pods.work import hbm_bytes

# A fusion of its own operand 2 and result 0, through which the buffers of a gather go; and the end
# of that gather.
PROGRAM = """\
HloModule jit_step

%continues (a: s8[8,64], b: s8[64,64], c: f32[4,8]) -> (f32[4,8], s8[8,64], s8[64,64]) {
  %a = s8[8,64]{1,0} parameter(0)
  %b = s8[64,64]{1,0} parameter(1)
  %c = f32[4,8]{1,0} parameter(2)
  %own = f32[4,8]{1,0} negate(%c)
  %more = s8[64,64]{1,0} all-gather(%a), channel_id=3, dimensions={0}
  ROOT %all = (f32[4,8]{1,0}, s8[8,64]{1,0}, s8[64,64]{1,0}) tuple(%own, %a, %b)
}

%ends (d: s8[64,64]) -> s8[64,64] {
  %d = s8[64,64]{1,0} parameter(0)
  ROOT %over = s8[64,64]{1,0} custom-call(%d), channel_id=3, custom_call_target="x"
}

ENTRY %main (a: s8[8,64], b: s8[64,64], c: f32[4,8]) -> s8[64,64] {
  %a = s8[8,64]{1,0} parameter(0)
  %b = s8[64,64]{1,0} parameter(1)
  %c = f32[4,8]{1,0} parameter(2)
  %beside = (f32[4,8], s8[8,64], s8[64,64]) fusion(%a, %b, %c), calls=%continues CONTINUATION
  %buffer = s8[64,64]{1,0} get-tuple-element(%beside), index=2
  ROOT %async-collective-done = s8[64,64]{1,0} fusion(%buffer), kind=kCustom, calls=%ends
}
"""
CONTINUATION = (
    ', backend_config={"continuation_config":{"operand_original_end":"2",'
    '"operand_original_start":"2","output_tuple_original_end":"0",'
    '"output_tuple_original_start":"0"}}'
)


def test_the_buffers_of_a_collective_are_not_traffic_of_what_runs_beside_it():
    def traffic(attributes):
        module = hlo.parse(PROGRAM.replace(" CONTINUATION", attributes))
        return {
            instruction.name: hbm_bytes(module, "main", instruction)
            for instruction in module.computations["main"]
            if instruction.opcode == "fusion"
        }

    own = 2 * 4 * 8 * 4
    assert traffic(CONTINUATION) == {"beside": own, "async-collective-done": 0}
    # A fusion without them reads and writes all.
    assert traffic("")["beside"] == own + 2 * (8 * 64 + 64 * 64)
