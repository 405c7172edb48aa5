"""`jaxdp account`: flags to the numbers of `jaxdp.plan`, as a table, JSON or a plot."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tyro

import jaxdp
from jaxdp import accounting
from jaxdp.cli import account
from jaxdp.cli.account import Account, run

# The reference run: q = 0.01, sigma = 1, 1000 steps, delta 1e-5. Padded so far that truncation costs nothing.
REFERENCE = "--num-examples 60000 --sampling-prob 0.01 --num-steps 1000 --delta 1e-5 --padded-batch-size 1000"
SMALL = "--num-examples 1000 --sampling-prob 0.05 --num-steps 50 --delta 1e-5"
# Not truncated, for questions of form: PLD takes several times as long to charge for truncation.
WHOLE = f"{SMALL} --padded-batch-size 1000"


def parse(flags: str) -> Account:
    return tyro.cli(Account, args=flags.split())


def as_json(capsys: pytest.CaptureFixture[str], flags: str) -> dict[str, Any]:
    run(parse(f"{flags} --json"))
    # Strict: `json.loads` would take a bare NaN or Infinity, and anything but one JSON value on stdout fails.
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def table(capsys: pytest.CaptureFixture[str], flags: str) -> list[list[str]]:
    run(parse(flags))
    lines = capsys.readouterr().out.splitlines()
    return [line.split() for line in lines if re.match(r" +[\d.]+ ", line)]


def test_json_reproduces_the_reference_numbers_and_repeats_every_input(capsys: pytest.CaptureFixture[str]):
    out = as_json(capsys, f"{REFERENCE} --noise-multiplier 1 2")
    assert [row["epsilon"]["pld"] for row in out["rows"]] == pytest.approx([1.8282, 0.6238], abs=1e-3)
    assert [row["epsilon"]["rdp"] for row in out["rows"]] == pytest.approx([2.1014, 0.6862], abs=1e-3)
    assert [row["noise_multiplier"] for row in out["rows"]] == [{"pld": 1.0, "rdp": 1.0}, {"pld": 2.0, "rdp": 2.0}]
    given = {key: out[key] for key in ("num_examples", "sampling_prob", "num_steps", "delta", "noise_multiplier")}
    assert given == {
        "num_examples": 60000,
        "sampling_prob": 0.01,
        "num_steps": 1000,
        "delta": 1e-5,
        "noise_multiplier": [1.0, 2.0],
    }
    assert out["neighboring_relation"] == "ADD_OR_REMOVE_ONE"
    assert out["accountants"] == {"pld": {"padded_batch_size": 1000}, "rdp": {"padded_batch_size": 1000}}
    assert (out["expected_batch_size"], out["epochs"]) == (600.0, 10.0)


def test_the_table_rounds_epsilon_up(capsys: pytest.CaptureFixture[str]):
    flags = f"{WHOLE} --noise-multiplier 0.9 1 1.1 1.7"
    rows = table(capsys, flags)
    exact = as_json(capsys, flags)["rows"]
    assert len(rows) == 4
    for (sigma, *shown), row in zip(rows, exact, strict=True):
        assert float(sigma) == row["noise_multiplier"]["pld"]
        for text, name in zip(shown, ("pld", "rdp"), strict=True):
            assert row["epsilon"][name] * (1 - 1e-9) <= float(text) <= row["epsilon"][name] * 1.002


def test_the_noise_for_a_goal_reaches_it_with_each_accountant(capsys: pytest.CaptureFixture[str]):
    flags = f"{SMALL} --target-epsilon 1 4"
    out = as_json(capsys, flags)
    for row, goal, shown in zip(out["rows"], (1.0, 4.0), table(capsys, flags), strict=True):
        assert row["target_epsilon"] == goal == float(shown[0])
        assert row["noise_multiplier"]["pld"] < row["noise_multiplier"]["rdp"]
        assert [float(text) for text in shown[1:]] == list(row["noise_multiplier"].values())
        assert all(0.99 * goal < epsilon <= goal for epsilon in row["epsilon"].values())
        forward = as_json(capsys, f"{SMALL} --noise-multiplier {row['noise_multiplier']['pld']}")
        assert forward["rows"][0]["epsilon"]["pld"] == row["epsilon"]["pld"]


@pytest.mark.parametrize("question", ["--noise-multiplier 2", "--target-epsilon 2"])
def test_rdp_under_replace_one_is_unsupported_and_not_an_error(capsys: pytest.CaptureFixture[str], question: str):
    flags = f"{WHOLE} {question} --neighboring-relation replace-one"
    assert table(capsys, flags)[0][2] == "unsupported"
    out = as_json(capsys, flags)
    (row,) = out["rows"]
    assert row["epsilon"]["pld"] > 0
    assert row["epsilon"]["rdp"] is None
    assert row["notes"]["rdp"]
    assert out["accountants"]["rdp"]["padded_batch_size"] is None


def test_relations_are_ordered_as_they_must_be(capsys: pytest.CaptureFixture[str]):
    def epsilon(relation: str) -> float:
        flags = f"{SMALL} --noise-multiplier 2 --neighboring-relation {relation}"
        return as_json(capsys, flags)["rows"][0]["epsilon"]["pld"]

    assert epsilon("add-or-remove-one") == pytest.approx(epsilon("replace-special"), rel=1e-6)
    assert epsilon("replace-one") > epsilon("add-or-remove-one")


def test_no_noise_is_an_infinite_epsilon_in_words_that_json_can_hold(capsys: pytest.CaptureFixture[str]):
    flags = f"{SMALL} --noise-multiplier 0 2"
    assert table(capsys, flags)[0] == ["0", "inf", "inf"]
    assert as_json(capsys, flags)["rows"][0]["epsilon"] == {"pld": "Infinity", "rdp": "Infinity"}


def test_a_goal_out_of_reach_of_rdp_alone_is_an_answer(capsys: pytest.CaptureFixture[str]):
    # At 1.3 times the mean, truncation is too likely for RDP, which charges all of it to delta.
    flags = f"{SMALL} --target-epsilon 2 --padded-batch-size 65"
    assert table(capsys, flags)[0][2] == "unreachable"
    (row,) = as_json(capsys, flags)["rows"]
    assert row["noise_multiplier"]["pld"] > 0
    assert row["noise_multiplier"]["rdp"] is None
    forward = as_json(capsys, f"{SMALL} --noise-multiplier 2 --padded-batch-size 65")["rows"][0]
    assert forward["epsilon"]["rdp"] == "Infinity"
    assert "--padded-batch-size" in forward["notes"]["rdp"]


def test_epochs_and_batch_size_are_other_words_for_steps_and_probability(capsys: pytest.CaptureFixture[str]):
    one = as_json(capsys, "--num-examples 1000 --expected-batch-size 10 --epochs 3 --delta 1e-5 --noise-multiplier 2")
    other = as_json(
        capsys, "--num-examples 1000 --sampling-prob 0.01 --num-steps 300 --delta 1e-5 --noise-multiplier 2"
    )
    assert one == other
    more = as_json(capsys, "--num-examples 1000 --sampling-prob 0.01 --epochs 3.001 --delta 1e-5 --noise-multiplier 2")
    assert more["num_steps"] == 301


def test_every_number_comes_from_the_plan(capsys: pytest.CaptureFixture[str]):
    (row,) = as_json(capsys, f"{SMALL} --noise-multiplier 1.5")["rows"]
    for name in account.ACCOUNTANTS:
        plan = jaxdp.plan(
            num_examples=1000,
            sampling_prob=0.05,
            num_steps=50,
            clipping=jaxdp.flat(7.0),
            noise_multiplier=1.5,
            target_delta=1e-5,
            accountant=name,
        )
        assert row["epsilon"][name] == plan.epsilon()


def test_a_warning_of_the_plan_goes_to_stderr(capsys: pytest.CaptureFixture[str]):
    run(parse("--num-examples 100 --sampling-prob 0.1 --num-steps 5 --delta 0.05 --noise-multiplier 2 --json"))
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: delta=0.05 exceeds 1/num_examples=0.01: releasing one record in the clear")
    assert captured.err.count("warning:") == 1
    assert len(json.loads(captured.out)["warnings"]) == 1


def test_an_answer_that_protects_nobody_is_judged_in_words(capsys: pytest.CaptureFixture[str]):
    """The largest finite one; and a delta above 1e-3, however few the records are."""
    flags = "--num-examples 100 --sampling-prob 0.5 --num-steps 5 --delta 0.005 --padded-batch-size 101"
    question = "--noise-multiplier 0 0.25 0.5 4"
    out = as_json(capsys, f"{flags} {question}")
    answers = [value for row in out["rows"] for value in row["epsilon"].values() if value != "Infinity"]
    assert max(answers) > 20
    assert out["warnings"] == list(accounting.judge(max(answers), 0.005, 100))
    run(parse(f"{flags} {question}"))
    assert [line.split("=")[0] for line in capsys.readouterr().err.splitlines()] == [
        "warning: epsilon",
        "warning: delta",
    ]


@pytest.mark.parametrize(
    ("question", "suffix", "magic"),
    [
        ("--noise-multiplier 1 4", ".png", b"\x89PNG"),
        ("--noise-multiplier 1", ".pdf", b"%PDF"),
        ("--noise-multiplier 1", ".SVG", b"<?xml"),
        ("--target-epsilon 2", ".png", b"\x89PNG"),
    ],
)
def test_plot_writes_the_format_of_its_extension(tmp_path: Path, suffix: str, magic: bytes, question: str):
    path = tmp_path / f"curve{suffix}"
    run(parse(f"{WHOLE} {question} --plot {path}"))
    assert path.read_bytes().startswith(magic)


def test_plot_leaves_stdout_to_the_json(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    flags = f"{WHOLE} --noise-multiplier 2 --neighboring-relation replace-one --plot {tmp_path / 'a.png'}"
    assert as_json(capsys, flags)["rows"]


@pytest.mark.parametrize("file", ["curve.gif", "curve", "missing/curve.png", "file/curve.png", "folder.png"])
def test_a_plot_that_cannot_be_written_fails_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(jaxdp.PrivacyPlan, "epsilon", lambda self: pytest.fail("computed"))
    with pytest.raises((ValueError, OSError), match=rf"--plot .*{Path(file).name}"):
        run(parse(f"{SMALL} --noise-multiplier 2 --plot {tmp_path / file}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_goal_out_of_reach_is_an_error_and_leaves_no_empty_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def out_of_reach(*args: Any, **kwargs: Any) -> float:
        raise ValueError("no noise multiplier reaches it")

    monkeypatch.setattr(accounting, "calibrate_noise_multiplier", out_of_reach)
    with pytest.raises(ValueError, match="no noise multiplier"):
        run(parse(f"{SMALL} --target-epsilon 1 --plot {tmp_path / 'a.png'}"))
    assert not list(tmp_path.iterdir())


def test_laplace_noise_has_a_pure_epsilon(capsys: pytest.CaptureFixture[str]):
    """T log(1 + q (e^(1/b) - 1)) without truncation; RDP has no answer."""
    flags = "--num-examples 1000 --sampling-prob 0.05 --num-steps 50 --padded-batch-size 1000 --noise laplace --delta 0"
    (row,) = as_json(capsys, f"{flags} --noise-multiplier 2.5")["rows"]
    assert row["epsilon"]["pld"] == pytest.approx(50 * math.log(1 + 0.05 * (math.exp(1 / 2.5) - 1)), rel=1e-9)
    assert row["epsilon"]["rdp"] is None
    goal = as_json(capsys, f"{flags} --target-epsilon 2")
    assert (goal["noise"], goal["delta"]) == ("laplace", 0.0)
    b = goal["rows"][0]["noise_multiplier"]["pld"]
    assert b == pytest.approx(1 / math.log(1 + (math.exp(2 / 50) - 1) / 0.05), rel=1e-4)
    assert table(capsys, f"{flags} --target-epsilon 2")[0] == ["2", f"{b:.5g}", "unsupported"]
    run(parse(f"{flags} --target-epsilon 2"))
    text = capsys.readouterr().out
    assert "Laplace noise on one number a step, of scale noise multiplier times clip norm" in text
    assert "basic composition" in text


def test_the_padding_of_laplace_noise_is_that_of_its_plan(capsys: pytest.CaptureFixture[str]):
    flags = "--num-examples 1000 --sampling-prob 0.05 --num-steps 50 --noise laplace --delta 0"
    found = as_json(capsys, f"{flags} --noise-multiplier 30 40")["accountants"]["pld"]["padded_batch_size"]
    plan = jaxdp.plan(
        num_examples=1000,
        sampling_prob=0.05,
        num_steps=50,
        clipping=jaxdp.flat(1.0),
        noise="laplace",
        noise_multiplier=30.0,
        target_delta=0,
    )
    assert found == plan.padded_batch_size < 120


WITHOUT_GOAL = "--num-examples 1000 --delta 1e-5"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (SMALL, "--noise-multiplier, to learn its epsilon, or --target-epsilon"),
        (f"{SMALL} --noise-multiplier 1 --target-epsilon 1", "--noise-multiplier, to learn its epsilon"),
        (f"{SMALL} --noise-multiplier -1", "noise_multiplier must be nonnegative and finite, got -1.0"),
        (f"{SMALL} --noise-multiplier 1 nan", "noise_multiplier is NaN"),
        (f"{SMALL} --target-epsilon 1 0", "target_epsilon must be positive and finite, got 0.0"),
        (f"{SMALL} --noise-multiplier 0 --plot a.png", "every --noise-multiplier is 0"),
        (f"{WITHOUT_GOAL} --noise-multiplier 1 --num-steps 5", "--expected-batch-size or --sampling-prob"),
        (f"{SMALL} --noise-multiplier 1 --expected-batch-size 5", "--expected-batch-size or --sampling-prob"),
        (f"{WITHOUT_GOAL} --noise-multiplier 1 --sampling-prob 0.1", "--num-steps or --epochs"),
        (f"{SMALL} --noise-multiplier 1 --epochs 1", "--num-steps or --epochs"),
        (f"{WITHOUT_GOAL} --noise-multiplier 1 --sampling-prob 0.1 --epochs -1", "epochs must be positive"),
        (f"{WITHOUT_GOAL} --noise-multiplier 1 --sampling-prob 0.1 --epochs inf", "epochs must be positive and finite"),
        (
            f"{WITHOUT_GOAL} --noise-multiplier 1 --sampling-prob 0.1 --num-steps 0",
            "num_steps must be at least 1, got 0",
        ),
        (f"{WITHOUT_GOAL} --noise-multiplier 1 --sampling-prob 1.5 --num-steps 5", "sampling_prob must lie in"),
        (f"{SMALL} --noise-multiplier 1 --padded-batch-size 3", "padded_batch_size=3 is below the expected"),
        (f"{SMALL} --noise-multiplier 1 --delta 0", "delta must lie in (0, 1), got 0.0"),
        (f"{SMALL} --noise-multiplier 1 --delta 0", "or noise='laplace'"),
        (f"{SMALL} --noise-multiplier 1 --delta -1 --noise laplace", "delta must lie in (0, 1), got -1.0"),
        (f"{SMALL} --noise-multiplier 1 --num-examples 0", "num_examples must be at least 1, got 0"),
    ],
)
def test_bad_input_is_a_typed_error_with_value_and_remedy(flags: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(parse(flags))


def test_privacy_numbers_have_no_defaults(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        parse("--noise-multiplier 1")
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "--num-examples" in message
    assert "--delta" in message


def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "jaxdp account --num-examples" in capsys.readouterr().out
    examples = [line.split()[2:] for line in (Account.__doc__ or "").splitlines() if "jaxdp account" in line]
    assert len(examples) == 4
    for example in examples:
        assert isinstance(tyro.cli(Account, args=example), Account)
