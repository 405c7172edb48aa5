"""One test body, every implementation: `implementation` is the name, skipped with a reason where it cannot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import support


@pytest.fixture(params=["xla", "mosaic_gpu_interpret", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
def implementation(request):
    operand = jnp.zeros((1, 1, 1), jnp.bfloat16)
    reason = support.why_not(request.param, operand, operand)
    if reason is not None:
        pytest.skip(reason)
    yield request.param
    if request.param == "mosaic_gpu_interpret":
        # An exception inside the interpreter leaves its shared memory behind, for the next test to trip over.
        from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

        interpret_pallas_call.gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.fixture
def key_data() -> jax.Array:
    return jax.random.key_data(jax.random.key(20201))


@pytest.fixture
def operands():
    """(B, T, D, P) -> x, g and the exact per-example gradients in float64."""

    def make(batch, length, width, out, dtype=jnp.bfloat16, seed=0):
        rng = np.random.default_rng(seed)
        x, g = (jnp.asarray(rng.normal(size=(batch, length, size)), dtype) for size in (width, out))
        return x, g, gradients_of(x, g)

    return make


def gradients_of(x, g) -> np.ndarray:
    return np.einsum("btd,btp->bdp", np.asarray(x, np.float64), np.asarray(g, np.float64))
