"""Stricter than any user: no implicit promotion, warnings are errors (pyproject.toml), two CPU devices."""

import os
import pathlib
import subprocess
import tempfile

import hypothesis
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from tests import unoptimized

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("Agg")

# One cache for all workers and the processes that they start: most of the suite's time is compilation, much of it repeated.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compilation_cache = tempfile.TemporaryDirectory(prefix="jaxdp-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compilation_cache.name  # workers inherit it
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)
hypothesis.settings.register_profile("jaxdp", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("jaxdp")


def is_unoptimized(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("unoptimized")
    return mark is not None and mark.args != (False,)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The marked tests of a file one after the other: with every switch, compiled programs are forgotten."""
    files: dict[pathlib.Path, int] = {}
    items.sort(key=lambda item: (files.setdefault(item.path, len(files)), not is_unoptimized(item)))


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a module
def pytest_runtest_setup(item: pytest.Item) -> None:
    unoptimized.switch(is_unoptimized(item))


@pytest.fixture(scope="session")
def jaxdp_data() -> pathlib.Path:
    """The folder of real data sets; tests that need it skip without it."""
    folder = os.environ.get("JAXDP_DATA")
    if not folder:
        pytest.skip("JAXDP_DATA is not set")
    return pathlib.Path(folder)


@pytest.fixture
def standard_promotion():
    """For tests through `optax.adam`, whose own arithmetic mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def jaxdp_here(monkeypatch, capfd, standard_promotion):
    """Runs `jaxdp ...` in this process, for what a process of its own would not change: it need not load and compile again."""
    from jaxdp.cli import main

    def run(*args, cwd, check=True):
        returncode = 0
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            try:
                main([*map(str, args)])
            except SystemExit as end:
                returncode = end.code
        result = subprocess.CompletedProcess(args, returncode, *capfd.readouterr())
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(20201)


@pytest.fixture
def params() -> dict:
    """Two layers and a scalar, of mixed shapes."""
    rng = np.random.default_rng(0)
    return {
        "first": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "bias": jnp.zeros(4)},
        "second": {"kernel": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), "scale": jnp.float32(1.5)},
    }


@pytest.fixture(scope="session")
def loss_fn():
    """A smooth loss of one example `(x [3], y [2])`; one object, so that programs of it can be kept."""

    def loss(params, example):
        x, y = example
        hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
        return jnp.sum(jnp.square(hidden @ params["second"]["kernel"] * params["second"]["scale"] - y))

    return loss


@pytest.fixture
def batch():
    """Eight examples for `loss_fn`."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
