"""`jaxdp train` as a person runs it: in a process of its own, killed and resumed, with its files read back.

The default run, the killed and the interrupted have processes of their own; runs that differ in options alone share this one.
"""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.processes import user_environment

SMALL = ["--num-steps", "60", "--expected-batch-size", "64", "--checkpoint-every", "10"]
# Without a goal to calibrate for, and with the faster accountant.
FAST = [*SMALL, "--noise-multiplier", "3", "--accountant", "rdp"]
COMMAND = [sys.executable, "-W", "error::UserWarning", "-m", "jaxdp", "train"]


def run(cwd, *args):
    result = subprocess.run(
        [*COMMAND, *args], cwd=cwd, env=user_environment(), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


REPORT_KEYS = {
    "epsilon", "delta", "neighboring_relation", "accountant", "noise_multiplier", "clipping", "sampling_prob", "num_steps",
    "num_examples", "expected_batch_size", "test_accuracy", "wall_seconds", "peak_host_bytes", "versions", "command",
}  # fmt: skip


@pytest.mark.slow
def test_with_no_arguments_it_trains_digits_at_epsilon_3(tmp_path, jaxdp_here):
    """The first command of the README."""
    start = time.perf_counter()
    result = run(tmp_path)
    print(f"took {time.perf_counter() - start:.0f} s")
    folder = tmp_path / "runs" / "digits"
    report = json.loads((folder / "report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    assert 2.99 < report["epsilon"] <= 3.0
    assert report["delta"] == 1e-5
    assert report["test_accuracy"] >= 0.92
    assert report["num_steps"] == 200
    assert "test_accuracy 0.9" in result.stdout
    assert "epsilon 3 at delta 1e-05 (ADD_OR_REMOVE_ONE, PLD accountant)" in result.stdout
    assert "\r" not in result.stderr  # no progress bar without a terminal
    assert (folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with np.load(folder / "model.npz") as model:
        assert sum(model[name].size for name in model.files) == report["num_parameters"]
    # Nothing that is released holds the key.
    key_words = b"noise_key"
    assert not any(key_words in path.read_bytes() for path in folder.iterdir() if path.is_file())
    assert oct((folder / "checkpoints").stat().st_mode)[-3:] == "700"
    for name in ("report.json", "curve.png"):  # they have losses of the training set
        assert oct((folder / name).stat().st_mode)[-3:] == "600"
    # A second run goes to a new folder, and the first is untouched.
    before = (folder / "report.json").read_bytes()
    jaxdp_here("train", *FAST, "--num-steps", "2", cwd=tmp_path)
    assert (tmp_path / "runs" / "digits-2" / "report.json").exists()
    assert (folder / "report.json").read_bytes() == before


@pytest.mark.unoptimized  # all four alike
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_parameters_bit_for_bit(tmp_path, jaxdp_here):
    """SIGKILL at any moment. The uninterrupted twin starts from a copy of the first checkpoint, so it has the same keys."""
    run_dir = tmp_path / "killed"
    args = [*FAST, "--num-steps", "600", "--checkpoint-every", "50", "--out"]
    process = subprocess.Popen(
        [*COMMAND, *args, str(run_dir)],
        cwd=tmp_path,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.time() + 300
    while not (run_dir / "checkpoints" / "0" / "commit_success.txt").exists() and time.time() < deadline:
        time.sleep(0.01)
    twin = tmp_path / "twin"
    process.send_signal(signal.SIGSTOP)  # files must not move while they are copied
    subprocess.run(["cp", "-r", str(run_dir), str(twin)], check=True)
    process.send_signal(signal.SIGCONT)
    for folder in (twin / "checkpoints").iterdir():  # the twin starts from step 0 again
        if folder.name != "0":
            subprocess.run(["rm", "-r", str(folder)], check=True)

    def kill():  # at a moment of no particular kind
        time.sleep(np.random.default_rng().uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        output = b"".join(process.communicate())
        assert process.returncode == -signal.SIGKILL, output.decode()

    def newest():
        return max((int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit()), default=0)

    kill()
    before = newest()
    process = subprocess.Popen(  # the resumed run is killed too
        [*COMMAND, *args, str(run_dir), "--resume"],
        cwd=tmp_path,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.time() + 300
    while process.poll() is None and time.time() < deadline and newest() == before:
        time.sleep(0.01)
    kill()
    assert "resumed after step" in jaxdp_here("train", *args, run_dir, "--resume", cwd=tmp_path).stdout
    jaxdp_here("train", *args, twin, "--resume", cwd=tmp_path)
    with np.load(run_dir / "model.npz") as ours, np.load(twin / "model.npz") as theirs:
        assert ours.files == theirs.files
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], theirs[name])
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run_dir, twin)]
    for name in ("epsilon", "num_steps", "noise_multiplier", "final_training_loss_not_private"):
        assert reports[0][name] == reports[1][name]
    # And a complete run is not resumed.
    again = jaxdp_here("train", *args, run_dir, "--resume", cwd=tmp_path, check=False)
    assert again.returncode == 2
    assert "is complete" in again.stderr


@pytest.mark.unoptimized
@pytest.mark.slow
def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path, jaxdp_here):
    args = [*FAST, "--num-steps", "20000", "--checkpoint-every", "50"]
    process = subprocess.Popen(
        [*COMMAND, *args],
        cwd=tmp_path,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 300
    while not (tmp_path / "runs/digits/checkpoints/50/commit_success.txt").exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "--resume --out runs/digits" in err
    steps = [int(p.name) for p in (tmp_path / "runs/digits/checkpoints").iterdir() if p.name.isdigit()]
    assert max(steps) >= 50
    assert f"saved step {max(steps)} of 20000" in err
    other = jaxdp_here("train", *args, "--learning-rate", "0.1", "--resume", cwd=tmp_path, check=False)
    assert other.returncode == 2
    assert "learning_rate: 2.0 there, 0.1 here" in other.stderr


@pytest.mark.unoptimized
@pytest.mark.slow
def test_the_baseline_has_no_epsilon_and_every_policy_trains(tmp_path, jaxdp_here):
    jaxdp_here("train", *SMALL, "--no-privacy", "--out", "baseline", cwd=tmp_path)
    report = json.loads((tmp_path / "baseline" / "report.json").read_text())
    assert report["private"] is False
    assert report["epsilon"] is None
    assert report["test_accuracy"] > 0.9
    for policy, more in (
        ("per-layer", ["--noise-allocation", "least_energy", "--noise-multiplier", "3"]),
        ("automatic", ["--optimizer", "adam", "--learning-rate", "0.02", "--noise-multiplier", "3"]),
        ("quantile", ["--accountant", "rdp"]),
        ("flat", ["--neighboring-relation", "replace-one", "--noise-multiplier", "4", "--microbatch-size", "20"]),
    ):
        jaxdp_here("train", *SMALL, "--clipping", policy, "--out", policy, *more, cwd=tmp_path)
        report = json.loads((tmp_path / policy / "report.json").read_text())
        assert report["test_accuracy"] > 0.5
        assert report["epsilon"] <= 3.0 or policy == "flat"


def test_help_shows_examples(tmp_path, jaxdp_here):
    result = jaxdp_here("--help", cwd=tmp_path)
    assert "jaxdp train --dataset mnist" in result.stdout
    assert "account" in result.stdout
