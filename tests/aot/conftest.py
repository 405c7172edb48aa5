"""Compiling needs the CUDA plugin, lowering only jax >= 0.11; tests skip with the reason."""

import pytest

from tests.aot import h200


@pytest.fixture(scope="session")
def compiler() -> None:
    if (reason := h200.why_no_compiler()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def lowering() -> None:
    if (reason := h200.why_no_lowering()) is not None:
        pytest.skip(reason)
