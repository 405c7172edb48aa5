"""The benchmark of DP-SGD: it runs, it keeps what it measured, and it refuses to time unequal computations."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import dp_sgd, harness
from benchmarks.models import Mlp
from benchmarks.peers import CONTENDERS, PEERS, Problem, Settings

ROOT = pathlib.Path(__file__).parents[2]
ROUNDS = 3

# The process memory takes a new interpreter for each contender: once is enough.
SIZES = {
    "mlp": ["--mlp.widths", "12", "5"],
    "transformer": [
        *("--transformer.num-blocks", "1", "--transformer.width", "8", "--transformer.num-heads", "2"),
        *("--transformer.length", "6", "--transformer.vocabulary", "11", "--no-process-memory"),
    ],
}
BY_NAME = {contender.name: contender for contender in CONTENDERS}
PROBLEM = Problem(Mlp((100, 3)), rows=4, seed=0)
SETTINGS = Settings(l2_clip_norm=1.0, noise_multiplier=1.0, learning_rate=0.01)


@pytest.fixture(scope="module", params=sorted(SIZES))
def record(request, tmp_path_factory) -> dict:
    """The record of a tiny run; in a process of its own, since peers do not survive strict promotion."""
    path = tmp_path_factory.mktemp("benchmark") / "record.json"
    command = [sys.executable, "-m", "benchmarks.dp_sgd", "--model", request.param, *SIZES[request.param]]
    command += ["--batch", "4", "--rounds", str(ROUNDS), "--turn-seconds", "0.001", "--peers", ",".join(PEERS)]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # most of the time goes into compiling
    done = subprocess.run([*command, "--json", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "jaxdp" in done.stdout
    return json.loads(path.read_text())


def test_every_peer_is_measured_or_skipped_with_a_reason(record):
    measured = {BY_NAME[name].peer for name in record["contenders"]}
    assert {"non_private", "jaxdp", "optax"} <= record["contenders"].keys()
    assert measured - {None} | record["skipped"].keys() == set(PEERS)
    assert not measured & record["skipped"].keys()
    assert all(record["skipped"].values())


def test_what_is_timed_was_checked(record):
    check = record["check"]
    assert check["reference"] == "jaxdp"
    assert check["relative_difference_without_noise"].keys() == record["contenders"].keys() - {"jaxdp"}
    assert max(check["relative_difference_without_noise"].values()) <= check["tolerance"] <= 1e-5
    private = {name for name in record["contenders"] if BY_NAME[name].is_private}
    assert check["noise_stddev"]["measured"].keys() == private
    assert 0 < check["fraction_of_examples_clipped"] < 1


def test_summaries_follow_from_raw_times(record):
    for name, result in record["contenders"].items():
        times = result["seconds_per_step"]
        assert len(times) == ROUNDS
        assert min(times) > 0
        assert result["seconds_per_step_summary"]["median"] == pytest.approx(np.median(times))
        assert result["examples_per_second"]["median"] == pytest.approx(np.median(4 / np.asarray(times)))
        baseline = record["contenders"][result["baseline"]]["seconds_per_step"]
        np.testing.assert_allclose(result["time_over_baseline"], np.asarray(times) / baseline, err_msg=name)


def test_memory_names_its_meter(record):
    for name, result in record["contenders"].items():
        meters = {entry["meter"]: entry["bytes"] for entry in result["peak_memory"]}
        assert (harness.XLA_METER in meters) == (BY_NAME[name].baseline == "non_private")
        assert (harness.PROCESS_METER in meters) == (record["config"]["model"]["name"] == "mlp")
        assert meters.get(harness.XLA_METER, 1) > 0


def test_a_record_says_how_it_was_made(record):
    assert record["command"].startswith("python -m benchmarks.dp_sgd --model ")
    assert record["machine"].keys() >= {"cpu", "cores", "memory_bytes", "system"}
    assert record["device"].keys() == {"platform", "kind", "count"}
    assert record["versions"].keys() >= {"python", "jax", "jaxlib", "jaxdp", "optax"}
    assert record["config"].keys() >= {"model", "num_params", "batch", "l2_clip_norm", "noise_multiplier", "rounds"}


def test_an_unknown_peer_is_an_error_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(dp_sgd, "measure", lambda *_: pytest.fail("it started to work"))
    with pytest.raises(SystemExit) as error:
        dp_sgd.main(["--peers", "optax,tensorflow_privacy"])
    assert error.value.code not in (0, None)
    output = capsys.readouterr()
    message = output.out + output.err
    assert "tensorflow_privacy" in message
    assert "opacus" in message  # it names the peers that exist


def test_an_absent_peer_is_reported(monkeypatch):
    absent = dataclasses.replace(BY_NAME["optax"], imports=("a_package_that_is_not_there",))
    monkeypatch.setattr(dp_sgd, "CONTENDERS", (BY_NAME["jaxdp"], absent))
    running, skipped = dp_sgd.choose("optax")
    assert [contender.name for contender in running] == ["jaxdp"]
    assert skipped == {"optax": "not installed: a_package_that_is_not_there"}


def test_unequal_updates_are_not_timed():
    unclipped = dataclasses.replace(BY_NAME["optax"], maker="non_private:make")
    with pytest.raises(RuntimeError, match="optax does not compute the update of jaxdp"):
        dp_sgd.check_updates([unclipped], PROBLEM, SETTINGS)


def test_the_baseline_is_jaxdp_without_clip_and_noise():
    differences, _ = dp_sgd.check_updates([BY_NAME["non_private"]], PROBLEM, SETTINGS)
    assert differences["non_private"] <= dp_sgd.TOLERANCE


def test_unequal_noise_is_not_timed():
    _, noiseless = dp_sgd.check_updates([], PROBLEM, SETTINGS)
    twice = dataclasses.replace(SETTINGS, noise_multiplier=2.0)
    trainers = {"jaxdp": BY_NAME["jaxdp"].make(PROBLEM, twice)}
    with pytest.raises(RuntimeError, match="jaxdp adds noise of standard deviation"):
        dp_sgd.check_noise(trainers, PROBLEM, SETTINGS, noiseless)


def test_turns_alternate_and_rotate():
    turns: list[str] = []
    steps = {name: lambda name=name: turns.append(name) for name in "abc"}
    times, counts = harness.alternate(steps, rounds=3, turn_seconds=0.0)
    assert counts == {"a": 1, "b": 1, "c": 1}
    assert "".join(turns[6:]) == "abc" + "bca" + "cab"  # after two warm-up steps of each
    assert all(len(seconds) == 3 for seconds in times.values())


def test_process_memory_sees_an_allocation():
    size = 64 * 2**20
    memory = harness.process_memory(lambda: np.ones(size, np.uint8))
    if memory["bytes"] is None:
        pytest.skip(memory["reason"])
    assert 0.8 * size < memory["bytes"] < 1.5 * size  # the kernel may reclaim other pages meanwhile
