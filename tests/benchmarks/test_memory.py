"""The benchmark of compiled memory: every contender is compiled, nothing is run, and what does not compile is recorded."""

import dataclasses
import json

import jax
import pytest

from benchmarks import memory
from benchmarks.language_models import Gpt2
from benchmarks.peers import METHODS, Contender

pytestmark = pytest.mark.unoptimized
TINY = Gpt2(num_blocks=1, width=8, num_heads=2, length=6, vocabulary=11, positions=6)
CONFIG = memory.Config(gpt2=TINY, batch=4, microbatch_size=2, methods="two_pass", peers="optax", forms="scan_remat")


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("memory") / "record.json"
    quiet = dataclasses.replace(memory._SETTINGS, noise_multiplier=0.0)  # noise takes long to compile
    with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"):
        patch.setattr(memory, "_SETTINGS", quiet)
        memory.measure(dataclasses.replace(CONFIG, json=path), ["--json", "record.json"])
    return json.loads(path.read_text())


def test_every_form_and_contender_has_its_row(record):
    names = ["non_private", "non_private", "jaxdp_two_pass", "jaxdp_two_pass"]
    assert [(row["form"], row["contender"]) for row in record["rows"]] == [
        ("scan_remat", name) for name in [*names, "optax"]
    ]
    assert [row["microbatch_size"] for row in record["rows"]] == [None, 2, None, 2, None]
    assert not [row for row in record["rows"] if "error" in row]


def test_ratios_are_to_the_whole_batch_without_privacy(record):
    rows = record["rows"]
    assert rows[0]["temp_over_non_private"] == 1.0
    for row in rows:
        assert row["temp_bytes"] == row["memory"]["temp_bytes"] > 0
        assert row["temp_over_non_private"] == row["temp_bytes"] / rows[0]["temp_bytes"]


def test_a_record_says_how_it_was_made(record):
    assert record["command"] == "python -m benchmarks.memory --json record.json"
    assert record["config"]["num_params"] == 1_024
    assert record.keys() >= {"machine", "device", "versions", "meter"}
    assert "optax" in str(memory.tabulate(record).columns[1]._cells)


def test_what_does_not_compile_is_recorded(monkeypatch):
    def fails(self, problem, settings):
        raise NotImplementedError("broken on purpose")

    monkeypatch.setattr(Contender, "make", fails)
    record = memory.measure(dataclasses.replace(CONFIG, forms="unrolled,scan_remat"), [])
    assert [row["form"] for row in record["rows"]] == ["unrolled"] * 5 + ["scan_remat"] * 5
    assert {row["error"] for row in record["rows"]} == {"NotImplementedError: broken on purpose"}
    memory.tabulate(record)


def test_by_default_every_method_is_compiled():
    rows, _ = memory.contenders(dataclasses.replace(CONFIG, methods=memory.Config.methods, microbatch_size=0))
    assert {row.name for row in rows} >= {"jaxdp", *(f"jaxdp_{method}" for method in METHODS[1:])}


@pytest.mark.parametrize("wrong", [{"microbatch_size": 3}, {"forms": "rolled"}, {"methods": "ghost"}])
def test_a_wrong_choice_is_an_error(wrong):
    with pytest.raises(ValueError, match=r"must divide|there is no"):
        dataclasses.replace(CONFIG, **wrong)
