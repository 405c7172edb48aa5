"""One program for all blocks, compiled for an H200: it keeps its stacks where they are, and the naive form does not."""

import pytest

from benchmarks import streaming_designs, streaming_programs


@pytest.fixture(scope="module")
def rows(compiler):
    problem = streaming_designs.setup(width=128, num_heads=2, length=128)
    return {design: streaming_designs.figures(design, 6, *problem) for design in ("even_odd", "one_stack")}


@pytest.mark.slow
def test_two_stacks_are_changed_in_place_and_one_is_copied_whole(rows):
    stack_bytes = 6 * rows["even_odd"]["block_bytes"]
    assert rows["even_odd"]["host_bytes"] == rows["even_odd"]["host_alias_bytes"] == stack_bytes
    assert rows["even_odd"]["whole_stack_copies"] == rows["even_odd"]["host_temp_bytes"] == 0
    assert rows["one_stack"]["whole_stack_copies"] > 0  # the check can fail
    assert rows["one_stack"]["host_bytes"] >= 2 * stack_bytes


@pytest.mark.usefixtures("lowering")
def test_what_is_compiled_does_not_grow_with_the_depth():
    problem = streaming_designs.setup(width=128, num_heads=2, length=128)
    for design in streaming_programs.PROGRAMS:
        short, long = (streaming_designs.lowered_bytes(design, depth, *problem) for depth in (6, 96))
        assert long < 1.01 * short


@pytest.mark.slow
def test_transfers_of_two_stacks_overlap_and_read_the_block_that_comes_next(rows):
    in_loop = [transfer for transfer in rows["even_odd"]["transfers"] if transfer["is_in_loop"]]
    assert sorted(transfer["direction"] for transfer in in_loop) == ["to_device", "to_device", "to_host", "to_host"]
    assert all(transfer["is_linear"] and transfer["operations_between"] > 0 for transfer in in_loop)
    block_bytes = rows["even_odd"]["block_bytes"]
    assert rows["even_odd"]["slice_offsets"] == [(0, block_bytes), (block_bytes, block_bytes)]
