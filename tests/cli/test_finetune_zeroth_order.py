"""`jaxdp finetune` by forward passes: streamed, resident, interrupted and killed runs are one run, bit for bit."""

import json
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxdp import text
from jaxdp.cli import interrupts, main, memory_choice, meters, run_secrets, run_trajectory
from jaxdp.cli.memory_choice import Room
from jaxdp.models import load_model, load_tokenizer
from jaxdp.text import Record
from jaxdp.zeroth_order import read_trajectory
from jaxdp.zeroth_order.memory import StepMemory

pytestmark = pytest.mark.unoptimized  # all alike; tests/zeroth_order compares bits as users compile
SMALL = ["--expected-batch-size", "8", "--max-length", "24", "--learning-rate", "1e-3"]
PRIVATE = [
    "--method",
    "dp-aggzo",
    "--num-directions",
    "2",
    "--noise-multiplier",
    "1",
    "--l2-clip-norm",
    "5",
    "--accountant",
    "rdp",
]
STEPS = 6


def arguments(llama, texts, out, *more, num_steps=STEPS, evaluates=True) -> list[str]:
    data = ["--data", texts / "private.txt", "--record", "line"]
    data += ["--eval", texts / "public.txt"] if evaluates else []
    return [
        str(part)
        for part in ["finetune", "--model", llama, *data, *SMALL, "--num-steps", num_steps, *more, "--out", out]
    ]


def report_of(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def files_of(folder) -> dict[str, bytes]:
    """What a run leaves that its secrets decide."""
    names = ["trajectory.jaxdpzo", *(str(path.relative_to(folder)) for path in folder.glob("*/*.safetensors"))]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def secrets():
    return run_secrets.RunSecrets(jax.random.key(7, impl="threefry2x32"), 12345, "", 256, 1, is_split=False)


@pytest.fixture
def same_secrets(secrets, monkeypatch):
    """Every run of the test draws the same noise and batches."""
    monkeypatch.setattr(
        run_secrets, "draw", lambda data, *chunks, is_split: secrets._replace(data_sha256=data, is_split=is_split)
    )


@pytest.fixture(scope="module")
def private_run(llama, texts, tmp_path_factory, secrets):
    """A resident private run, and how often each program was compiled for it."""
    out = tmp_path_factory.mktemp("runs") / "resident"
    compiled: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            compiled.append(record.getMessage())

    logger, listener = logging.getLogger("jax._src.dispatch"), Listener()
    with pytest.MonkeyPatch.context() as patch, jax.log_compiles():
        patch.setattr(
            run_secrets, "draw", lambda data, *chunks, is_split: secrets._replace(data_sha256=data, is_split=is_split)
        )
        logger.addHandler(listener)
        try:
            main(arguments(llama, texts, out, *PRIVATE))
        finally:
            logger.removeHandler(listener)
    return out, [message for message in compiled if "Finished XLA compilation" in message]


def test_a_private_run_reports_what_it_did(private_run, llama, texts):
    out, compiled = private_run
    report = report_of(out)
    assert report["method"] == "dp-aggzo"
    assert report["private"]
    assert (report["num_directions"], report["estimator"], report["directions"]) == (2, "two-sided", "rademacher")
    assert report["clipping"] == "flat(l2_clip_norm=5)" or "5" in report["clipping"]
    trajectory = read_trajectory(out / "trajectory.jaxdpzo")
    assert trajectory.num_steps == report["num_steps"] == STEPS
    assert report["trajectory_bytes"] == (out / "trajectory.jaxdpzo").stat().st_size
    assert trajectory.header.privacy is not None
    assert trajectory.header.privacy["noise_multiplier"] == 1.0
    assert report["updates"]["warnings"] == []
    assert report["step_bytes"] > 0
    # The card states the guarantee and quotes no loss.
    card = (out / "model" / "README.md").read_text()
    assert report["statement"] in card
    assert "along 2 rademacher directions a step, perturbation scale 0.001" in card
    assert (out / "secret").stat().st_mode & 0o777 == 0o700
    assert (out / "secret" / "run.json").stat().st_mode & 0o777 == 0o600
    # What the memory was predicted from is what ran.
    for program in ("start_and_write", "visit_and_write", "finish"):
        assert sum(f"jit({program})" in message for message in compiled) == 1, program


def test_scores_are_those_of_the_released_model(private_run, llama, texts):
    out, _ = private_run
    for folder, when in ((llama, "before"), (out / "model", "after")):
        loaded, tokenizer = load_model(folder), load_tokenizer(folder)
        lines = [Record(prompt="", completion=line) for line in (texts / "public.txt").read_text().splitlines()]
        data, _ = text.encode_texts(lines, tokenizer, max_length=24, max_sequences=None, on_long="split")
        expected = text.evaluate_language_model(loaded.model.logits, loaded.params, data)
        found = report_of(out)["evaluation"][when]
        assert found["num_tokens"] == expected.num_tokens
        assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)


