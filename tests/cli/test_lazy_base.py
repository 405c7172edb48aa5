"""`jaxdp finetune` and `jaxdp replay` by forward passes never hold the base model whole beside the form that it waits in."""

import json
import tracemalloc

import jax
import pytest
import safetensors.numpy

from jaxdp.cli import block_job, main, run_secrets, tuning_job, update_check
from jaxdp.cli.finetune_options import ModelOptions
from jaxdp.models.lazy_stack import LazyStack
from jaxdp.models.tensor_files import OpenFile
from jaxdp.models.weights import load_model
from jaxdp.zeroth_order import State, buckets
from tests.cli.conftest import LLAMA, write_model

pytestmark = pytest.mark.unoptimized  # a run is compared with one of the same programs
NUM_BLOCKS = LLAMA["num_hidden_layers"]
RANK = 3  # which is no other width of the model
RUNS = {
    "int4 below adapters": ["--tune", "lora", "--lora-rank", RANK, "--base-format", "int4", "--merge"],
    "full": ["--tune", "full"],
    "full in bfloat16": ["--tune", "full", "--param-dtype", "bfloat16", "--dtype", "bfloat16"],
}


@pytest.fixture(autouse=True)
def same_secrets(monkeypatch):
    """Every run draws the same batches."""
    draw = run_secrets.draw
    monkeypatch.setattr(run_secrets, "draw", lambda *args, **more: draw(*args, **more)._replace(sampling_entropy=12345))


def run(llama, texts, out, *more) -> dict[str, bytes]:
    """What a streamed run releases."""
    command = ["finetune", "--model", llama, "--data", texts / "private.txt", "--record", "line", "--max-length", "24"]
    command += ["--method", "mezo", "--no-privacy", "--stream", "--num-steps", "2", "--expected-batch-size", "4"]
    main([str(part) for part in [*command, "--learning-rate", "1e-2", *more, "--out", out]])
    return released_in(out)


def released_in(out) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("*/*.safetensors"))}


@pytest.fixture
def seen(monkeypatch):
    """What happens to files and blocks, in its order: the bytes read, buckets that are packed, stacks that are made whole."""
    events: list[tuple] = []

    def spy(owner, name, event):
        real = getattr(owner, name)

        def called(*args, **more):
            found = real(*args, **more)
            events.append(event(*args))
            return found

        monkeypatch.setattr(owner, name, called)

    spy(OpenFile, "read", lambda file, offset, num_bytes: ("read", num_bytes))
    spy(buckets, "packed", lambda layout, stacked, index: ("packed", index))
    spy(LazyStack, "__array__", lambda stack, *more: ("whole", stack.shape))
    return events


@pytest.mark.parametrize("name", RUNS)
def test_blocks_go_from_the_file_into_the_stream_one_by_one(name, llama, texts, tmp_path, monkeypatch, seen):
    found = run(llama, texts, tmp_path / "opened", *RUNS[name])
    tensors = safetensors.numpy.load_file(llama / "model.safetensors")
    block_bytes = sum(tensor.nbytes for tensor_name, tensor in tensors.items() if ".layers.0." in tensor_name)

    read_before, order = [0], []
    for what, value in seen:
        if what == "read":
            read_before[-1] += value
        elif what == "packed":
            order.append(value)
            read_before.append(0)
    # The frozen blocks first, or the trained ones; then adapters, which are in no file.
    assert order[:NUM_BLOCKS] == list(range(NUM_BLOCKS))
    assert read_before[1:NUM_BLOCKS] == [block_bytes] * (NUM_BLOCKS - 1)
    assert not any(read_before[NUM_BLOCKS:-1])
    whole = [shape for what, shape in seen if what == "whole"]
    assert all(RANK in shape for shape in whole), whole  # only what is small

    # And the run is the one with the base in memory.
    monkeypatch.setattr(tuning_job, "open_model", load_model)
    seen.clear()
    assert run(llama, texts, tmp_path / "loaded", *RUNS[name]) == found
    assert len(found) == (2 if "--merge" in RUNS[name] else 1)
    reports = [json.loads((tmp_path / out / "report.json").read_text()) for out in ("opened", "loaded")]
    for of in ("updates", "not_private", "tuning", "num_parameters"):
        for report in reports:
            report["not_private"].pop("tokens_per_second", None)
        assert reports[0][of] == reports[1][of]
    assert reports[0]["updates"]["warnings"] == []
    settings = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("opened", "loaded")]
    assert settings[0] == settings[1]  # with the fingerprint of the base


