"""`jaxdp finetune` as a person runs it: in a process of its own, killed and resumed, with its folders read back.

The first run and the killed have processes of their own; runs that differ in options alone, and resumed ones, share this one.
"""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxdp import _validate
from jaxdp.cli import finetune, main, meters
from jaxdp.models.peft import load_adapter
from jaxdp.models.weights import load_model

SMALL = [
    "--num-steps", "6", "--expected-batch-size", "16", "--microbatch-size", "12", "--max-length", "32", "--checkpoint-every", "2",
]  # fmt: skip
# Without a goal to calibrate for, and with the faster accountant.
FAST = [*SMALL, "--noise-multiplier", "1", "--accountant", "rdp", "--learning-rate", "0.01"]
REPORT_KEYS = {
    "private", "method", "epsilon", "delta", "neighboring_relation", "accountant", "sampler", "noise_multiplier", "clipping",
    "sampling_prob", "padded_batch_size", "num_steps", "num_examples", "expected_batch_size", "privacy_unit", "statement",
    "base_model", "tuning", "num_parameters", "num_trainable_parameters", "evaluation", "updates", "settings", "step_bytes",
    "available_bytes", "peak_host_bytes", "peak_host_bytes_meter", "wall_seconds", "device", "versions", "command", "not_private",
}  # fmt: skip


def leaves(folder) -> dict[str, np.ndarray]:
    return dict(_validate.named_leaves(load_model(folder).params))