def test_a_streamed_run_is_the_resident_run_bit_for_bit(private_run, llama, texts, tmp_path, same_secrets):
    out = tmp_path / "streamed"
    main(arguments(llama, texts, out, *PRIVATE, "--stream"))
    assert files_of(out) == files_of(private_run[0])
    report = report_of(out)
    assert report["is_streamed"]
    assert report["prefetch"] == 1
    assert (
        report["link"]["bytes_per_step"] == 2 * 2 * (16 * 16 * 4 + 16 * 24 * 3 + 2 * 16) * 4
    )  # both ways, 2 blocks, float32
    assert 0 <= report["link"]["overlap"] <= 1


@pytest.mark.unoptimized
def test_blocks_in_stages_are_chosen_with_the_secrets_and_replayed(llama, texts, tmp_path, monkeypatch, capsys):
    """Whatever is resumed keeps its stages: another cut could change the last bit of a loss."""
    out, choose, calls = tmp_path / "stages", memory_choice.choose, []

    def split(*arguments, **options):
        calls.append(options["splits"])
        return choose(*arguments, **options | {"splits": options["splits"][-1:]})

    monkeypatch.setattr(memory_choice, "choose", split)
    main(arguments(llama, texts, out, *PRIVATE, "--stream", evaluates=False))
    report = report_of(out)
    assert report["stages"] > 2
    assert f"streamed in {report['stages']} stages each, 1 prefetched" in capsys.readouterr().out
    assert report["link"]["bytes_per_step"] == 2 * 2 * (16 * 16 * 4 + 16 * 24 * 3 + 2 * 16) * 4
    expected = files_of(out)
    (out / "report.json").unlink()
    main([*arguments(llama, texts, out, *PRIVATE, evaluates=False), "--resume"])
    assert files_of(out) == expected
    assert calls == [(False, True), (True,)]
    replayed_to(out, llama, tmp_path)


def test_an_interrupted_run_goes_on_to_the_same_bits(
    private_run, llama, texts, tmp_path, same_secrets, monkeypatch, capsys
):
    out = tmp_path / "interrupted"
    calls = []

    def after_two(*, real=interrupts.deferred):
        import contextlib

        @contextlib.contextmanager
        def deferred():
            with real():
                yield lambda: calls.append(None) or len(calls) == 2

        return deferred()

    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "deferred", after_two)
        with pytest.raises(SystemExit) as caught:
            main(arguments(llama, texts, out, *PRIVATE))
    assert caught.value.code == 130
    assert "saved step 2 of 6" in capsys.readouterr().err
    assert read_trajectory(out / "trajectory.jaxdpzo").num_steps == 2
    # The secrets of the folder count, not fresh ones; blocks may wait elsewhere.
    monkeypatch.setattr(run_secrets, "draw", None)
    main([*arguments(llama, texts, out, *PRIVATE), "--stream", "--resume"])
    assert "resumed after step 2 of 6" in capsys.readouterr().out
    assert files_of(out) == files_of(private_run[0])
    report, expected = report_of(out), report_of(private_run[0])
    assert report["epsilon"] == expected["epsilon"]
    assert report["not_private"]["final_training_loss"] == expected["not_private"]["final_training_loss"]


