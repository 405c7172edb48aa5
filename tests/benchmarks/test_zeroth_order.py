"""The benchmark of zeroth-order steps: its parts are parts of one step, and its ratios are those it names."""

import dataclasses
import json
import os
import stat

import jax
import numpy as np
import pytest

from benchmarks import zeroth_order, zeroth_order_contenders, zeroth_order_torch
from benchmarks.zeroth_order import Config
from benchmarks.zeroth_order_problems import PROBLEMS, Problem
from jaxdp.zeroth_order import Placement
from tests.zeroth_order.models import bits

pytestmark = pytest.mark.unoptimized
TINY = PROBLEMS["tiny"]


def params_of(run):
    return bits(run._steps.flush(run._state).params())


def test_transfers_alone_change_nothing_and_the_run_goes_on():
    placement = Placement(is_streamed=True)
    runs = [zeroth_order_contenders.Run(TINY, 1, placement) for _ in range(2)]
    runs[0].step()
    runs[0].transfers()
    runs[0].step()
    for _ in range(2):
        runs[1].step()
    assert params_of(runs[0]) == params_of(runs[1])


def test_a_run_in_stages_is_a_run():
    placement = Placement(is_streamed=True)
    whole, split = (zeroth_order_contenders.Run(TINY, 1, placement, is_split=is_split) for is_split in (False, True))
    assert len(split._state.waiting.blocks) > len(whole._state.waiting.blocks) == TINY.num_blocks
    for _ in range(2):  # the second applies the first's update
        split.step()
    assert params_of(split) != bits(TINY.params)
    found = zeroth_order.ratios({"streamed": [2.0], "in_stages": [3.0], "transfers": [1.0], "computation": [1.0]}, 1)
    assert found["in_stages_over_streamed"]["median"] == 1.5


def test_the_computation_is_that_of_a_step_with_one_block_for_all():
    """Of a model with one block, where it is the step itself."""
    problem = dataclasses.replace(TINY, num_blocks=1)
    vars(problem)["blocks"] = TINY.blocks  # the programs of the other tests, not new ones
    placement = zeroth_order_contenders.OneBlock(is_streamed=True)
    computing = zeroth_order_contenders.Run(problem, 1, placement)
    streamed = zeroth_order_contenders.Run(problem, 1, Placement(is_streamed=True))
    before = bits(computing._placement.held["block"])
    for _ in range(2):
        computing.step()
        streamed.step()
    after = bits(computing._placement.held["block"])
    assert after == bits(jax.device_get(streamed._state.waiting.blocks[0]))
    assert after != before


def test_measuring_fills_the_record(tmp_path):
    path = tmp_path / "record.json"
    config = Config(problem="tiny", num_directions=(1,), rounds=2, turn_seconds=0.0, json=path)
    record = zeroth_order.run(config, [])
    found = record["result"]["directions"]["1"]
    assert found["seconds"].keys() == {"streamed", "transfers", "computation", "resident", "by_blocks", "forward"}
    assert all(len(seconds) == 2 for seconds in found["seconds"].values())
    assert found["device_peak_bytes"] is None  # a CPU has no meter
    assert record["result"]["link_is_simulated"]
    assert "step_over_bound" in zeroth_order.summary(record["result"])
    assert json.loads(path.read_text())["result"] == record["result"]


def test_ratios_are_of_one_round_each():
    times = {
        "streamed": [4.0, 9.0],
        "transfers": [2.0, 3.0],
        "computation": [1.0, 6.0],
        "resident": [2.0, 4.0],
        "by_blocks": [0.25, 0.5],
        "forward": [0.5, 1.0],
        "torch_mezo": [6.0, 16.0],
        "torch_forward": [2.0, 2.0],
    }
    found = {name: (spread["min"], spread["max"]) for name, spread in zeroth_order.ratios(times, 2).items()}
    assert found == {
        "step_over_bound": (1.5, 2.0),  # bound by the link in the first round, by the computation in the second
        "link_utilization": (1 / 3, 0.5),
        "streamed_over_resident": (2.0, 2.25),
        "resident_over_forward": (4.0, 4.0),
        "perturbation_and_update_share": (0.5, 0.5),
        "torch_mezo_over_ours": (3.0, 4.0),
        "torch_mezo_over_torch_forward": (3.0, 8.0),
    }


def test_problems_have_the_published_sizes():
    sizes = {"opt-1.3b": 1.3e9, "opt-6.7b": 6.7e9, "opt-13b": 13e9, "opt-30b": 30e9}
    for name, size in sizes.items():
        problem = PROBLEMS[name]
        shapes = jax.tree.leaves(problem.model.shapes())
        assert abs(sum(leaf.size for leaf in shapes) / size - 1) < 0.03


def test_the_blocks_of_a_problem_take_the_memory_of_one():
    problem = Problem(num_blocks=1000, width=64, num_heads=2, vocabulary=31, length=8)
    kernels = jax.tree.leaves(problem.params.blocks)
    assert all(leaf.strides[0] == 0 and leaf.shape[0] == 1000 for leaf in kernels)
    assert problem.block_bytes < 2**18


def test_the_cap_is_a_share_of_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 80000\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    zeroth_order.cap_device_memory(8.0)
    share = float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    np.testing.assert_allclose(share * 80000 * 2**20, 8e9, rtol=1e-3)


def test_unknown_problems_are_refused():
    with pytest.raises(ValueError, match="problem"):
        Config(problem="opt-175b")


@pytest.mark.skipif(zeroth_order_torch.why_not() is not None, reason="torch is not installed")
def test_the_torch_peer_descends_and_puts_its_parameters_back(monkeypatch):
    import torch  # pyright: ignore[reportMissingImports]

    problem = dataclasses.replace(TINY, batch=2)
    kept: list = []
    drawn = zeroth_order_torch._params
    monkeypatch.setattr(zeroth_order_torch, "_params", lambda *args: kept.extend(drawn(*args)) or kept)
    monkeypatch.setattr(zeroth_order_torch, "_LEARNING_RATE", 0.0)
    step, _ = zeroth_order_torch.mezo(problem)
    before = [leaf.clone() for leaf in kept]
    step()
    assert max(float((new - old).abs().max()) for new, old in zip(kept, before, strict=True)) < 1e-6
    monkeypatch.setattr(zeroth_order_torch, "_LEARNING_RATE", 1e-3)
    tokens = torch.as_tensor(problem.draw_batch()["tokens"][:, 0], dtype=torch.long)
    losses = [float(zeroth_order_torch._loss(problem, kept, tokens))]
    for _ in range(100):
        step()
    losses.append(float(zeroth_order_torch._loss(problem, kept, tokens)))
    assert losses[1] < losses[0]
