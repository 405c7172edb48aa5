"""`jaxdp audit`: flags to audits, a table, a verdict and an exit status."""

from __future__ import annotations

import dataclasses
import re

import pytest
import tyro

from jaxdp import cli
from jaxdp.auditing import Case, Check
from jaxdp.cli import audit
from jaxdp.cli.audit import Audit, run

pytestmark = pytest.mark.unoptimized
# Full batches of mu = 1: epsilon 4.4.
SMALL = "--method dp-sgd --canaries 1000 --num-steps 4 --sampling-prob 1 --noise-multiplier 2 --seed 5"


LAWS = ("clip of ordinary canaries", "clip of cancelling canaries", "size of the noise", "correlation of the noise")


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct checks, which have tests of their own, of little: one way, one batch, and the noise of zeroth-order steps."""
    ordinary, cancelling, zeroth_order = audit.ordinary_check, audit.cancelling_check, audit.zeroth_order_noise_check
    few = {"ways": ("vmap",)}
    monkeypatch.setattr(audit, "ordinary_check", lambda **options: ordinary(**options, **few))
    monkeypatch.setattr(audit, "cancelling_check", lambda **options: cancelling(**options, **few, batches=((4, None),)))

    def noise_check(noise_multiplier, *, make_step, rng):
        del make_step
        return zeroth_order(noise_multiplier, rng=rng)

    monkeypatch.setattr(audit, "noise_check", noise_check)
    dp_sgd_run = audit.dp_sgd_run
    monkeypatch.setattr(
        audit, "dp_sgd_run", lambda plan, **options: dp_sgd_run(plan, **options, ways=("book_keeping",))
    )


def parse(flags: str) -> Audit:
    return tyro.cli(Audit, args=flags.split())


def row(out: str, label: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{label}  ")]
    return line.split(label)[1].split()


def test_an_intact_package_passes(capsys: pytest.CaptureFixture[str]):
    run(parse(SMALL))
    out = capsys.readouterr().out
    assert row(out, "verdict") == ["pass"]
    assert out.rstrip().splitlines()[-1].startswith("pass: no run leaked more than its claim allows")
    claimed, bound, pair = (
        float(row(out, label)[0]) for label in ("claimed epsilon", "lower bound", "lower bound by the pair")
    )
    assert 0 < pair < bound < claimed == pytest.approx(4.38, abs=0.01)
    assert row(out, "canaries") == ["1000"]
    assert "no bound" in out
    assert row(out, "right by differences")[1:] == ["of", "300"]
    assert row(out, "direct checks") == ["pass"]
    for law in LAWS:
        assert f"  dp-sgd, {law}: pass of " in out
        # What would have been seen.
        assert out.count(f"  dp-sgd, {law}: ") == 2
    assert re.search(r"dp-sgd, scores: with probability 0.9 by simulation, a noise multiplier below 0\.[4-7]", out)
    assert "routes: dense, embedding, copy, joint, scanned, conv" in out
    assert "policies: flat, per-layer, automatic, quantile" in out


@pytest.mark.parametrize("fault", ["no-noise", "quarter-noise", "no-clip", "noise-reused"])
def test_a_fault_fails_with_exit_status_1(capsys: pytest.CaptureFixture[str], fault: str):
    with pytest.raises(SystemExit) as exit_of:
        cli.main(["audit", *SMALL.split(), "--fault", fault])
    assert exit_of.value.code == 1
    out = capsys.readouterr().out
    assert row(out, "verdict") == ["fail"]
    assert float(row(out, "lower bound")[0]) > float(row(out, "claimed epsilon")[0])
    assert f"fault put in on purpose: {fault}" in out
    assert "fail: dp-sgd leaked more than the claimed epsilon allows." in out


@pytest.mark.parametrize(
    ("fault", "law"), [("no-clip-in-one-layer", "ordinary canaries"), ("two-tensors", "cancelling canaries")]
)
def test_a_fault_that_the_attack_does_not_see_fails_a_direct_check(
    capsys: pytest.CaptureFixture[str], fault: str, law: str
):
    with pytest.raises(SystemExit) as exit_of:
        cli.main(["audit", *SMALL.split(), "--fault", fault])
    assert exit_of.value.code == 1
    out = capsys.readouterr().out
    assert row(out, "direct checks") == row(out, "verdict") == ["fail"]
    assert f"fail: dp-sgd broke its claim in a direct check: clip of {law}" in out
    assert re.search(rf"dp-sgd, clip of {law}: fail in \d+ of \d+; at worst \S+ clip norms, allowed 1\.0", out)


def test_each_check_that_fails_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    check = Check("some law", "units", (Case("fine", 0.5, 1.0), Case("the bad one", 7.0, 1.0)), {}, "a fault")
    checks = [check, dataclasses.replace(check, law="another law")]
    monkeypatch.setattr(audit, "noise_check", lambda *args, **options: checks)
    with pytest.raises(SystemExit):
        run(parse(SMALL))
    out = capsys.readouterr().out
    assert row(out, "scores") == ["pass"]
    assert "some law: fail in 1 of 2; at worst 7 units, allowed 1 (the bad one)" in out
    assert "fail: dp-sgd broke its claim in a direct check: some law; another law." in out


def test_a_seed_repeats_an_audit_and_fresh_entropy_does_not(capsys: pytest.CaptureFixture[str]):
    def table(flags: str) -> str:
        run(parse(flags))
        return capsys.readouterr().out

    assert table(SMALL) == table(SMALL)
    fresh = SMALL.replace(" --seed 5", "")
    assert len({table(fresh) for _ in range(4)}) > 1


def test_each_method_has_a_column_with_its_own_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    few_steps = {name: audit._Defaults(1000, steps, 1.0) for name, steps in (("dp-sgd", 3), ("dp-aggzo", 5))}
    monkeypatch.setattr(audit, "_DEFAULTS", few_steps)
    run(parse("--noise-multiplier 3 --method dp-aggzo dp-sgd --seed 1"))
    out = capsys.readouterr().out
    assert row(out, "steps") == ["5", "3"]
    assert row(out, "verdict") == ["pass"] * 2


def test_the_defaults_are_audits_that_can_be_made(monkeypatch: pytest.MonkeyPatch):
    """Their plans claim at most epsilon 4 at delta 1e-5, with at least 1000 canaries."""
    plans = audit._plans(parse(""))
    assert list(plans) == ["dp-sgd", "dpzero", "dp-aggzo"]
    for plan in plans.values():
        assert 3.99 < plan.epsilon() <= 4
        assert plan.target_delta == 1e-5
        assert plan.num_examples >= 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--noise-multiplier 1 --target-epsilon 1", "at most one of --target-epsilon and --noise-multiplier"),
        ("--canaries 999", "num_examples=999 is too few canaries to refute anything; use at least 1000"),
        ("--noise-multiplier 0", "claims an infinite epsilon"),
        ("--target-epsilon -1", "target_epsilon must be positive"),
        ("--delta 0", "delta must lie in (0, 1)"),
        ("--num-steps 0", "num_steps must be at least 1, got 0"),
        ("--sampling-prob 1.5", "sampling_prob must lie in (0, 1]"),
        ("--seed -1", "seed must be at least 0, got -1"),
        ("--seed 4294967296", "seed must be below 2^32, got 4294967296"),
        ("--method dp-aggzo --fault no-sampling --noise-multiplier 3", "sampling_prob is 1 already"),
        ("--method dp-sgd dp-aggzo --fault two-tensors", "fault 'two-tensors' is one of DP-SGD, and dp-aggzo has no"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: str, message: str
):
    monkeypatch.setattr(audit, "audit", lambda *args, **kwargs: pytest.fail("ran"))
    with pytest.raises(SystemExit) as exit_of:
        cli.main(["audit", "--method", "dp-sgd", *flags.split()])
    assert exit_of.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert not captured.out


def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "jaxdp audit --method" in capsys.readouterr().out
    examples = [line.split()[2:] for line in re.findall(r"^ +(jaxdp audit.*)$", Audit.__doc__ or "", re.MULTILINE)]
    assert len(examples) == 4
    for example in examples:
        assert isinstance(tyro.cli(Audit, args=example), Audit)