def test_a_run_is_resumed_with_its_own_settings_data_and_secrets_only(private_run, llama, texts, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(private_run[0], out)
    (out / "report.json").unlink()

    def refused(*more, **other) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*arguments(llama, other.get("texts", texts), out, *PRIVATE, *more), "--resume"])
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "num_directions: 2 there, 4 here" in refused("--num-directions", "4")
    assert "perturbation_scale: 0.001 there, 0.01 here" in refused("--perturbation-scale", "0.01")
    other = tmp_path / "texts"
    shutil.copytree(texts, other)
    lines = (texts / "private.txt").read_text().splitlines()
    (other / "private.txt").write_text("\n".join(reversed(lines)))
    assert "not the one that the run in" in refused(texts=other)
    # A run that was killed behind its last step has its outputs to write again, and no step to take.
    for name in ("model", "curve.png"):
        shutil.rmtree(out / name, ignore_errors=True)
    main([*arguments(llama, texts, out, *PRIVATE), "--resume"])
    assert files_of(out) == files_of(private_run[0])
    (out / "report.json").unlink()
    shutil.rmtree(out / "secret")
    assert "cannot go on with its own noise" in refused()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("mezo", ["--no-privacy", "--stream", "--momentum", "0.5"]),
        ("lozo", ["--no-privacy", "--schedule", "linear", "--num-directions", "2"]),
        ("fzoo", ["--no-privacy", "--num-directions", "2"]),
        ("dpzero", ["--target-epsilon", "8", "--accountant", "rdp", "--estimator", "forward"]),
        ("dpzero", ["--no-privacy", "--param-dtype", "bfloat16", "--rounding", "stochastic", "--write-every", "2"]),
    ],
    ids=["mezo", "lozo", "fzoo", "dpzero", "dpzero without privacy in bfloat16"],
)
def test_every_method_trains(method, more, llama, texts, tmp_path):
    out = tmp_path / "out"
    main(arguments(llama, texts, out, "--method", method, *more, evaluates=False))
    report = report_of(out)
    assert report["method"] == method
    assert report["private"] == ("--no-privacy" not in more)
    assert report["num_steps"] == STEPS
    assert report["updates"]["warnings"] == []
    replayed_to(out, llama, tmp_path)


def test_a_laplace_run_has_a_pure_epsilon_everywhere_it_is_said(llama, texts, tmp_path, capsys):
    """DP-ZO (arXiv 2401.04343): plan check, report, card, trajectory and replay tell one truth."""
    out = tmp_path / "out"
    goal = ["--noise", "laplace", "--target-delta", "0", "--target-epsilon", "30", "--l2-clip-norm", "5"]
    main(arguments(llama, texts, out, "--method", "dpzero", *goal, evaluates=False))
    said = capsys.readouterr().out
    report, trajectory = report_of(out), read_trajectory(out / "trajectory.jaxdpzo")
    assert 29 < report["epsilon"] <= 30
    assert (report["noise"], report["delta"], report["private"]) == ("laplace", 0, True)
    assert f"noise multiplier {report['noise_multiplier']:.5g} (Laplace scale over clip norm)" in said
    assert "at delta 0 (ADD_OR_REMOVE_ONE, basic composition)" in said
    assert f"Laplace noise of scale {report['noise_multiplier']:g} times the clip norm" in report["statement"]
    card = (out / "model" / "README.md").read_text()
    assert "-differentially private, purely (delta = 0)**" in card
    assert "| noise | Laplace |" in card
    assert "(scale over clip norm) |" in card
    assert "| accountant | basic composition |" in card
    assert trajectory.header.privacy is not None
    assert trajectory.header.privacy["noise"] == "laplace"
    replayed_to(out, llama, tmp_path)
    assert "at delta 0 (ADD_OR_REMOVE_ONE, basic composition), for the trajectory" in capsys.readouterr().out


