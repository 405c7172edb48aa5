"""Dense-layer kernels: per-example squared gradient norms, and the clipped sum with its noise.

A dense layer y = x @ w sees, for example b, inputs X_b `[T, D]` and output cotangents G_b `[T, P]`; its per-example gradient
is M_b = X_b^T G_b `[D, P]`. Every function takes `implementation`:

    None                    the automatic choice: a kernel where one can run and was measured to be faster
                            (`pallas_kernels.blocks.FASTER_FROM`), else XLA. Nothing has been measured on a GPU yet, so: XLA.
    "xla"                   plain JAX, the definition (`pallas_kernels.reference`); every device, every dtype below.
    "mosaic_gpu"            Pallas Mosaic GPU on a Hopper GPU; jax >= 0.11.2; bfloat16 or float16.
    "mosaic_gpu_interpret"  the same kernel emulated on the CPU, for tests; jax >= 0.11.

An implementation that is named runs or raises; there is no silent fallback. The functions are not differentiable and not
partitioned by `jit`: call them inside `custom_vjp` rules, and inside `shard_map` on several devices.

`jaxdp.clipped_grad` calls the three of them, and charges their `roundings` to the norms by which it clips.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import reference, support
from pallas_kernels.blocks import Blocks, blocks_of, measured_faster
from pallas_kernels.support import Implementation, Operand

KERNELS = ("gram_norms", "wgrad_norms", "clip_noise_dense")
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def chosen_implementation(
    kernel: str, x: Operand, g: Operand, implementation: Implementation | None = None
) -> Implementation:
    """The implementation that `kernel` runs on these operands, for a caller or a test that must know.

    Args:
        kernel: "gram_norms", "wgrad_norms" or "clip_noise_dense".
        x: `[B, T, D]`, an array or a `jax.ShapeDtypeStruct`: only shape and dtype matter.
        g: `[B, T, P]`.
        implementation: As in the module's docstring.

    Raises:
        ValueError: an unknown name, or operands that do not fit.
        NotImplementedError: the named implementation cannot run here; the message says why and what to do.
    """
    _check_kernel(kernel)
    _check_operands(x, g)
    if implementation is None:
        device_kind = support.target_device_kind()
        faster = measured_faster(kernel, device_kind, num_tokens=x.shape[1])
        return "mosaic_gpu" if faster and support.why_not("mosaic_gpu", x, g) is None else "xla"
    if implementation not in support.IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {support.IMPLEMENTATIONS}, nor None.")
    reason = support.why_not(implementation, x, g)
    if reason is not None:
        raise NotImplementedError(f"{kernel} cannot run with implementation={implementation!r}: {reason}.")
    return implementation


def roundings(kernel: str, x_shape: tuple[int, ...], g_shape: tuple[int, ...]) -> int:
    """The most roundings that a kernel makes one after another: what a caller that clips by its result charges (S4).

    With n of them, u = 2^-23, P_b = ||X_b||_F ||G_b||_F, and to first order in n u, whatever the operands:

        gram_norms          |result_b - ||M_b||^2|           <=  n u P_b^2
        wgrad_norms         |sqrt(result_b) - ||M_b|||       <=  n u P_b                 without `store`
        clip_noise_dense    ||sum - factors_b M_b||_F        <=  n u |factors_b| P_b     one example, no accumulator or noise

    A tensor core may truncate each sum, by up to u of it; other sums round to nearest, and are counted alike. Of several examples
    in one sum, each further one rounds the total once more, which belongs to no example. It depends on the block sizes, so
    on the device that is compiled for; and it says nothing of implementation "xla", whose order of summation is XLA's.

    Args:
        kernel: "gram_norms", "wgrad_norms" or "clip_noise_dense".
        x_shape: B, T and D.
        g_shape: B, T and P.
    """
    _check_kernel(kernel)
    from pallas_kernels.mosaic import clip_noise, gram, wgrad

    count = {"gram_norms": gram, "wgrad_norms": wgrad, "clip_noise_dense": clip_noise}[kernel].roundings
    blocks = blocks_of(kernel, support.target_device_kind())
    return count(x_shape[1], x_shape[2], g_shape[2], blocks=blocks)


def gram_norms(x: jax.Array, g: jax.Array, *, implementation: Implementation | None = None) -> jax.Array:
    """Squared norms ||X_b^T G_b||_F^2 by the Gram trick, sum_{t,s} <x_t, x_s> <g_t, g_s>.

    2 T^2 (D + P) FLOPs an example, which the kernel halves: it visits the tiles on and below the diagonal, and holds no
    T x T array. Cheaper than forming the gradient while T is below DP / (D + P), the kernel up to twice that.

    Guarantee: at least 0. The Grams are float32, and their rounding is *relative to ||X_b||_F^2 ||G_b||_F^2*: where the
    gradient cancels, a norm may come out too small. A caller that clips by it adds gamma ||X_b||_F^2 ||G_b||_F^2 before
    the root, or takes `wgrad_norms`, which has no such error (S4d); gamma is 2^-23 times the kernel's `roundings`.

    Args:
        x: Inputs of the layer, `[B, T, D]`, float32, bfloat16 or float16.
        g: Cotangents of its output, `[B, T, P]`.
        implementation: As in the module's docstring.

    Returns:
        Squared norms, `[B]` float32.

    Reference: Goodfellow, "Efficient per-example gradient computations" (arXiv 1510.01799), for T = 1; Li et al., "Large
    language models can be strong differentially private learners" (arXiv 2110.05679).
    """
    chosen = chosen_implementation("gram_norms", x, g, implementation)
    if chosen == "xla":
        return reference.gram_norms(*_one_dtype(x, g))
    from pallas_kernels.mosaic import gram

    return gram.gram_norms(x, g, **_launch("gram_norms", chosen))


def wgrad_norms(
    x: jax.Array,
    g: jax.Array,
    *,
    store: bool = False,
    dtype: Any = jnp.float32,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Squared norms ||X_b^T G_b||_F^2 by forming each gradient, and the gradients themselves if asked.

    2 T D P FLOPs an example. The kernel sums the squares of a tile while it stands in registers, so that without `store`
    it holds no `[B, D, P]` array. XLA does hold one.

    Guarantee: with `store`, the norms are those of the stored values after their rounding to `dtype` (S4b), so a factor
    computed from them bounds what is summed.

    Args:
        x: Inputs of the layer, `[B, T, D]`, float32, bfloat16 or float16.
        g: Cotangents of its output, `[B, T, P]`.
        store: Whether to return the gradients too.
        dtype: What the gradients are stored in, float32, bfloat16 or float16; of no effect without `store`.
        implementation: As in the module's docstring.

    Returns:
        Squared norms, `[B]` float32; with `store`, `(norms, gradients)`, the latter `[B, D, P]` of `dtype`.
    """
    if jnp.dtype(dtype) not in _DTYPES:
        raise ValueError(f"dtype={jnp.dtype(dtype)} is not float32, bfloat16 or float16.")
    chosen = chosen_implementation("wgrad_norms", x, g, implementation)
    if chosen == "xla":
        return reference.wgrad_norms(*_one_dtype(x, g), store=store, dtype=dtype)
    from pallas_kernels.mosaic import wgrad

    return wgrad.wgrad_norms(x, g, store=store, dtype=dtype, **_launch("wgrad_norms", chosen))