@pytest.mark.parametrize("name", ["int4 below adapters", "full"])
def test_a_replay_reads_blocks_one_by_one_too(name, llama, texts, tmp_path, seen):
    found = run(llama, texts, tmp_path / "run", *RUNS[name])
    seen.clear()
    command = ["replay", tmp_path / "run" / "trajectory.jaxdpzo", "--base", llama, "--out", tmp_path / "again"]
    main([str(part) for part in [*command, *(["--merge"] if "--merge" in RUNS[name] else [])]])
    assert released_in(tmp_path / "again") == found
    assert [event for event in seen if event[0] == "read"]
    assert not [shape for what, shape in seen if what == "whole" and RANK not in shape]


def tuning_of(folder, num_blocks, tune="lora") -> tuning_job.Tuning:
    wide = LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": num_blocks}
    if not folder.exists():
        write_model(folder, wide)
    rank = RANK if tune == "lora" else None
    return tuning_job.load_tuning(ModelOptions(folder, tune=tune, lora_rank=rank), dtype="bfloat16")[0]


@pytest.mark.parametrize("base_format", ["bf16", "int4"])
def test_what_passes_through_memory_is_predicted_and_does_not_grow_with_the_model(base_format, tmp_path):
    predicted, peaks = [], []
    for num_blocks in (2, 6):
        tuning = tuning_of(tmp_path / f"{num_blocks}", num_blocks)
        tracemalloc.start()
        try:
            _, frozen = block_job.parts_of(tuning, base_format)
            assert frozen is not None
            before = tracemalloc.get_traced_memory()[0]
            layout, found = buckets.layout_of(frozen.blocks)
            assert found == num_blocks
            tracemalloc.reset_peak()
            for i in range(num_blocks):
                buckets.packed(layout, frozen.blocks, i)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
        predicted.append(block_job.passing_bytes(tuning, base_format, merge=False))
    assert predicted[0] == predicted[1]
    assert max(peaks) <= predicted[0]
    assert abs(peaks[0] - peaks[1]) < 2**14
    if base_format == "bf16":  # int4 has the tiles of `quantize`, whose size is that of large models
        assert predicted[0] < 2 * max(peaks)


def test_a_shard_of_what_is_written_is_predicted(tmp_path):
    """`save_model` puts one together before it writes it: of a whole model below the size of a shard, a copy."""
    full = tuning_of(tmp_path / "model", 2, tune="full")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(full.trainable))
    assert block_job.passing_bytes(full, None, merge=False) == size
    merged, alone = (
        block_job.passing_bytes(tuning_of(tmp_path / "model", 2), "bf16", merge=merge) for merge in (True, False)
    )
    assert merged > size > alone


def test_the_trained_parameters_of_a_state_are_read_where_they_wait(llama, texts, tmp_path, monkeypatch, seen):
    """Digests, the search for NaN and the writer take them block by block, and find what is in the whole arrays."""
    states = []
    in_place = State.params_in_place

    def spy(state):
        states.append(state)
        return in_place(state)

    monkeypatch.setattr(State, "params_in_place", spy)
    run(llama, texts, tmp_path / "run", *RUNS["full"])
    seen.clear()
    (state,) = states
    found, expected = block_job.whole(in_place(state)), block_job.whole(state.params())
    assert update_check.digests(found) == update_check.digests(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    check = update_check.UpdateCheck(1, (), ())
    assert update_check.with_non_finite(check, found).non_finite == ()
    assert not [event for event in seen if event[0] == "whole"]
    # A NaN in the last block is found, and no other leaf blamed.
    leaf = found["blocks"]["mlp"]["up"]["kernel"]
    spoiled = leaf.derived(leaf.shape, leaf.dtype, lambda i: leaf[i] * (1 if i == 0 else float("nan")))
    found["blocks"]["mlp"]["up"]["kernel"] = spoiled
    assert update_check.with_non_finite(check, found).non_finite == ("blocks/mlp/up/kernel",)
