"""Where each implementation can run: the one place that asks for versions, features and devices."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

#: What the choice depends on: arrays or their shapes.
Operand: TypeAlias = jax.Array | jax.ShapeDtypeStruct
Implementation = Literal["xla", "mosaic_gpu", "mosaic_gpu_interpret"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

_MOSAIC_DTYPES = (jnp.bfloat16, jnp.float16)  # wgmma multiplies float32 as TF32 only, which is another tensor (S4a)
_INTERPRET_NEEDS = (0, 11)
_GPU_NEEDS = (0, 11, 2)


def why_not(implementation: Implementation, x: Operand, g: Operand) -> str | None:
    """Why `implementation` cannot run here on these operands, with the remedy; None if it can."""
    return why_not_on(implementation, x, g) or why_not_here(implementation)


def why_not_on(implementation: Implementation, x: Operand, g: Operand) -> str | None:
    """Why `implementation` cannot run on these operands anywhere."""
    if implementation == "xla":
        return None
    for name, operand in (("x", x), ("g", g)):
        if operand.dtype not in _MOSAIC_DTYPES:
            return f"{name} has dtype {operand.dtype}; it needs bfloat16 or float16, or implementation='xla'"
        if operand.dtype != x.dtype:
            return f"x has dtype {x.dtype} and g {operand.dtype}; cast both to one dtype, or use implementation='xla'"
        if 0 in operand.shape:
            return f"{name} has the empty shape {operand.shape}; use implementation='xla'"
    return None


def why_not_here(implementation: Implementation) -> str | None:
    """Why `implementation` cannot run with this JAX on this device, whatever the operands."""
    if implementation == "xla":
        return None
    needs = _INTERPRET_NEEDS if implementation == "mosaic_gpu_interpret" else _GPU_NEEDS
    if jax.__version_info__ < needs:
        least = ".".join(map(str, needs))
        return f"jax is {jax.__version__}; install jax>={least} (Python 3.12 or newer), or use implementation='xla'"
    if implementation == "mosaic_gpu" and not _is_hopper(target_device_kind()):
        return (
            f"the device is {target_device_kind()!r}; it needs a Hopper GPU such as the H100 or H200 (compute capability "
            "9.0), or implementation='xla', or 'mosaic_gpu_interpret' to test on the CPU"
        )
    return None


def target_device_kind() -> str:
    """The kind of device that is compiled for: the one that the context mesh names, else JAX's default device."""
    abstract_device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if abstract_device is None else abstract_device.device_kind


def _is_hopper(device_kind: str) -> bool:
    return re.search(r"\bG?H(20|100|200|800)\b", device_kind) is not None
