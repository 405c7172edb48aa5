"""Goldens by `transformers`, and tiny models."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from jaxdp.models import CausalLM, causal_lm
from jaxdp.models.weights import load_model
from tests.models.tiny import CONFIGS

# They need torch, and are run by hand.
collect_ignore = ["make_goldens.py", "make_peft_goldens.py"]

GOLDENS = pathlib.Path(__file__).parent / "goldens"
GOLDEN_NAMES = sorted(path.name for path in GOLDENS.iterdir())


@dataclasses.dataclass(frozen=True)
class Golden:
    """A model in a Hugging Face folder, and its logits by `transformers`."""

    folder: pathlib.Path
    model: CausalLM
    params: Any
    inputs: np.ndarray  # [2, L]
    expected: np.ndarray  # [2, L, V]

    @property
    def hf_config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def logits(self, model: CausalLM | None = None, **options: Any) -> np.ndarray:
        """By the model as loaded, or by another one with the same parameters."""
        model = model or self.model
        program = jax.jit(jax.vmap(lambda params, row: model.logits(params, row, **options), (None, 0)))
        return np.asarray(program(self.params, self.inputs))

    @functools.cached_property
    def plain(self) -> np.ndarray:
        """`logits()`, once: not for tests that change the code."""
        return self.logits()

    def error(self, model: CausalLM | None = None, **options: Any) -> float:
        """The largest difference to the logits by `transformers`."""
        return float(np.max(np.abs(self.logits(model, **options) - self.expected)))


@functools.cache
def load_golden(name: str) -> Golden:
    loaded, arrays = load_model(GOLDENS / name), np.load(GOLDENS / name / "golden.npz")
    return Golden(GOLDENS / name, loaded.model, loaded.params, arrays["inputs"], arrays["logits"])


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request) -> Golden:
    return load_golden(request.param)


@pytest.fixture
def load():
    """A golden by its name."""
    return load_golden


@pytest.fixture
def tiny():
    """A model by its name in `CONFIGS`."""

    def make(name: str, **options: Any) -> CausalLM:
        return causal_lm(CONFIGS[name], **options)

    return make
