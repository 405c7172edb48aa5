"""The designs of streaming compute one thing, and what is read from a scheduled program is what is in it."""

import pytest

from benchmarks import scheduled_hlo, streaming_designs, streaming_programs

pytestmark = pytest.mark.unoptimized


def test_one_program_for_all_blocks_leaves_the_bits_of_one_program_for_each():
    """Of a toy model, unoptimized. In larger ones XLA fuses across blocks what one program for each keeps apart."""
    assert same_bits("even_odd")


def test_a_design_that_takes_the_wrong_block_has_other_bits(monkeypatch):
    def first_index_only(visit, stacks, streams):
        return streaming_programs.even_odd(lambda bucket, streams, i: visit(bucket, streams, 0 * i), stacks, streams)

    monkeypatch.setitem(streaming_programs.PROGRAMS, "even_odd", (first_index_only, 2))
    assert not same_bits("even_odd")


def same_bits(design):
    return streaming_designs.same_bits((design,), *streaming_designs.block_models()["toy"])[design]


def test_blocks_that_do_not_divide_into_pairs_are_refused():
    with pytest.raises(ValueError, match="even_odd divides the blocks among 2 stacks of at least 2, and there are 3"):
        streaming_programs.pass_blocks("even_odd", None, [None] * 3, None, None)  # pyright: ignore[reportArgumentType]


PROGRAM = """HloModule m
%fused (p: bf16[4,8]) -> bf16[1,8] {
  ROOT %s = bf16[1,8]{1,0} dynamic-slice(%p, %i), config={"loop_index":"0","linear":{"byte_offset":"16","byte_stride":"16"}}
}
%gemm (a: bf16[2,3], b: bf16[3,5]) -> bf16[2,5] {
  %a = bf16[2,3]{1,0} parameter(0)
  ROOT %dot.1 = bf16[2,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%body (c: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %one = bf16[2,5]{1,0} fusion(%x, %y), kind=kCustom, calls=%gemm
  %copied = bf16[4,8]{1,0:S(5)} copy(%stack)
  %start = ((bf16[4,8]{1,0:S(5)}, s32[]), bf16[1,8]{1,0}, u32[]) fusion-start(%stack, %i), kind=kLoop, calls=%fused
  %two = bf16[2,5]{1,0} fusion(%one, %y), kind=kCustom, calls=%gemm
  %three = bf16[2,5]{1,0} fusion(%two, %y), kind=kCustom, calls=%gemm
  %done = bf16[1,8]{1,0} fusion-done(%start)
  %four = bf16[2,5]{1,0} fusion(%three, %y), kind=kCustom, calls=%gemm
}
ENTRY %main (s: bf16[4,8]) -> bf16[4,8] {
  %w = (s32[], bf16[4,8]) while(%t), condition=%cond, body=%body
}
"""


def test_a_schedule_tells_what_hides_a_transfer():
    (transfer,) = scheduled_hlo.transfers(PROGRAM)
    assert transfer == scheduled_hlo.Transfer("to_device", True, 2, 0.5, True)
    assert scheduled_hlo.slice_offsets(PROGRAM) == {(16, 16)}
    assert scheduled_hlo.whole_copies(PROGRAM, "bf16[4,8]") == 1
    assert scheduled_hlo.whole_copies(PROGRAM, "bf16[1,8]") == 0
