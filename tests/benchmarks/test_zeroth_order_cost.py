"""The benchmark of K directions: both contenders are one step, link bytes are those of all blocks, the model is its equation."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import zeroth_order_cost
from benchmarks.zeroth_order_contenders import Run
from benchmarks.zeroth_order_cost import Config, Counting
from benchmarks.zeroth_order_problems import PROBLEMS
from tests.zeroth_order.models import bits

pytestmark = pytest.mark.unoptimized
TINY = PROBLEMS["tiny"]
SMALL = Config(problem="tiny", batch=2, length=8, num_directions=(1, 3), rounds=2, turn_seconds=0.0)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("cost") / "record.json"
    found = zeroth_order_cost.run(dataclasses.replace(SMALL, json=path), [])
    assert json.loads(path.read_text())["result"] == found["result"]
    return found


def test_every_block_crosses_the_link_once_each_way_whatever_k_and_private_or_not(record):
    found = record["result"]
    whole = TINY.num_blocks * found["block_bytes"]
    for K in ("1", "3"):
        for name in ("private", "not_private"):
            ways = found["directions"][K]["link_bytes"][name]
            assert ways["to_device"] == ways["to_host"]
            np.testing.assert_allclose(ways["to_device"], whole, rtol=0.2)  # buckets are padded
    assert found["directions"]["1"]["link_bytes"] == found["directions"]["3"]["link_bytes"]


def test_the_two_contenders_differ_by_privacy_alone():
    problem = dataclasses.replace(TINY, batch=2)
    steps = [Run(problem, 1, Counting(), plan=plan)._steps for plan in (None, zeroth_order_cost.plan_for(problem))]
    assert steps[0].recipe == steps[1].recipe
    runs = [Run(problem, 1, Counting(), plan=plan) for plan in (None, zeroth_order_cost.plan_for(problem))]
    for run in runs:
        run.step()
    first, second = (bits(run._steps.flush(run._state).params()) for run in runs)
    assert first != second, "the plan adds noise"


def test_the_model_is_its_equation():
    config = Config(num_directions=(1, 16), link_rate=1e9, flop_rate=1e15, memory_rate=1e15)
    one, many = zeroth_order_cost.modelled("opt-13b", config)
    num_bytes = 40 * 12 * 5120**2 * 2
    assert one["link_seconds"] == many["link_seconds"] == num_bytes / 1e9
    assert many["computation_seconds"] == 16 * one["computation_seconds"]
    assert one["step_seconds"] == pytest.approx(num_bytes / 1e9 * (1 + 1 / 40)), "the link is slower"
    fast = dataclasses.replace(config, link_rate=1e15)
    assert zeroth_order_cost.modelled("opt-13b", fast)[1]["step_over_computation"] == pytest.approx(1.0, abs=1e-3)


def test_every_line_has_its_ratio(record):
    lines = zeroth_order_cost.summary(record["result"]).splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["K = 1", "K = 3"]
    assert all("ratio" in line for line in lines[:2])
    assert sum(line.startswith("modelled") for line in lines) == 14
