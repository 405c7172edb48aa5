"""Every kernel lowers for Hopper, compiles without spills at real sizes, and holds no array that it promises not to."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import blocks
from tests.aot import h200, programs


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("name", programs.NAMES)
@pytest.mark.parametrize(("num_tokens", "width", "out"), [(128, 768, 3072), (1, 64, 64), (77, 129, 257)])
def test_the_kernel_lowers_for_hopper(name, num_tokens, width, out):
    """What the interpreter accepts, the GPU lowering may still refuse. This needs no plugin."""
    function, arguments = programs.program(name, num_tokens, width, out, implementation="mosaic_gpu")
    text = h200.lower_for_h200(function, *arguments).as_text()
    assert text.count("mosaic_gpu") > 0
    function, arguments = programs.program(name, num_tokens, width, out, implementation="xla")
    assert "mosaic_gpu" not in h200.lower_for_h200(function, *arguments).as_text()  # the check can fail


@pytest.mark.usefixtures("lowering")
def test_the_automatic_choice_on_an_h200_is_xla_until_it_is_measured():
    x = jnp.zeros((1, 128, 64), jnp.bfloat16)
    with h200.target():
        assert pallas_kernels.chosen_implementation("gram_norms", x, x) == "xla"
        assert pallas_kernels.chosen_implementation("gram_norms", x, x, "mosaic_gpu") == "mosaic_gpu"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", programs.NAMES)
@pytest.mark.parametrize(("width", "out"), programs.SHAPES)
@pytest.mark.parametrize("num_tokens", programs.LENGTHS)
def test_the_kernel_compiles_without_spills_and_without_scratch(name, num_tokens, width, out):
    function, arguments = programs.program(name, num_tokens, width, out, implementation="mosaic_gpu")
    compiled = h200.compile_for_h200(function, *arguments)
    (kernel,) = compiled.kernels
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (0, 0)
    assert kernel.registers <= 65_536 // 384  # three warpgroups start in one file of registers
    # Neither B T T nor B D P entries: the partial sums of the tiles alone.
    assert compiled.temp_bytes <= programs.BATCH * max(num_tokens**2, width * out // 100)
    if name == "wgrad_norms":
        assert compiled.output_bytes < 1024


@pytest.mark.usefixtures("compiler")
def test_the_checks_of_memory_and_spills_can_fail(monkeypatch):
    plain, arguments = programs.program("gram_norms", 1024, 768, 768, implementation="xla")
    assert h200.compile_for_h200(plain, *arguments).temp_bytes >= 4 * programs.BATCH * 1024**2
    plain, arguments = programs.program("wgrad_norms", 128, 768, 768, implementation="xla")
    assert h200.compile_for_h200(plain, *arguments).temp_bytes >= 4 * programs.BATCH * 768**2

    greedy = dataclasses.replace(blocks.SAFE["clip_noise_dense"], columns=256, stages=2)
    monkeypatch.setattr(blocks, "SAFE", blocks.SAFE | {"clip_noise_dense": greedy})
    fused, arguments = programs.program("clip_noise_dense", 128, 768, 768, implementation="mosaic_gpu")
    (kernel,) = h200.compile_for_h200(fused, *arguments).kernels
    assert kernel.spill_store_bytes > 0


@pytest.mark.usefixtures("compiler")
def test_more_shared_memory_than_there_is_is_an_error(monkeypatch):
    greedy = dataclasses.replace(blocks.SAFE["gram_norms"], stages=16)
    monkeypatch.setattr(blocks, "SAFE", blocks.SAFE | {"gram_norms": greedy})
    function, arguments = programs.program("gram_norms", 128, 2048, 2048, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="shared memory"):
        h200.compile_for_h200(function, *arguments)


@pytest.mark.usefixtures("compiler")
def test_the_random_index_of_a_huge_layer_compiles():
    """Above 2^32 entries the counter needs its high word."""
    x = jax.ShapeDtypeStruct((1, 64, 65_536), jnp.bfloat16)
    g = jax.ShapeDtypeStruct((1, 64, 131_072), jnp.bfloat16)

    def noised(x, g, key_data):
        ones = jnp.ones(1)
        return pallas_kernels.clip_noise_dense(
            x, g, ones, noise_stddev=1.0, key_data=key_data, implementation="mosaic_gpu"
        )

    (kernel,) = h200.compile_for_h200(noised, x, g, jax.ShapeDtypeStruct((2,), jnp.uint32)).kernels
    assert kernel.spill_store_bytes == 0


def test_the_assembler_report_is_read():
    report = """ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    8 bytes stack frame, 72 bytes spill stores, 76 bytes spill loads
ptxas info    : Used 255 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compiling entry function 'two' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers"""
    assert h200.kernels_of(report) == (h200.Kernel("one", 255, 72, 76), h200.Kernel("two", 168, 0, 0))
