"""The benchmark of norm routes: the fit finds rates that made the times, and regret is one where the rule is right."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from benchmarks import norm_routes
from benchmarks.norm_routes import LAYERS, LENGTHS, Case
from jaxdp.gradients.cost_model import Rates


def test_the_fit_recovers_the_rates_of_times_that_follow_the_rule():
    cases = [Case(16, tokens, *layer) for layer in LAYERS for tokens in LENGTHS]
    true = Rates(9e10, 3e10, 2e10)
    seconds = [case.predicted(true) for case in cases]
    found = norm_routes.fitted(cases, seconds, Rates(1e10, 1e10, 1e10))
    np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(true), rtol=1e-4)
    assert np.exp(np.mean(np.log(norm_routes.regrets(cases, seconds, true)))) < 1.01  # large gradients are never stored
    assert max(norm_routes.regrets(cases, seconds, Rates(1e10, 1e14, 1e5))) > 1.3


def test_a_tiny_run_times_every_route(tmp_path, monkeypatch, capsys):
    path = tmp_path / "record.json"
    arguments = ["--tiny", "--rows", "2", "--rounds", "2", "--turn-seconds", "0.001", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["norm_routes", *arguments])
    norm_routes.main()
    record = json.loads(path.read_text())
    assert [set(case["seconds"]) for case in record["cases"]] == [{"gram", "direct", "spill"}] * 2
    assert record["regret_of_committed"]["largest"] >= 1
    assert "regret" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_routes_are_one_clipped_sum(dtype, monkeypatch):
    sums = {}
    monkeypatch.setattr(norm_routes.jax, "block_until_ready", lambda value: value)
    for name, call in norm_routes.routes(Case(3, 5, 8, 6), dtype).items():
        sums[name] = np.asarray(call())
    for name in ("direct", "spill"):
        np.testing.assert_allclose(sums[name], sums["gram"], rtol=0, atol=(2e-2 if dtype == "bfloat16" else 1e-4) * 3)