def report_of(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.unoptimized
@pytest.mark.slow
def test_a_run_writes_a_model_a_card_and_a_report(gpt2, texts, tmp_path, jaxdp_command, jaxdp_here):
    out = tmp_path / "out"
    args = ["--data", texts / "private.txt", "--record", "line", "--eval", texts / "public.txt", "--accountant", "rdp"]
    result = jaxdp_command(
        "finetune", "--model", gpt2, *args, *SMALL, "--learning-rate", "0.01", "--out", out, cwd=tmp_path
    )
    report = report_of(out)
    assert report.keys() >= REPORT_KEYS
    assert 2.9 < report["epsilon"] <= 3.0
    assert report["delta"] == pytest.approx(120**-1.1)
    assert report["num_examples"] == 120
    assert report["privacy_unit"] == "One line of the text file."
    assert report["base_model"] == "tiny-gpt2"
    assert report["num_trainable_parameters"] == report["num_parameters"]
    assert report["updates"] == {
        "compared_after_step": 1, "unmoved_trainable": [], "moved_frozen": [], "non_finite": [], "warnings": [],
    }  # fmt: skip
    assert report["evaluation"]["after"]["perplexity"] < report["evaluation"]["before"]["perplexity"]
    assert report["evaluation"]["num_records"] == 30
    assert "warning" not in result.stderr
    assert "plan check" in result.stdout
    assert "epsilon     3 at delta" in result.stdout
    # The card states the guarantee, travels with the model, and quotes nothing that is not private.
    card = (out / "model" / "README.md").read_text()
    assert report["statement"] in card
    assert not (out / "README.md").exists()  # the folder that has checkpoints does not pass for one to publish
    for name in ("report.json", "curve.png", "checkpoints"):
        assert (out / name).stat().st_mode & 0o077 == 0, name
    assert "loss" not in card.split("## Privacy")[1].split("metrics, losses")[0]
    assert (out / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # Every parameter moved; the noise key is in the checkpoints alone.
    before, after = leaves(gpt2), leaves(out / "model")
    assert before.keys() == after.keys()
    assert all(np.any(before[name] != after[name]) for name in before)
    assert not any(
        b"noise_key" in path.read_bytes()
        for path in out.glob("**/*")
        if path.is_file() and "checkpoints" not in str(path)
    )
    # The folder is a model like any other.
    again = ["--model", out / "model", "--prompt", "the cat", "--max-new-tokens", "5"]
    assert jaxdp_here("generate", *again, cwd=tmp_path).stdout.startswith("the cat")
    # A finished run is not resumed, and not overwritten.
    for more, message in ((["--resume"], "is complete"), ([], "nothing was overwritten")):
        refused = jaxdp_here("finetune", "--model", gpt2, *args, *SMALL, "--out", out, *more, cwd=tmp_path, check=False)
        assert refused.returncode == 2
        assert message in refused.stderr


@pytest.mark.unoptimized
@pytest.mark.slow
def test_lora_writes_an_adapter_and_on_request_the_merged_model(gpt2, texts, tmp_path, jaxdp_here):
    out = tmp_path / "out"
    args = ["--data", texts / "private.txt", "--record", "line", "--tune", "lora", "--lora-rank", "2", "--merge"]
    jaxdp_here("finetune", "--model", gpt2, *args, *FAST, "--out", out, cwd=tmp_path)
    report = report_of(out)
    assert report["updates"]["warnings"] == []
    assert report["evaluation"] is None
    assert report["num_trainable_parameters"] < report["num_parameters"] / 2
    base = load_model(gpt2)
    model, params = load_adapter(out / "adapter", base.model, base.params)
    merged = load_model(out / "model")
    tokens = np.arange(1, 20)
    logits = model.logits(params, tokens)
    assert np.max(np.abs(np.asarray(logits - base.model.logits(base.params, tokens)))) > 1e-3
    np.testing.assert_allclose(merged.model.logits(merged.params, tokens), logits, atol=1e-4)
    assert "privacy" in (out / "adapter" / "README.md").read_text()
    text = ["--model", gpt2, "--adapter", out / "adapter", "--prompt", "the", "--max-new-tokens", "3"]
    jaxdp_here("generate", *text, cwd=tmp_path)
    # The adapter is where a second run may start.
    args = ["--data", texts / "private.txt", "--record", "line", "--tune", "ffa-lora", "--adapter", out / "adapter"]
    jaxdp_here("finetune", "--model", gpt2, *args, *FAST, "--out", tmp_path / "second", cwd=tmp_path)
    _, second = load_adapter(tmp_path / "second" / "adapter", base.model, base.params)
    first, second = (dict(_validate.named_leaves(tree)) for tree in (params, second))
    for name in first:
        assert np.any(first[name] != second[name]) == name.endswith("lora_b"), name


@pytest.mark.unoptimized
@pytest.mark.slow
@pytest.mark.parametrize(("tune", "moves"), [("bitfit", "/bias"), ("last-k", "blocks/")])
def test_what_is_frozen_is_released_bit_for_bit(tune, moves, gpt2, texts, tmp_path, jaxdp_here):
    args = ["--data", texts / "private.txt", "--record", "line", "--tune", tune, "--dtype", "bfloat16"]
    jaxdp_here("finetune", "--model", gpt2, *args, *FAST, "--out", tmp_path / "out", cwd=tmp_path)
    assert report_of(tmp_path / "out")["updates"]["warnings"] == []
    before, after = leaves(gpt2), leaves(tmp_path / "out" / "model")
    for name in before:
        assert np.any(before[name] != after[name]) == (moves in name), name
        if tune == "last-k" and moves in name:
            np.testing.assert_array_equal(before[name][:-1], after[name][:-1])


@pytest.mark.unoptimized  # all three alike
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_model_bit_for_bit(gpt2, texts, tmp_path, user_environment, jaxdp_here):
    """SIGKILL at any moment. The uninterrupted twin starts from a copy of the first checkpoint, so it has the same keys."""
    run_dir, twin = tmp_path / "killed", tmp_path / "twin"
    args = ["finetune", "--model", gpt2, "--data", texts / "private.txt", "--record", "line", *FAST]
    args += ["--num-steps", "80", "--checkpoint-every", "20", "--clipping", "quantile"]
    args += ["--tune", "lora", "--lora-targets", "o"]
    args += ["--schedule", "cosine", "--warmup-steps", "20", "--out"]

    def checkpoints(folder):
        return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]

    def wait_for(condition, process):
        deadline = time.time() + 300
        while process.poll() is None and time.time() < deadline and not condition():
            time.sleep(0.01)

    process = subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-m", "jaxdp", *map(str, args), str(run_dir)],
        cwd=tmp_path,
        env=user_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for((run_dir / "checkpoints" / "0" / "commit_success.txt").exists, process)
    process.send_signal(signal.SIGSTOP)  # files must not move while they are copied
    subprocess.run(["cp", "-r", str(run_dir), str(twin)], check=True)
    process.send_signal(signal.SIGCONT)
    for step in checkpoints(twin):
        if step:
            shutil.rmtree(twin / "checkpoints" / str(step))
    newest = max(checkpoints(run_dir), default=0)
    wait_for(lambda: max(checkpoints(run_dir), default=0) > newest, process)
    time.sleep(np.random.default_rng().uniform(0.0, 0.2))
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()
    assert "resumed after step" in jaxdp_here(*args, run_dir, "--resume", cwd=tmp_path).stdout
    jaxdp_here(*args, twin, "--resume", cwd=tmp_path)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (run_dir / name).read_bytes() == (twin / name).read_bytes()
    assert report_of(run_dir)["updates"] == report_of(run_dir)["updates"] | {"warnings": [], "unmoved_trainable": []}


@pytest.mark.unoptimized
@pytest.mark.slow
def test_classes_and_users_and_completions(gpt2, texts, tmp_path, jaxdp_here):
    reviews = ["--model", gpt2, "--data", texts / "reviews.jsonl", "--eval", texts / "reviews.jsonl"]
    users = ["--unit-field", "user", "--max-sequences", "2", "--expected-batch-size", "8"]
    classes = ["--label-field", "label", "--verbalizers", "0=bad,1=good"]
    result = jaxdp_here("finetune", *reviews, *classes, *FAST, *users, "--out", tmp_path / "classes", cwd=tmp_path)
    report = report_of(tmp_path / "classes")
    assert report["num_examples"] == 20  # users, not records
    assert "in a training set of 20 privacy units" in report["statement"]
    assert "expected batch size 8 of 20 privacy units, padded to" in result.stdout
    assert report["privacy_unit"].startswith("All records with the same value of the field 'user', of which at most 2")
    assert 0 <= report["evaluation"]["after"]["accuracy"] <= 1
    assert report["evaluation"]["before"]["num_examples"] == 80
    assert "80 of the 80 evaluation records are among the private ones" in result.stderr
    prompts = ["--prompt-field", "{prompt}", "--completion-field", "completion", "--no-privacy", "--optimizer", "sgd"]
    jaxdp_here(
        "finetune", *reviews, *prompts, *SMALL, "--learning-rate", "1", "--out", tmp_path / "prompts", cwd=tmp_path
    )
    report = report_of(tmp_path / "prompts")
    assert report["private"] is False
    assert report["epsilon"] is None
    assert report["evaluation"]["after"]["perplexity"] < report["evaluation"]["before"]["perplexity"]
    assert "not differentially private" in (tmp_path / "prompts" / "model" / "README.md").read_text()


@pytest.mark.unoptimized
@pytest.mark.slow
def test_a_silent_leaf_is_loud(gpt2, texts, tmp_path, jaxdp_here):
    """An update too small for the parameters is an update that does not happen."""
    args = ["--data", texts / "private.txt", "--record", "line", "--optimizer", "sgd"]
    args += [*FAST, "--learning-rate", "1e-30"]
    result = jaxdp_here("finetune", "--model", gpt2, *args, "--out", tmp_path / "out", cwd=tmp_path)
    updates = report_of(tmp_path / "out")["updates"]
    assert "embed/tokens/table" in updates["unmoved_trainable"]
    assert updates["compared_after_step"] == 3
    (warning,) = updates["warnings"]
    assert result.stderr.count(f"warning: {warning}") == 1
    assert warning in (tmp_path / "out" / "model" / "README.md").read_text()


# Bad input: exit code 2, one line on stderr, nothing written.
PRIVATE = ["--data", "private.txt", "--record", "line"]
CLASSES = ["--data", "reviews.jsonl", "--label-field", "label"]
FIRST = [*PRIVATE, "--num-steps", "2", "--optimizer", "sgd"]
FITTING = ["--expected-batch-size", "16", "--noise-multiplier", "1"]
COMMAND_LINES = {
    "no_model": (["--model", "nowhere", *PRIVATE], "does not exist"),
    "no_data": (["--data", "nowhere.txt"], "nowhere.txt"),
    "eval_missing": ([*PRIVATE, "--eval", "nowhere.txt"], "nowhere.txt"),
    "two_goals": ([*PRIVATE, "--target-epsilon", "1", "--noise-multiplier", "1"], "exactly one"),
    "privacy_and_none": ([*PRIVATE, "--no-privacy", "--target-epsilon", "1"], "contradicts"),
    "two_lengths": ([*PRIVATE, "--num-steps", "5", "--epochs", "1"], "--num-steps and --epochs"),
    "two_batch_sizes": ([*PRIVATE, "--expected-batch-size", "5", "--sampling-prob", "0.1"], "exactly one"),
    "fewer_units_than_the_batch": ([*PRIVATE, "--expected-batch-size", "500"], "exceeds num_examples=120"),
    "epochs": ([*PRIVATE, "--epochs", "0"], "epochs must be positive"),
    "optimizer_unknown": ([*PRIVATE, "--optimizer", "adamm"], "choose from adabelief, "),
    "optimizer_wants_the_loss": ([*PRIVATE, "--optimizer", "lbfgs"], "does not update from gradients alone"),
    "optimizer_option": ([*PRIVATE, "--optimizer-options", "betta=1"], "takes no 'betta'"),
    "optimizer_option_syntax": ([*PRIVATE, "--optimizer-options", "b1:0.9"], "not name=value"),
    "weight_decay": ([*PRIVATE, "--weight-decay", "0.1"], "optax.adam takes none; use one of adadelta, "),
    "learning_rate": ([*PRIVATE, "--learning-rate", "-1"], "learning_rate must be positive"),
    "warmup": ([*PRIVATE, "--num-steps", "5", "--warmup-steps", "5"], "leaves none of the 5 steps"),
    "lora_option_without_lora": ([*PRIVATE, "--lora-rank", "4"], "--tune lora"),
    "adapter_without_lora": ([*PRIVATE, "--adapter", "somewhere"], "--tune lora"),
    "adapter_and_rank": ([*PRIVATE, "--tune", "lora", "--adapter", "somewhere", "--lora-rank", "4"], "contradicts --adapter"),
    "merge_without_lora": ([*PRIVATE, "--merge"], "--merge needs --tune lora"),
    "lora_targets": ([*PRIVATE, "--tune", "lora", "--lora-targets", "query"], "matches no linear layer"),
    "bitfit_without_biases": (["--model", "tiny-llama", *PRIVATE, "--tune", "bitfit"], "has no biases"),
    "last_k_too_large": ([*PRIVATE, "--tune", "last-k", "--last-k", "4"], "at most 3"),
    "last_k_elsewhere": ([*PRIVATE, "--last-k", "1"], "--tune last-k"),
    "max_length": ([*PRIVATE, "--max-length", "65"], "context of 64"),
    "too_long": ([*PRIVATE, "--max-length", "8"], "line 1"),
    "labels_without_words": (CLASSES, "--verbalizers"),
    "label_outside": ([*CLASSES, "--verbalizers", "0=bad,2=good"], "label '1' has no verbalizer"),
    "verbalizers_syntax": ([*CLASSES, "--verbalizers", "0:bad"], "not LABEL=WORD"),
    "template_without_labels": ([*PRIVATE, "--template", "{text}?"], "--label-field"),
    "broken_line": (["--data", "broken.jsonl"], "broken.jsonl, line 2"),
    "tokenizer_of_another_model": (["--model", "small-vocabulary", *PRIVATE, "--from-scratch"], "ids up to 256"),
    "microbatch": ([*PRIVATE, "--microbatch-size", "0"], "microbatch_size must be at least 1"),
    "out_not_empty": ([*FIRST, "--out", "full"], "nothing was overwritten"),
    "resume_nothing": ([*FIRST, "--resume"], "no interrupted run"),
}  # fmt: skip


@pytest.fixture
def workplace(gpt2, llama, texts, tmp_path, monkeypatch):
    """The current folder, with models and texts under short names; and a function that lists it."""
    monkeypatch.chdir(tmp_path)
    for path in (gpt2, llama, *texts.iterdir()):
        pathlib.Path(path.name).symlink_to(path)
    pathlib.Path("broken.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    small = pathlib.Path("small-vocabulary")
    small.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (small / name).symlink_to(gpt2 / name)
    (small / "config.json").write_text((gpt2 / "config.json").read_text().replace("257", "100"))
    pathlib.Path("full").mkdir()
    pathlib.Path("full/precious.txt").write_text("precious")
    return lambda: sorted(str(path) for path in pathlib.Path(".").rglob("*"))


def refused(args, capsys) -> str:
    args = args if "--model" in args else ["--model", "tiny-gpt2", *args]
    with pytest.raises(SystemExit) as caught:
        main(["finetune", *args])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    return error


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_bad_command_lines_exit_2_and_touch_nothing(name, workplace, capsys):
    args, message = COMMAND_LINES[name]
    before = workplace()
    assert message in refused(args, capsys)
    assert workplace() == before


@pytest.mark.unoptimized
def test_a_step_that_does_not_fit_is_refused_with_a_remedy(workplace, monkeypatch, capsys, standard_promotion):
    monkeypatch.setattr(meters, "available_memory", lambda: (100_000, "a test"))
    before = workplace()
    error = refused([*FIRST, *FITTING], capsys)
    assert "the device has 0 MiB left (a test)" in error
    assert "--microbatch-size 8, --remat, --tune lora, --dtype bfloat16, a smaller --max-length" in error
    assert workplace() == before


@pytest.mark.unoptimized
@pytest.mark.slow
def test_a_run_is_resumed_with_its_own_settings_and_data_only(
    workplace, texts, gpt2, capsys, monkeypatch, standard_promotion
):
    args = [*FIRST, *FITTING, "--model", "tiny-gpt2", "--out", "run"]

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune.tuning_outputs, "write", interrupted)
        with pytest.raises(SystemExit):
            main(["finetune", *args])
    capsys.readouterr()
    kept = workplace()
    assert "learning_rate: 0.0005 there, 0.1 here" in refused([*args, "--resume", "--learning-rate", "0.1"], capsys)
    assert "noise_multiplier: 1.0 there, 2.0 here" in refused([*args, "--resume", "--noise-multiplier", "2"], capsys)
    lines = (texts / "private.txt").read_text().splitlines()
    pathlib.Path("private.txt").unlink()
    pathlib.Path("private.txt").write_text("\n".join(reversed(lines)))
    assert "not the one that the run in run began with" in refused([*args, "--resume"], capsys)
    pathlib.Path("private.txt").write_text("\n".join(lines))
    other = load_model(gpt2)
    pathlib.Path("tiny-gpt2").unlink()
    finetune.tuning_outputs.save_model(
        "tiny-gpt2", finetune.dataclasses.replace(other, params=jax.tree.map(lambda x: x + 1, other.params))
    )
    for name in ("vocab.json", "merges.txt"):
        (pathlib.Path("tiny-gpt2") / name).write_bytes((gpt2 / name).read_bytes())
    assert "base_sha256" in refused([*args, "--resume"], capsys)
    assert [path for path in kept if path.startswith("run")] == [path for path in workplace() if path.startswith("run")]
