"""Benchmarks compile many small programs and run each a few times: most of the time would go into optimizing them."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
