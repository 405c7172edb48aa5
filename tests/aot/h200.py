"""Compiles JAX programs for an H200 on a machine that has neither a GPU nor a driver.

It finds what no CPU run can: errors of the GPU lowering, shared memory exceeded, register spills, device memory. Nothing is
executed or autotuned; no time can be had, and memory figures were never compared with a real device's.

    compiled = compile_for_h200(step, *shape_dtype_structs)
    compiled.temp_bytes, compiled.device_bytes, compiled.kernels

`lower_for_h200` needs an ordinary CPU wheel of jax >= 0.11 only, and finds all errors of the Pallas lowering. Compiling needs
the CUDA plugin without its own dependencies; `.ci/aot` makes such an environment:

    pip install jax==X absl-py && pip install --no-deps jax-cuda13-plugin==X jax-cuda13-pjrt==X

Arguments are lowered for "cuda" under a mesh that names the device, and the module is handed to the compile-only client of
a GPU topology. That last step is private to JAX: expect to repair this file, and no other, when JAX moves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

DEVICE_KIND = "NVIDIA H200"
NUM_CORES = 132
# What the compiler wants to know of the device, as GpuTargetConfig's text proto.
_TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {NUM_CORES}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000
  pcie_bandwidth: 64000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  device_address_bits: 64
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{DEVICE_KIND}"
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the assembler says of one Mosaic kernel. `registers` are those at launch, of every thread."""

    name: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a GPU that is not there. Sizes in bytes of device memory, for one call."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    host_temp_bytes: int
    kernels: tuple[Kernel, ...]
    executable: Any

    @property
    def device_bytes(self) -> int:
        """Arguments, outputs and temporaries; a donated argument counts once."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    def text(self) -> str:
        """The optimized, scheduled HLO."""
        return "\n".join(module.to_string() for module in self.executable.hlo_modules())


def why_no_lowering() -> str | None:
    return None if jax.__version_info__ >= (0, 11) else f"jax is {jax.__version__}; Mosaic GPU needs jax 0.11"


def why_no_compiler() -> str | None:
    """Why this Python cannot compile for a GPU, or None."""
    if (reason := why_no_lowering()) is not None:
        return reason
    try:
        _devices()
    except Exception as error:  # the plugin's own errors have no common type
        version = jax.__version__
        return (
            f"no compile-only CUDA client ({type(error).__name__}); run .ci/aot, or pip install --no-deps "
            f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
        )
    return None


@contextlib.contextmanager
def target() -> Iterator[None]:
    """A context in which JAX, and `pallas_kernels`, take an H200 for the device that is compiled for."""
    from jax._src.cudnn import fused_attention_stablehlo as attention

    device = AbstractDevice(device_kind=DEVICE_KIND, num_cores=NUM_CORES, platform="cuda")
    # Attention asks the installed cuDNN and GPU for their versions while it is traced.
    there = {
        "check_cudnn_version": lambda: 91000,
        "check_compute_capability": lambda oldest: float(oldest) <= 9.0,
        "is_cuda_compute_capability_equal": lambda capability: capability == "9.0",
    }
    before = {name: getattr(attention, name) for name in there}
    for name, answer in there.items():
        setattr(attention, name, answer)
    try:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            yield
    finally:
        for name, original in before.items():
            setattr(attention, name, original)


def lower_for_h200(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Lowers `fn`, jitted or not, for CUDA. Arguments are arrays or `jax.ShapeDtypeStruct`s on one device."""
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    with target():
        return jitted.trace(*args, **kwargs).lower(lowering_platforms=("cuda",))


def compile_for_h200(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Compiled:
    """Lowers and compiles `fn` for one H200.

    Args:
        fn: A function, or a jitted one (for donated or static arguments).
        *args: Arrays, or `jax.ShapeDtypeStruct`s without sharding, in any pytrees.
        **kwargs: The same.

    Raises:
        ValueError, NotImplementedError: `fn` cannot be lowered, or asks for more shared memory than there is.
        jax.errors.JaxRuntimeError: the compiler refuses the program.
    """
    from jax._src import compiler
    from jax._src.lib import xla_client

    device = _devices()[0]
    module = lower_for_h200(fn, *args, **kwargs).compiler_ir("stablehlo")
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
    with _assembler_output() as output:
        executable = device.client.compile(module, xla_client.DeviceList((device,)), options)
    stats = executable.get_compiled_memory_stats()
    return Compiled(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        host_temp_bytes=stats.host_temp_size_in_bytes,
        kernels=kernels_of("\n".join(output)),
        executable=executable,
    )


def _devices() -> Any:
    return topologies.get_topology_desc(platform="cuda", target_config=_TARGET, topology="1x1x1").devices


_ASSEMBLER = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def kernels_of(output: str) -> tuple[Kernel, ...]:
    """Reads the assembler's report (`ptxas -v`)."""
    return tuple(
        Kernel(match["name"], int(match["registers"]), int(match["stores"]), int(match["loads"]))
        for match in _ASSEMBLER.finditer(output)
    )


@contextlib.contextmanager
def _assembler_output() -> Iterator[list[str]]:
    """Makes Mosaic print what the assembler says, and catches what C++ writes to the process's own streams."""
    lines: list[str] = []
    variable = "MOSAIC_GPU_DUMP_PTXAS"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    streams = {number: os.dup(number) for number in (1, 2)}
    with tempfile.TemporaryFile() as file:
        for number in streams:
            os.dup2(file.fileno(), number)
        try:
            yield lines
        finally:
            for number, copy in streams.items():
                os.dup2(copy, number)
                os.close(copy)
            os.environ.pop(variable) if before is None else os.environ.update({variable: before})
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
