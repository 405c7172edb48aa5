"""Methods are compared at the same number of forward passes, and a record is added to by runs with its settings alone."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness, zeroth_order_grimm
from benchmarks.zeroth_order_grimm import METHODS, PASSES_PER_STEP, Config
from jaxdp.zeroth_order import OneSided


def config(path=None, **changes):
    return Config(text=Path("tales.txt"), model=Path("model"), json=path, **changes)


def test_a_step_counts_the_passes_of_its_estimator():
    for name, (estimator, _, _) in METHODS.items():
        K = estimator.num_directions
        assert PASSES_PER_STEP[name] == (K + 1 if isinstance(estimator, OneSided) else 2 * K)
    assert {name: config(num_passes=90).num_steps(name) for name in PASSES_PER_STEP} == {
        "mezo": 45,
        "lozo": 45,
        "fzoo": 10,
        "backprop": 30,
    }


def test_a_record_keeps_what_is_not_run_again_and_refuses_other_settings(tmp_path):
    path = tmp_path / "record.json"
    runs = [{"method": "mezo"}, {"method": "lozo"}]
    harness.write_json(path, {"config": config(path).settings(), "runs": runs})
    assert zeroth_order_grimm._others(config(path, methods=("lozo", "fzoo"))) == [{"method": "mezo"}]
    assert zeroth_order_grimm._others(config()) == []
    with pytest.raises(ValueError, match="has other settings"):
        zeroth_order_grimm._others(config(path, batch=3))


def test_the_figure_is_small_enough_to_commit():
    losses = list(np.linspace(3.4, 3.1, 40))
    runs = [{"method": name, "losses": losses, "perplexity_after": 20.0} for name in PASSES_PER_STEP]
    record = {"runs": runs, "model": "model", "perplexity_before": 22.0, "config": config().settings()}
    figure = zeroth_order_grimm._figure(record)
    assert figure.startswith(b"\x89PNG")
    assert len(figure) < 100_000


def test_smoothing_takes_means_of_equal_stretches():
    np.testing.assert_allclose(zeroth_order_grimm._smoothed(np.arange(8.0), 4), [0.5, 2.5, 4.5, 6.5])
