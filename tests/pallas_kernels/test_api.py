"""The choice of implementation, and what is said about a wrong one."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import blocks, support

X, G = jnp.ones((2, 5, 3), jnp.bfloat16), jnp.ones((2, 5, 4), jnp.bfloat16)
KERNELS = ("gram_norms", "wgrad_norms", "clip_noise_dense")


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_automatic_choice_is_xla_while_nothing_was_measured(kernel, monkeypatch):
    assert blocks.FASTER_FROM == {}
    for kind in ("cpu", "NVIDIA H200"):
        monkeypatch.setattr(support, "target_device_kind", lambda kind=kind: kind)
        assert pallas_kernels.chosen_implementation(kernel, X, G) == "xla"


def test_the_automatic_choice_follows_the_measurements(monkeypatch):
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip("Mosaic on a GPU needs jax 0.11.2")
    monkeypatch.setattr(blocks, "FASTER_FROM", {"NVIDIA H200": {"gram_norms": 4}})
    monkeypatch.setattr(support, "target_device_kind", lambda: "NVIDIA H200")
    choose = pallas_kernels.chosen_implementation
    assert choose("gram_norms", X, G) == "mosaic_gpu"
    assert choose("gram_norms", X[:, :3], G[:, :3]) == "xla"  # shorter than measured
    assert choose("wgrad_norms", X, G) == "xla"
    assert choose("gram_norms", X.astype(jnp.float32), G.astype(jnp.float32)) == "xla"
    monkeypatch.setattr(support, "target_device_kind", lambda: "NVIDIA A100-SXM4-40GB")
    assert choose("gram_norms", X, G) == "xla"


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_named_implementation_that_cannot_run_raises_and_never_falls_back(kernel):
    arguments = (X, G, jnp.ones(2)) if kernel == "clip_noise_dense" else (X, G)
    if support.why_not("mosaic_gpu", X, G) is None:
        pytest.skip("this machine has the GPU")
    with pytest.raises(NotImplementedError, match=rf"{kernel} cannot run with implementation='mosaic_gpu': .*xla"):
        getattr(pallas_kernels, kernel)(*arguments, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="dtype float32; it needs bfloat16"):
        pallas_kernels.chosen_implementation(kernel, X.astype(jnp.float32), G, "mosaic_gpu_interpret")
    with pytest.raises(NotImplementedError, match="cast both"):
        pallas_kernels.chosen_implementation(kernel, X, G.astype(jnp.float16), "mosaic_gpu_interpret")
    with pytest.raises(NotImplementedError, match="empty"):
        pallas_kernels.chosen_implementation(kernel, X[:0], G[:0], "mosaic_gpu_interpret")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA H20", True),
        ("NVIDIA B200", False),
        ("NVIDIA A100-SXM4-40GB", False),
        ("cpu", False),
    ],
)
def test_the_kernels_are_for_hopper(kind, expected):
    assert support._is_hopper(kind) == expected


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="implementation='triton' is not one of"):
        pallas_kernels.gram_norms(X, G, implementation="triton")
    with pytest.raises(ValueError, match="kernel='norms' is not one of"):
        pallas_kernels.chosen_implementation("norms", X, G)


def test_operands_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"x must be \[B, T, D\]"):
        pallas_kernels.gram_norms(X, G[:, :4])
    with pytest.raises(ValueError, match=r"x must be \[B, T, D\]"):
        pallas_kernels.wgrad_norms(X[0], G[0])
    with pytest.raises(ValueError, match="x has dtype int32"):
        pallas_kernels.gram_norms(X.astype(jnp.int32), G)
    with pytest.raises(ValueError, match=r"dtype=int8 is not"):
        pallas_kernels.wgrad_norms(X, G, store=True, dtype=jnp.int8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": jnp.ones(3)}, r"factors must be float32\[2\]; it is float32\[3\]"),
        ({"factors": jnp.ones(2, jnp.bfloat16)}, r"factors must be float32\[2\]"),
        ({"accumulator": jnp.ones((4, 3))}, r"accumulator must be float32\[3, 4\]"),
        ({"noise_stddev": 1.0}, "noise_stddev is given without key_data"),
        ({"key_data": jnp.zeros(2, jnp.uint32)}, "key_data is given without noise_stddev"),
        ({"noise_stddev": 1.0, "key_data": jnp.zeros(4, jnp.uint32)}, r"key_data must be uint32\[2\]"),
        ({"noise_stddev": jnp.ones(1), "key_data": jnp.zeros(2, jnp.uint32)}, r"noise_stddev must be float32\[\]"),
    ],
)
def test_arguments_of_the_sum_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pallas_kernels.clip_noise_dense(X, G, **({"factors": jnp.ones(2)} | arguments))


def test_block_sizes_that_the_hardware_lacks_are_refused():
    for sizes in ((32, 64, 2), (512, 64, 2), (128, 32, 2), (128, 100, 2), (128, 64, 1)):
        with pytest.raises(ValueError, match="columns must be 64 to 256"):
            blocks.Blocks(*sizes)
