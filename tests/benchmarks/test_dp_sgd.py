"""The benchmark of DP-SGD: it runs, it keeps what it measured, and it refuses to time unequal computations."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import checks, dp_sgd, harness, peers, tuning
from benchmarks.models import Mlp
from benchmarks.peers import METHODS, NON_PRIVATE, OTHERS, PEERS, Problem, Settings, Trainer, jaxdp_contender
from tests import unoptimized

pytestmark = pytest.mark.unoptimized
ROOT = pathlib.Path(__file__).parents[2]
ROUNDS = 3

MLP = ["--mlp.widths", "12", "5"]
SIZES = {
    "mlp": [*MLP, "--peers", ",".join(PEERS), "--methods", ",".join(METHODS), "--no-process-memory"],
    "process memory": [*MLP, "--peers", "", "--no-tune"],  # a new interpreter for each contender
    "transformer": [
        *("--model", "transformer", "--peers", ",".join(PEERS), "--no-tune"),
        *("--transformer.num-blocks", "1", "--transformer.width", "8", "--transformer.num-heads", "2"),
        *("--transformer.length", "6", "--transformer.vocabulary", "11", "--no-process-memory"),
    ],
}
JAXDP = jaxdp_contender()
CLIP_ONLY = jaxdp_contender(adds_noise=False)
BY_NAME = {contender.name: contender for contender in (NON_PRIVATE, CLIP_ONLY, *map(jaxdp_contender, METHODS), *OTHERS)}
PROBLEM = Problem(Mlp((100, 3)), rows=4, seed=0)
SETTINGS = Settings(l2_clip_norm=1.0, noise_multiplier=1.0, learning_rate=0.01)


WITHOUT_TORCH = pytest.mark.skipif(
    BY_NAME["opacus"].why_skipped() is not None, reason="what is new in it is torch's model"
)


@pytest.fixture(scope="module", params=["mlp", "process memory", pytest.param("transformer", marks=WITHOUT_TORCH)])
def record(request, tmp_path_factory) -> dict:
    """The record of a tiny run; in a process of its own, since peers do not survive strict promotion."""
    path = tmp_path_factory.mktemp("benchmark") / "record.json"
    command = [sys.executable, "-m", "benchmarks.dp_sgd", *SIZES[request.param]]
    command += ["--batch", "4", "--rounds", str(ROUNDS), "--turn-seconds", "0.001"]
    environment = os.environ | {"XLA_FLAGS": unoptimized.xla_flags()}  # most of the time goes into compiling
    done = subprocess.run([*command, "--json", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "jaxdp" in done.stdout
    return json.loads(path.read_text())


def test_every_peer_is_measured_or_skipped_with_a_reason(record):
    measured = {BY_NAME[name].peer for name in record["contenders"]}
    assert {"non_private", "jaxdp", "jaxdp_clip_only"} <= record["contenders"].keys()
    assert measured - {None} | record["skipped"].keys() == (set() if "--peers ''" in record["command"] else set(PEERS))
    assert not measured & record["skipped"].keys()
    assert all(record["skipped"].values())


def test_the_wanted_methods_are_measured(record):
    methods = {name for name in record["contenders"] if name.startswith("jaxdp_")} - {"jaxdp_clip_only"}
    assert methods == ({f"jaxdp_{m}" for m in METHODS[1:]} if "--methods" in record["command"] else set())


def test_what_is_timed_was_checked(record):
    check = record["check"]
    assert check["relative_difference_without_noise"].keys() == record["contenders"].keys()
    assert max(check["relative_difference_without_noise"].values()) <= check["tolerance"] <= 1e-3
    noisy = {name for name in record["contenders"] if BY_NAME[name].adds_noise}
    assert check["noise_stddev"]["measured"].keys() == noisy
    assert noisy | {"non_private", "torch_non_private", "jaxdp_clip_only"} >= record["contenders"].keys()
    assert 0 < check["fraction_of_examples_clipped"] < 1


def test_each_runs_at_its_fastest_microbatch_size(record):
    tuned = record["tuning"]["contenders"]
    could_be = {name for name in record["contenders"] if BY_NAME[name].is_tuned}
    assert tuned.keys() == (set() if "--no-tune" in record["command"] else could_be)
    for name, tried in tuned.items():
        assert tried["seconds_per_step"].keys() == {"whole batch", "1", "2"}
        fastest = min(tried["seconds_per_step"], key=lambda size: tried["seconds_per_step"][size]["median"])
        chosen = record["contenders"][name]["microbatch_size"]
        assert tried["chosen_microbatch_size"] == chosen
        assert fastest == ("whole batch" if chosen is None else str(chosen))


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
        assert (harness.PROCESS_METER in meters) == ("--no-process-memory" not in record["command"])
        assert meters.get(harness.XLA_METER, 1) > 0


def test_a_record_says_how_it_was_made(record):
    assert record["command"].startswith("python -m benchmarks.dp_sgd --")
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


@pytest.mark.parametrize(
    "wrong",
    [
        ["--methods", "fast"],
        ["--preset", "mlp_small", "--model", "mlp"],
        ["--tune-jaxdp", "--no-tune"],
        ["--low-memory", "--peers", "optax"],
    ],
)
def test_a_wrong_choice_is_an_error_before_any_work(wrong, monkeypatch):
    monkeypatch.setattr(dp_sgd, "measure", lambda *_: pytest.fail("it started to work"))
    with pytest.raises(SystemExit) as error:
        dp_sgd.main(wrong)
    assert error.value.code not in (0, None)


def test_an_absent_peer_is_reported(monkeypatch):
    absent = dataclasses.replace(BY_NAME["optax"], imports=("a_package_that_is_not_there",))
    monkeypatch.setattr(peers, "OTHERS", (absent,))
    running, skipped = peers.choose(["optax"], ["vmap"], microbatch_size=2)
    assert [contender.name for contender in running] == ["non_private", "jaxdp", "jaxdp_clip_only", "jaxdp_vmap"]
    assert [contender.microbatch_size for contender in running] == [None, 2, 2, 2]
    assert skipped == {"optax": "not installed: a_package_that_is_not_there"}


def test_the_presets_are_the_sizes_of_the_targets():
    sizes = {name: dp_sgd.Config(preset=name).problem for name in ("mlp_small", "transformer_d512", "transformer_d128")}
    assert {name: (problem.rows, problem.num_params()) for name, problem in sizes.items()} == {
        "mlp_small": (64, 203_530),
        "transformer_d512": (32, 19_973_632),
        "transformer_d128": (32, 1_071_872),
    }


def test_unequal_updates_are_not_timed():
    unclipped = dataclasses.replace(BY_NAME["optax"], maker="non_private:make")
    with pytest.raises(RuntimeError, match="optax does not compute the update of jaxdp"):
        checks.check_updates([unclipped], PROBLEM, SETTINGS)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_the_baseline_is_jaxdp_without_clip_and_noise(microbatch_size):
    baseline = NON_PRIVATE.with_microbatch_size(microbatch_size)
    differences, _ = checks.check_updates([baseline], PROBLEM, SETTINGS)
    assert differences["non_private"] <= checks.TOLERANCE


def test_clipping_by_layers_is_compared_with_its_own_definition():
    problem, per_layer = Problem(Mlp((20, 6, 3)), rows=4, seed=0), jaxdp_contender("per_layer")
    differences, references = checks.check_updates([JAXDP, per_layer], problem, SETTINGS)
    assert differences["jaxdp_per_layer"] <= checks.TOLERANCE
    apart = np.linalg.norm(references["flat"] - references["per_layer"]) / np.linalg.norm(references["flat"])
    assert apart > 10 * checks.TOLERANCE  # a comparison with flat clipping would have failed


def test_unequal_noise_is_not_timed():
    _, references = checks.check_updates([JAXDP], PROBLEM, SETTINGS)
    for factor in (2.0, 0.5):
        wrong = dataclasses.replace(SETTINGS, noise_multiplier=factor)
        trainers = {"jaxdp": JAXDP.make(PROBLEM, wrong)}
        with pytest.raises(RuntimeError, match="jaxdp adds noise of standard deviation"):
            checks.check_noise([JAXDP], trainers, PROBLEM, SETTINGS, references)


def test_clip_only_adds_no_noise():
    first, second = (CLIP_ONLY.make(PROBLEM, SETTINGS) for _ in range(2))
    for trainer in (first, second):
        trainer.step()
    assert all(np.array_equal(first.params()[name], leaf) for name, leaf in second.params().items())


def test_the_fastest_microbatch_size_wins(monkeypatch):
    seconds = {None: 3.0, 1: 2.0, 2: 1.0, 4: 4.0}
    monkeypatch.setattr(tuning, "candidates", lambda rows: list(seconds))

    def make(self, problem, settings):
        return Trainer(lambda: seconds[self.microbatch_size], dict, None)

    monkeypatch.setattr(peers.Contender, "make", make)
    monkeypatch.setattr(harness, "alternate", lambda steps, **_: ({name: [step()] for name, step in steps.items()}, {}))
    tuned, record = tuning.tune([NON_PRIVATE, JAXDP], PROBLEM, SETTINGS, turn_seconds=0.0)
    assert [contender.microbatch_size for contender in tuned] == [2, None]
    assert record["non_private"]["chosen_microbatch_size"] == 2
    assert record.keys() == {"non_private"}
    running, _ = peers.choose([], ["two_pass"], tune_jaxdp=True)
    tuned, record = tuning.tune(running, PROBLEM, SETTINGS, turn_seconds=0.0)
    assert [contender.microbatch_size for contender in tuned] == [2, 2, 2, 2]
    assert record.keys() == {
        "non_private",
        "jaxdp",
        "jaxdp_two_pass",
    }  # without noise, jaxdp takes the size it has with it


@pytest.mark.parametrize(("limit", "chosen"), [(25, 2), (20, 2), (100, None), (5, "skipped")])
def test_low_memory_is_the_largest_microbatch_within_the_memory_of_the_yardstick(monkeypatch, limit, chosen):
    needed = {1: 10, 2: 20, None: 40}

    def make(self, problem, settings):
        size = limit if self.name == "jax_privacy" else needed[self.microbatch_size]
        return Trainer(lambda: None, dict, lambda: {"bytes": size})

    monkeypatch.setattr(peers.Contender, "make", make)
    running, skipped = dp_sgd.with_low_memory([NON_PRIVATE, BY_NAME["jax_privacy"]], {}, PROBLEM, SETTINGS)
    found = [contender.microbatch_size for contender in running if contender.name == "jaxdp_low_memory"]
    assert found == ([] if chosen == "skipped" else [chosen])
    assert list(skipped) == (["jaxdp_low_memory"] if chosen == "skipped" else [])
    _, skipped = dp_sgd.with_low_memory([NON_PRIVATE], {}, PROBLEM, SETTINGS)
    assert "nothing to compare" in skipped["jaxdp_low_memory"]


def test_all_divisors_are_tried():
    assert tuning.candidates(12) == [None, 1, 2, 3, 4, 6]


@pytest.mark.parametrize("contender", [NON_PRIVATE, JAXDP], ids=lambda contender: contender.name)
def test_memory_needs_no_arrays_and_steps_reuse_its_program(contender, caplog):
    trainer = contender.make(PROBLEM, dataclasses.replace(SETTINGS, noise_multiplier=0.0))
    assert trainer.xla_memory()["temp_bytes"] > 0
    trainer.params()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        trainer.step()
    assert "XLA compilation" not in caplog.text


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
