"""The loop that all training subcommands share."""

import dataclasses
import re
import time
import types

import jax.numpy as jnp
import pytest

import jaxdp
from jaxdp.cli import training_loop


@dataclasses.dataclass
class State:
    step: int


def run(tmp_path, num_steps=5):
    plan = jaxdp.plan(
        num_examples=10,
        sampling_prob=1.0,
        num_steps=num_steps,
        clipping=jaxdp.flat(1.0),
        noise_multiplier=1.0,
        target_delta=1e-3,
    )
    info = types.SimpleNamespace(not_private=types.SimpleNamespace(mean_loss=lambda: jnp.float32(0.5)))
    progress = training_loop.Progress([], 0.0)
    steps = training_loop.run_steps(
        lambda state, batch, mask: (State(state.step + 1), info),
        State(0),
        [(None, None)] * num_steps,
        plan,
        progress,
        save=lambda state, info: None,
        folder=tmp_path,
        save_every=1,
        start=time.perf_counter(),
    )
    assert [state.step for state, _ in steps] == list(range(1, num_steps + 1))
    return progress


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_run_without_a_terminal_says_how_far_it_is(tmp_path, capsys, monkeypatch, seconds):
    """A long run in a log must not look dead; a short one says nothing more."""
    monkeypatch.setattr(training_loop, "_SECONDS_BETWEEN_LINES", seconds)
    assert run(tmp_path).losses == [0.5] * 5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (5 if seconds == 0 else 0)
    assert all(re.fullmatch(r"step \d of 5: loss 0.500 \(not private\), epsilon <=.*", line) for line in lines)
