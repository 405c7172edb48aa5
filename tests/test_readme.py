"""The README tells the truth: its commands and its code run as they stand."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests.processes import user_environment

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def jaxdp_commands() -> list[str]:
    return [
        part.strip() for line in commands() for part in line.split("&&") if part.strip().startswith("python -m jaxdp")
    ]


def is_of_a_language_model(command: str) -> bool:
    return command.split()[3] in ("finetune", "generate", "export-trajectory", "replay")


@pytest.fixture
def run(jaxdp_here, tmp_path):
    """A command, in this process."""

    def run(command: str) -> str:
        start, arguments = shlex.split(command)[:3], shlex.split(command)[3:]
        assert start == ["python", "-m", "jaxdp"]
        return jaxdp_here(*arguments, cwd=tmp_path).stdout

    return run


FIRST = "python -m jaxdp train"  # run, and its files read back, in tests/cli/test_train.py


@pytest.mark.unoptimized
@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [each for each in jaxdp_commands() if each != FIRST and not is_of_a_language_model(each)]
)
def test_the_commands_run(command, run):
    run(command)


@pytest.mark.unoptimized
@pytest.mark.slow
def test_the_commands_of_a_language_model_run_one_after_the_other(jaxdp_data, tmp_path, run):
    (tmp_path / "models").symlink_to(jaxdp_data / "models")
    tales = (jaxdp_data / "text" / "GrimmsFairyTales.txt").read_text(encoding="utf-8").split("\n\n")
    (tmp_path / "private.txt").write_text("\n\n".join(tales[:100]), encoding="utf-8")  # few: batches are no larger
    (tmp_path / "public.txt").write_text("\n\n".join(tales[-20:]), encoding="utf-8")
    finetune, generate, stream, export, replay = filter(is_of_a_language_model, jaxdp_commands())
    assert "epsilon 8 at delta" in run(finetune)
    assert "Once upon a time" in run(generate)
    assert "epsilon 8 at delta" in run(stream)
    run(export)
    run(replay)
    released, again = (tmp_path / name / "model" / "model.safetensors" for name in ("streamed", "again"))
    assert released.read_bytes() == again.read_bytes()


def test_the_first_two_commands_are_the_ones_that_ci_runs():
    assert commands()[:2] == ["pip install -e . && python -m jaxdp train", "pip install -e '.[test]' && pytest"]
    assert "pip install -q -e '.[test]' && pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.unoptimized
@pytest.mark.slow
def test_the_code_runs_as_one_program(tmp_path):
    program = "\n".join(blocks("python"))
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        cwd=tmp_path,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    epsilon = float(result.stdout.split()[0])
    assert 2.9 < epsilon <= 3.0


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"README links to {target}, which does not exist"
