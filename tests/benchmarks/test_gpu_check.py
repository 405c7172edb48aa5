"""The GPU check is ready: its items run on the CPU, a failing one is recorded, and time is kept."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import gpu_check, gpu_numerics, gpu_throughput, zeroth_order
from benchmarks.gpu_check import GpuCheck, Item
from benchmarks.language_models import Llama
from benchmarks.models import Transformer
from benchmarks.peers import NON_PRIVATE, OTHERS, Problem, Settings, jaxdp_contender

pytestmark = pytest.mark.unoptimized
TINY = Llama(num_blocks=1, width=8, num_heads=2, length=6, vocabulary=11, feed_forward=12, dtype="bfloat16")
PACE = {"rounds": 2, "turn_seconds": 0.0}
QUIET = Settings(l2_clip_norm=1.0, noise_multiplier=0.0, learning_rate=1e-4)  # noise takes long to compile


@pytest.fixture(autouse=True)
def peers_can_run():
    """Not contexts: these hold for every thread, and contenders are compiled in several."""
    ours = {name: getattr(jax.config, name) for name in ("jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")}
    jax.config.update("jax_numpy_dtype_promotion", "standard")  # jax.nn mixes bfloat16 and float32
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    for name, value in ours.items():
        jax.config.update(name, value)


def test_items_run_one_by_one_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    path = tmp_path / "record.json"
    record = gpu_check.run(GpuCheck(json=path, tiny=True, items="noise_time"))
    (item,) = record["items"].values()
    assert item["result"]["seconds"].keys() == {"jaxdp", "jax.random.normal"}
    assert record["device"]["platform"] == jax.default_backend()
    assert json.loads(path.read_text()) == record


def test_updates_are_compared_with_the_definition():
    (differences,) = gpu_numerics.updates_against_definition([TINY], 4).values()
    assert differences.keys() >= {"jaxdp", "jaxdp_vmap", "jaxdp_two_pass", "jaxdp_book_keeping", "jaxdp_per_layer"}
    assert differences["jaxdp_vmap"] == 0.0


def test_clipped_sums_of_every_method_are_compared_with_float64():
    assert gpu_numerics.clipped_sums_against_float64().keys() >= {"float32 auto", "bfloat16 per_layer"}


def test_kernels_wait_for_their_module(monkeypatch):
    monkeypatch.setattr(gpu_numerics.importlib.util, "find_spec", lambda name: None)
    assert gpu_numerics.kernels("check") == {"absent": "there is no benchmarks.kernels"}


def test_methods_are_timed_in_turns_with_the_non_private_step():
    saved: list[set[str]] = []
    stages = [[jaxdp_contender()], [jaxdp_contender("per_layer", microbatch_size=2)]]
    result = gpu_throughput.measure(
        Problem(TINY, 4, seed=0), stages, lambda so_far: saved.append(set(so_far["contenders"])), settings=QUIET, **PACE
    )
    assert result["tokens_per_step"] == 4 * 6
    entries = result["contenders"]
    assert entries.keys() == {"non_private", "jaxdp", "jaxdp_per_layer"}
    assert {"non_private", "jaxdp"} in saved  # before the second stage
    for entry in entries.values():
        ratios = entry["throughput_over_non_private"]
        assert len(entry["seconds_per_step"]) == 2
        assert 0 < ratios["min"] <= ratios["max"]
        assert entry["xla_bytes_over_non_private"] == entry["xla_bytes"] / entries["non_private"]["xla_bytes"]
    np.testing.assert_allclose(entries["non_private"]["throughput_over_non_private"]["median"], 1.0)
    assert entries["jaxdp_per_layer"]["microbatch_size"] == 2
    assert "jaxdp_per_layer" in gpu_throughput.summary(result)


def test_a_contender_that_does_not_fit_leaves_the_others():
    broken = dataclasses.replace(jaxdp_contender(), options=(("method", "no_such_method"),))
    result = gpu_throughput.measure(Problem(TINY, 4, seed=0), [[broken]], lambda _: None, settings=QUIET, **PACE)
    assert "error" in result["contenders"]["jaxdp"]
    assert "throughput_over_non_private" in result["contenders"]["non_private"]
    assert "ValueError" in gpu_throughput.summary(result)


def test_only_gradients_that_fit_are_formed_at_once(monkeypatch):
    seen: list = []
    monkeypatch.setattr(gpu_throughput, "measure", lambda problem, stages, save, **_: seen.extend(stages) or {})
    medium = gpu_check.Gpt2.of_size("medium", dtype="bfloat16")
    gpu_throughput.materializing(medium, 64, lambda _: None)
    gpu_throughput.materializing(medium, 8, lambda _: None)
    sizes = [contender.microbatch_size for stage in seen for contender in stage if contender.name == "jaxdp_vmap"]
    assert sizes == [16, None]


@pytest.mark.skipif(OTHERS[-1].why_skipped() is not None, reason="opacus is not installed")
@pytest.mark.filterwarnings("ignore")
def test_opacus_is_timed_against_torch():
    model = Transformer(num_blocks=1, width=8, num_heads=2, length=6, vocabulary=11)
    result = gpu_throughput.opacus_ghost(model, 4, lambda _: None, dtype="float32", **PACE)
    assert result["contenders"]["opacus_ghost"]["throughput_over_non_private"]["median"] > 0


def test_the_most_important_items_come_first():
    names = list(gpu_check.items())
    assert names[:3] == ["kernels_check", "clipped_sums_against_float64", "updates_against_definition"]
    assert names[3:5] == ["gpt2_medium_t1024", "llama_t512"]
    assert names[5:9] == ["link", "zeroth_order_opt-1.3b", "zeroth_order_opt-13b", "zeroth_order_opt-30b"]
    assert names[9] == "private_zeroth_order_opt-1.3b"
    throughput = {
        f"{model}_t{length}" for model in ("gpt2_small", "gpt2_medium", "llama") for length in (128, 512, 1024, 2048)
    }
    assert throughput <= set(names)
    assert names == list(gpu_check.items(tiny=True))


def test_the_link_is_measured_in_both_directions():
    outcome = gpu_check.run_here(gpu_check.items(tiny=True)["link"])
    (row,) = outcome["result"]["link"]
    assert row.keys() == {"bytes", "to_device", "to_host", "duplex"}
    assert all(row[name]["median"] > 0 for name in ("to_device", "to_host", "duplex"))


def test_streamed_models_are_measured_under_a_cap_and_the_resident_one_leaves_room_for_torch(monkeypatch):
    seen = {}
    monkeypatch.setattr(zeroth_order, "measure", lambda config, save: seen.setdefault(config.problem, config) and {})
    items = {name: item for name, item in gpu_check.items().items() if name.startswith("zeroth_order_")}
    for item in items.values():
        item.run(lambda _: None)
    assert {name.removeprefix("zeroth_order_") for name in items} == seen.keys()
    resident = seen.pop("opt-1.3b")
    assert resident.is_resident
    assert resident.torch
    assert resident.num_directions == (1, 4, 16)
    assert {config.max_device_gigabytes for config in seen.values()} == {8.0}
    assert not any(config.is_resident for config in seen.values())
    host_limit = {item.environment.get("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB") for item in items.values()}
    assert host_limit == {None, "110"}


def test_what_privacy_adds_to_a_streamed_step_is_measured():
    outcome = gpu_check.run_here(gpu_check.items(tiny=True)["private_zeroth_order_opt-1.3b"])
    assert outcome["result"]["directions"]["1"]["private_over_not_private"]["median"] > 0


def test_a_failing_item_is_recorded_and_late_ones_are_left_out():
    def fails(save):
        save({"first": 1})
        raise ValueError("broken on purpose")

    record = gpu_check.run(GpuCheck(), {"bad": Item(fails), "good": Item(lambda save: {})})
    assert record["items"]["bad"]["error"] == "ValueError: broken on purpose"
    assert record["items"]["bad"]["partial"] == {"first": 1}
    assert "result" in record["items"]["good"]
    late = gpu_check.run(GpuCheck(seconds=-1.0), {"good": Item(lambda save: {})})
    assert "left_out" in late["items"]["good"]


def test_an_item_that_takes_too_long_is_stopped():
    item = gpu_check.items(tiny=True)["noise_time"]
    outcome = gpu_check.run_apart("noise_time", GpuCheck(tiny=True), item, seconds=0.2)
    assert outcome == {"error": "stopped after 0 s"}


def test_the_baseline_comes_with_the_first_stage():
    assert not NON_PRIVATE.adds_noise
    assert gpu_throughput.METHOD_STAGES[0][0] == "auto"
