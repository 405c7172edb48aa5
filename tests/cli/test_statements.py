"""What a run says of its guarantee, on the screen and in its files, and which of these may be published."""

import contextlib
import io
import json
import os

import pytest

from jaxdp.cli import main
from jaxdp.zeroth_order import read_trajectory

pytestmark = pytest.mark.unoptimized  # none is about bits
UNITS = ["--unit-field", "user", "--max-sequences", "2", "--expected-batch-size", "8"]
METHOD = [
    "--method",
    "dpzero",
    "--num-steps",
    "2",
    "--learning-rate",
    "1e-3",
    "--l2-clip-norm",
    "5",
    "--max-length",
    "32",
]
# An epsilon above 20 at a delta above 1/20.
WEAK = ["--noise-multiplier", "0.2", "--target-delta", "0.06", "--accountant", "rdp"]


@pytest.fixture(scope="module")
def run(llama, texts, tmp_path_factory):
    """A weak run whose units are users: its folder, and what it said. No umask hides a mode."""
    out, before, said = tmp_path_factory.mktemp("runs") / "run", os.umask(0), io.StringIO()
    data = ["--model", llama, "--data", texts / "reviews.jsonl", "--text-field", "text"]
    try:
        with contextlib.redirect_stdout(said):  # and no warning, which would not know the unit
            main([str(part) for part in ["finetune", *data, *UNITS, *METHOD, *WEAK, "--out", out]])
    finally:
        os.umask(before)
    return out, said.getvalue()


@pytest.fixture(scope="module")
def report(run) -> dict:
    return json.loads((run[0] / "report.json").read_text())


def test_with_a_unit_field_every_statement_speaks_of_units(run, report, llama, tmp_path, capsys):
    run, of_run = run
    card = (run / "model" / "README.md").read_text()
    main(["export-trajectory", str(run), "--out", str(tmp_path / "exported")])
    main(["replay", str(tmp_path / "exported"), "--base", str(llama), "--out", str(tmp_path / "again")])
    about = read_trajectory(tmp_path / "exported").header.about
    said = capsys.readouterr().out
    read, *of_run = of_run.splitlines()
    assert read.startswith("reviews.jsonl: 80 records of 20 privacy units: ")
    statements = {
        "report": "\n".join([report["statement"], report["clipping"], *report["weak_points"]]),
        "card": card.split("## Evaluation")[0].replace(report["privacy_unit"], ""),
        "trajectory": about["statement"],
        "screen": "\n".join(of_run),
        "screen of what publishes it": said,
    }
    for where, text in statements.items():
        for word in ("record", "example"):
            assert word not in text.replace("num_examples", "").replace(str(tmp_path), ""), where
        assert "privacy unit" in text, where
    assert report["privacy_unit"].startswith("All records with the same value of the field 'user'")
    assert report["num_privacy_units"] == report["num_examples"] == 20
    assert "one privacy unit added or removed" in report["statement"]
    assert "in a training set of 20 privacy units" in report["statement"]
    assert "(ADD_OR_REMOVE_ONE privacy unit, RDP accountant), for the trajectory" in said
    assert "of 20 privacy units, padded to 21" in statements["screen"]


def test_a_weak_guarantee_is_judged_on_the_screen_in_the_card_and_in_the_report(run, report, capsys, tmp_path):
    run, of_run = run
    of_epsilon, of_delta = report["weak_points"]
    assert of_epsilon.startswith("epsilon=")
    assert "exceeds 20 and bounds next to nothing" in of_epsilon
    assert of_delta.startswith("delta=0.06 exceeds 1/num_examples=0.05: releasing one privacy unit in the clear")
    card = (run / "model" / "README.md").read_text()
    main(["export-trajectory", str(run), "--out", str(tmp_path / "exported")])
    said = capsys.readouterr().out
    for sentence in report["weak_points"]:
        assert sentence in card
        assert sentence in report["statement"]
        assert f"weak guarantee: {sentence}\n" in said
        assert f"weak guarantee: {sentence}\n" in of_run.split("plan check")[1]
        assert f"\n  weak        {sentence}\n" in of_run.split("writing to")[0]  # and before anything is trained


def test_losses_are_their_owners_to_read_and_only_what_may_be_published_is_where_it_is_published_from(run, report):
    run, _ = run
    assert {path.name for path in run.iterdir()} == {
        "config.json", "curve.png", "model", "report.json", "secret", "trajectory.jaxdpzo",
    }  # fmt: skip
    for name in ("report.json", "curve.png", "secret/run.json", "secret/progress.f64"):
        assert (run / name).stat().st_mode & 0o077 == 0, name
    assert (run / "secret").stat().st_mode & 0o077 == 0
    released = {path.name for path in (run / "model").iterdir()}
    assert released == {"config.json", "model.safetensors", "README.md", "vocab.json", "merges.txt"}
    # No loss of the training set in what may be published, in any of its forms.
    loss = report["not_private"]["final_training_loss"]
    for path in (run / "model" / "README.md", run / "model" / "config.json", run / "config.json"):
        assert str(loss)[:8] not in path.read_text()
        assert "not_private" not in path.read_text()
