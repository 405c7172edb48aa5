"""The benchmark of the kernels is ready for a GPU: both parts run here, at a reduced size."""

import math

import pytest

from benchmarks import kernels
from tests.aot import h200


def test_the_check_covers_every_implementation_that_runs_here():
    errors = kernels.check([kernels.Case(2, 5, 20, 30)])
    assert list(errors) == kernels.runnable()
    for cases in errors.values():
        assert all(0 <= error < 1e-5 for by_kernel in cases.values() for error in by_kernel.values())


def test_every_route_is_timed():
    (seconds,) = kernels.time([kernels.Case(2, 5, 20, 30)], rounds=2, turn_seconds=0.0).values()
    assert {"gram_norms xla", "wgrad_norms xla", "clip_noise_dense xla"} < seconds.keys()
    assert all(math.isfinite(spread["median"]) and spread["median"] > 0 for spread in seconds.values())


def test_the_compiler_report_needs_a_compiler_or_says_so():
    if h200.why_no_compiler() is not None:
        with pytest.raises(RuntimeError, match=r"\.ci/aot|jax 0.11"):
            kernels.aot()
        return
    report = kernels.aot(shapes=[(64, 128)], lengths=[64])
    assert all(row["spill_store_bytes"] == 0 for row in report["kernels"])
    assert len(report["kernels"]) == 5