def replayed_to(out, llama, tmp_path, *more) -> None:
    main(["replay", str(out / "trajectory.jaxdpzo"), "--base", str(llama), "--out", str(tmp_path / "again"), *more])
    (weights,) = out.glob("*/*.safetensors")
    assert (tmp_path / "again" / weights.relative_to(out)).read_bytes() == weights.read_bytes()


@pytest.mark.slow
def test_classes_with_adapters_on_a_frozen_base(llama, texts, tmp_path):
    out = tmp_path / "out"
    reviews = texts / "reviews.jsonl"
    command = ["finetune", "--model", llama, "--data", reviews, "--eval", reviews, "--label-field", "label"]
    command += ["--verbalizers", "0=bad,1=good", "--method", "mezo", "--no-privacy", *SMALL, "--num-steps", "3"]
    command += [
        "--tune",
        "lora",
        "--lora-rank",
        "2",
        "--stream",
        "--base-format",
        "int4",
        "--max-length",
        "64",
        "--out",
        out,
    ]
    main([str(part) for part in command])
    report = report_of(out)
    assert 0 <= report["evaluation"]["after"]["accuracy"] <= 1
    assert report["evaluation"]["before"]["num_examples"] == 80
    assert report["base_format"] == "int4"
    assert report["updates"]["warnings"] == []
    replayed_to(out, llama, tmp_path)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(llama, texts, tmp_path, user_environment):
    """SIGKILL at a random moment. The uninterrupted twin begins with the killed run's secrets."""
    out, twin, num_steps = tmp_path / "killed", tmp_path / "twin", 150
    options = {"num_steps": num_steps, "evaluates": False}
    command = arguments(llama, texts, out, *PRIVATE, **options)
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxdp", *command],
        cwd=tmp_path,
        env=user_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    journal, deadline = out / "trajectory.jaxdpzo", time.time() + 240
    while process.poll() is None and time.time() < deadline:
        if journal.exists() and read_trajectory(journal).num_steps > 2:
            break
        time.sleep(0.005)
    time.sleep(np.random.default_rng().uniform(0.0, 0.1))
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()
    found = read_trajectory(journal).num_steps
    assert 0 < found < num_steps
    (twin / "secret").mkdir(parents=True)
    for name in ("config.json", "secret/run.json"):
        shutil.copy(out / name, twin / name)
    for folder in (out, twin):
        main([*arguments(llama, texts, folder, *PRIVATE, **options), "--resume"])
    assert files_of(out) == files_of(twin)
    assert report_of(out)["epsilon"] == report_of(twin)["epsilon"]


