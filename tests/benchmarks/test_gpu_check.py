"""The GPU check is ready: its items run on the CPU, a failing one is recorded, and time is kept."""

import json

import jax

from benchmarks import gpu_check


def test_numeric_items_pass_here(tmp_path):
    with jax.numpy_rank_promotion("allow"):
        numerics = {name: gpu_check.ITEMS[name] for name in ("clipped_sums_against_float64", "noise_time")}
        record = gpu_check.run(gpu_check.GpuCheck(json=tmp_path / "r.json"), numerics)
    assert all("result" in item for item in record["items"].values()), record
    assert json.loads((tmp_path / "r.json").read_text())["items"].keys() == record["items"].keys()


def test_a_failing_item_is_recorded_and_late_ones_are_left_out(tmp_path):
    def fails():
        raise ValueError("broken on purpose")

    record = gpu_check.run(gpu_check.GpuCheck(), {"bad": fails, "good": dict})
    assert record["items"]["bad"]["error"] == "ValueError: broken on purpose"
    assert "result" in record["items"]["good"]
    late = gpu_check.run(gpu_check.GpuCheck(seconds=-1.0), {"good": dict})
    assert "left_out" in late["items"]["good"]