def clip_noise_dense(
    x: jax.Array,
    g: jax.Array,
    factors: jax.Array,
    *,
    accumulator: jax.Array | None = None,
    noise_stddev: float | jax.Array | None = None,
    key_data: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """accumulator + sum_b factors_b X_b^T G_b + noise_stddev * z, in one pass over the operands.

    Guarantee: factors are applied in float32 to float32 gradients, never to an operand that is rounded afterwards, so
    |factors_b| ||M_b|| bounds the contribution of example b to float32 rounding (S4c). An example with factors_b = 0
    contributes exactly zero, even if it holds NaN or infinity (S9). z is `counter_normal.standard_normal(key_data, (D, P))`:
    its random bits are the same on every implementation, device and block size.

    A logical step draws noise once (S7): accumulate its microbatches without noise, and give `noise_stddev` with the last
    one only. On several devices sum first; only the replica or the shard that finishes the sum draws.

    Args:
        x: Inputs of the layer, `[B, T, D]`, float32, bfloat16 or float16.
        g: Cotangents of its output, `[B, T, P]`.
        factors: Clip factors times any mask, `[B]` float32.
        accumulator: What earlier microbatches gave, `[D, P]` float32; None for zeros.
        noise_stddev: Standard deviation of the noise on the sum, a scalar; None for no noise.
        key_data: The noise key's two words, `[2]` uint32, of a threefry2x32 key (`jax.random.key_data`). Secret, and fresh
            for every sum (S8). Given if and only if `noise_stddev` is.
        implementation: As in the module's docstring.

    Returns:
        `[D, P]` float32.
    """
    chosen = chosen_implementation("clip_noise_dense", x, g, implementation)
    _check_array("factors", factors, (x.shape[0],), jnp.float32)
    if accumulator is not None:
        _check_array("accumulator", accumulator, (x.shape[2], g.shape[2]), jnp.float32)
    if (noise_stddev is None) != (key_data is None):
        given, missing = ("key_data", "noise_stddev") if noise_stddev is None else ("noise_stddev", "key_data")
        raise ValueError(f"{given} is given without {missing}; give both to add noise, or neither to accumulate.")
    if key_data is not None:
        _check_array("key_data", key_data, (2,), jnp.uint32)
    stddev = None if noise_stddev is None else jnp.asarray(noise_stddev, jnp.float32)
    if stddev is not None:
        _check_array("noise_stddev", stddev, (), jnp.float32)
    rest = {"accumulator": accumulator, "noise_stddev": stddev, "key_data": key_data}
    if chosen == "xla":
        return reference.clip_noise_dense(*_one_dtype(x, g), factors, **rest)
    from pallas_kernels.mosaic import clip_noise

    return clip_noise.clip_noise_dense(x, g, factors, **rest, **_launch("clip_noise_dense", chosen))


def _launch(kernel: str, chosen: Implementation) -> dict[str, Any]:
    blocks: Blocks = blocks_of(kernel, support.target_device_kind())
    return {"blocks": blocks, "interpret": chosen == "mosaic_gpu_interpret"}


def _check_kernel(kernel: str) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is not one of {KERNELS}.")


def _check_operands(x: Operand, g: Operand) -> None:
    if x.ndim != 3 or g.ndim != 3 or x.shape[:2] != g.shape[:2]:
        raise ValueError(f"x must be [B, T, D] and g [B, T, P] of one B and T; they are {x.shape} and {g.shape}.")
    for name, operand in (("x", x), ("g", g)):
        if operand.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {operand.dtype}; it must be float32, bfloat16 or float16.")


def _check_array(name: str, array: jax.Array, shape: tuple[int, ...], dtype: Any) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} must be {jnp.dtype(dtype)}{list(shape)}; it is {array.dtype}{list(array.shape)}.")


def _one_dtype(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (x, g) if x.dtype == g.dtype else (x.astype(jnp.float32), g.astype(jnp.float32))