# Bad input: exit code 2, one line on stderr, nothing written.
NO_PRIVACY = ["--no-privacy"]
COMMAND_LINES = {
    "not_said": (["--method", "mezo"], "--method mezo is not private, and this must be said: add --no-privacy"),
    "mezo_has_no_epsilon": (["--method", "mezo", "--target-epsilon", "3"], "--target-epsilon 3: mezo adds no noise"),
    "fzoo_has_no_noise": (["--method", "fzoo", "--noise-multiplier", "1"], "use --method dpzero, or dp-aggzo"),
    "laplace_gradients": (["--noise", "laplace"], "--method dpsgd releases whole gradients; use --method dpzero"),
    "laplace_many": (["--method", "dp-aggzo", "--noise", "laplace"], "dp-aggzo clips many numbers together; use --method dpzero"),
    "laplace_mezo": (["--method", "mezo", *NO_PRIVACY, "--noise", "laplace"], "--method mezo adds no noise"),
    "laplace_directions": (
        ["--method", "dpzero", "--noise", "laplace", "--num-directions", "2"], "--num-directions 2: --noise laplace is for one"
    ),
    "laplace_rdp": (["--method", "dpzero", "--noise", "laplace", "--accountant", "rdp"], "use pld, or leave it out"),
    "laplace_none": (["--method", "dpzero", "--noise", "laplace", *NO_PRIVACY], "--noise laplace contradicts --no-privacy"),
    "pure_gaussian": (["--method", "dpzero", "--target-delta", "0"], "or --method dpzero --noise laplace"),
    "pure_gradients": (["--target-delta", "0"], "--target-delta 0 is a pure epsilon"),
    "clipping": (["--method", "dpzero", "--clipping", "quantile"], "--clipping quantile: dpzero clips one vector"),
    "last_k": (["--method", "dpzero", "--tune", "last-k"], "use full, lora, ffa-lora or bitfit"),
    "optimizer": (["--method", "dpzero", "--optimizer", "adam"], "use sgd, with --momentum"),
    "microbatch": (["--method", "dpzero", "--microbatch-size", "4"], "--microbatch-size is for dpsgd"),
    "directions": (["--method", "lozo", *NO_PRIVACY, "--directions", "gaussian"], "contradicts low-rank"),
    "refresh": (["--method", "mezo", *NO_PRIVACY, "--refresh-every", "5"], "add --low-rank"),
    "forward_scale": (
        ["--method", "mezo", *NO_PRIVACY, "--estimator", "forward", "--perturbation-scale", "1"], "takes derivatives"
    ),
    "one_normalized": (["--method", "fzoo", *NO_PRIVACY, "--num-directions", "1"], "give 2 or more"),
    "no_directions": (["--method", "mezo", *NO_PRIVACY, "--num-directions", "0"], "num_directions must be at least 1"),
    "momentum": (["--method", "mezo", *NO_PRIVACY, "--momentum", "1"], "momentum must be in [0, 1), got 1"),
    "base_format_of_what_changes": (["--method", "mezo", *NO_PRIVACY, "--base-format", "int4"], "use --tune lora"),
    "param_dtype": (["--method", "mezo", *NO_PRIVACY, "--tune", "lora", "--param-dtype", "bfloat16"], "leave it out"),
    "rounding": (["--method", "mezo", *NO_PRIVACY, "--rounding", "stochastic"], "give --param-dtype bfloat16"),
    "size": (["--method", "mezo", *NO_PRIVACY, "--max-device-memory", "6 apples"], "write it as 6GB"),
    "stream_of_gradients": (["--stream"], "--stream is for zeroth-order methods, and --method is dpsgd"),
    "directions_of_gradients": (["--num-directions", "2"], "--num-directions is for zeroth-order methods"),
    "no_block": (
        ["--method", "mezo", *NO_PRIVACY, "--tune", "lora", "--lora-targets", "head/out"], "that every block has"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_bad_command_lines_exit_2_and_write_nothing(name, llama, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args, message = COMMAND_LINES[name]
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--model", str(llama), "--data", str(texts / "private.txt"), "--record", "line", *args])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_run_that_does_not_fit_is_refused_with_remedies(private_run, llama, texts, tmp_path, capsys, same_secrets):
    for more, remedy in ((["--stream"], "to make it fit: --tune lora"), ([], "to make it fit: --stream (then ")):
        with pytest.raises(SystemExit) as caught:
            main(arguments(llama, texts, tmp_path / "out", *PRIVATE, *more, "--max-device-memory", "10KB"))
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert "(--max-device-memory 10KB)" in error
        assert remedy in error
        assert not (tmp_path / "out").exists()


def memory(finish: int, *, is_split: bool = False) -> StepMemory:
    """Blocks of 100 bytes, ten of them, whole or in two stages."""
    visits, parts = ((240, 200), (60, 40)) if is_split else ((300,), (100,))
    return StepMemory(start=50, visits=visits, finish=finish, resident=20, parts=parts, frozen_block=0, num_blocks=10)


@pytest.mark.parametrize(
    ("device", "is_streamed", "can_split", "expected"),
    [
        (2000, False, False, (1, False, 256)),
        (2000, True, True, (1, False, 256)),
        (700, True, True, (1, False, 64)),  # a smaller head before stages
        (450, True, True, (1, True, 64)),  # stages before a shorter prefetch
        (450, True, False, (0, False, 64)),
        (340, True, True, (1, True, 16)),
        (330, True, True, (0, False, 16)),
        (319, True, True, (0, True, 16)),
        (319, True, False, "--stream"),
        (259, True, True, "--stream"),
        (700, False, False, "--stream"),
    ],
)
def test_what_fits_is_chosen(device, is_streamed, can_split, expected):
    finishes = {256: 900, 64: 350, 16: 100}
    room = Room(device, "a test", None, None, is_shared=False)

    def chosen():
        return memory_choice.choose(
            lambda is_split, tokens, num_at_once: memory(finishes[tokens], is_split=is_split),
            room,
            is_streamed=is_streamed,
            more_host_bytes=0,
            splits=(False, True) if can_split else (False,),
            head_tokens=memory_choice.head_tokens_of(100),
            nums_at_once=(1,),
            remedies=["less"],
        )

    if isinstance(expected, str):
        with pytest.raises(
            ValueError, match=f"which has 0 MiB \\(a test\\).*{'' if is_streamed else '--stream .*'}less"
        ):
            chosen()
    else:
        assert (chosen().placement.prefetch, chosen().is_split, chosen().head_tokens) == expected


def test_the_peak_is_all_that_is_alive():
    from jaxdp.zeroth_order import Placement

    figures = memory(100)
    assert figures.device_peak(Placement(False, 1)) == 300 + 20 + 9 * 100  # the visited block is in the program
    assert figures.device_peak(Placement(True, 0)) == 300 + 20
    assert figures.device_peak(Placement(True, 1)) == 300 + 20 + 2 * 100
    assert figures.host_bytes(Placement(True, 1)) == 10 * 100 + 2 * 100
    assert figures.link_bytes(Placement(True, 1), write_every=2) == 10 * 100 * 1.5
    assert figures.link_bytes(Placement(False)) == 0
    stages = memory(100, is_split=True)
    assert stages.device_peak(Placement(True, 0)) == 240 + 20
    assert stages.device_peak(Placement(True, 1)) == 240 + 20 + 2 * 40  # the other stage arrives, and another leaves
    assert stages.host_bytes(Placement(True, 1)) == 10 * 100 + 2 * 60
    assert stages.link_bytes(Placement(True, 1), write_every=2) == 10 * 100 * 1.5


def test_host_memory_is_refused_too(llama, texts, tmp_path, monkeypatch, capsys, private_run):
    monkeypatch.setattr(meters, "available_memory", lambda: None)
    monkeypatch.setattr(meters, "available_host_memory", lambda: (1000, "a test"))
    with pytest.raises(SystemExit):
        main(arguments(llama, texts, tmp_path / "out", *PRIVATE, "--stream"))
    assert "left (a test)" in capsys.readouterr().err


def test_a_journal_cut_off_in_its_header_begins_anew(tmp_path):
    """A run killed before its first step has nothing to go on with, and nothing in its way."""
    (tmp_path / (run_trajectory.NAME + ".partial")).write_bytes(b"jaxdpz")
    from jaxdp.zeroth_order import Header

    header = Header((1, 2), "base", {"num_directions": 1})
    journal, trajectory = run_trajectory.open_journal(pathlib.Path(tmp_path), header)
    journal.close()
    assert trajectory is None
    assert read_trajectory(run_trajectory.path_in(tmp_path)).header == header
