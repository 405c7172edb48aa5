"""`jaxdp generate`: text from a folder, or a clear error."""

import pytest

from jaxdp.cli import main

pytestmark = pytest.mark.unoptimized


def run(capsys, *args) -> str:
    main(["generate", *map(str, args)])
    return capsys.readouterr().out


def test_a_known_story(jaxdp_data, capsys):
    """Greedy text of a real model, as published with it."""
    folder = jaxdp_data / "models"
    told = run(capsys, "--model", folder / "stories260K-hf", "--prompt", "", "--max-new-tokens", 60)
    assert told.strip()[:80] in " ".join((folder / "stories260K" / "stories260K.md").read_text().split())


def test_a_seed_decides_what_is_sampled(gpt2, capsys):
    args = ["--model", gpt2, "--prompt", "the", "--max-new-tokens", 20, "--temperature", 1, "--top-k", 50]
    first, second, other = (run(capsys, *args, "--seed", seed) for seed in (1, 1, 2))
    assert first == second != other
    assert first.startswith("the")


def test_an_empty_prompt_starts_where_texts_start(gpt2, capsys):
    run(capsys, "--model", gpt2, "--prompt", "", "--max-new-tokens", 3)


BAD = {
    "no_model": (["--model", "nowhere"], "does not exist"),
    "no_adapter": (["--adapter", "nowhere"], "does not exist"),
    "too_many": (["--max-new-tokens", 1000], "context of 64"),
    "none": (["--max-new-tokens", 0], "max_new_tokens must be at least 1"),
    "temperature": (["--temperature", -1], "temperature must be nonnegative"),
    "top_k_greedy": (["--top-k", 3], "no effect at --temperature 0"),
    "top_k": (["--temperature", 1, "--top-k", 0], "top_k must be at least 1"),
    "seed": (["--seed", -1], "seed must be at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_command_lines_exit_2(name, gpt2, capsys):
    args, message = BAD[name]
    args = args if "--model" in args else ["--model", gpt2, *args]
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--prompt", "the", *map(str, args)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
