"""Clipped sum -> noised sum: secret keys, the division of noise between groups, and the Gaussian and Laplace draws."""

from __future__ import annotations

import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Key
from jaxdp.noise_keys import leaf_keys
from pallas_kernels import counter_normal


def secret_key() -> Key:
    """Returns a noise key with fresh entropy from the operating system (S8).

    Keep it secret: who knows the key can subtract the noise. Nothing logs it; a checkpoint that holds it is secret too.
    The key has 64 bits (threefry2x32).
    """
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(secrets.token_bytes(8), np.uint32)), impl="threefry2x32")


def standard_normal(key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draws from N(0, 1) whose tails reach 9 standard deviations.

    `jax.random.normal` inverts the distribution at 23 random bits, and so ends at 5.2: any release beyond that would prove
    that a record is present, with a probability over a run far above usual deltas. This inverts it at 63 bits and a sign,
    both from one block of the cipher: `pallas_kernels.counter_normal`, which the kernels share.

    Args:
        key: One typed key. It serves this draw alone: folded or split as well, it would repeat words of the draw (S8).
        shape: Shape of the result.
        dtype: float32 or float64.
    """
    words = _key_words(key)
    if dtype == jnp.float32:
        return counter_normal.standard_normal(words, shape)
    return _wide_normal_of_bits(*counter_normal.bits(words, shape), dtype)


def _wide_normal_of_bits(high: jax.Array, low: jax.Array, dtype: Any) -> jax.Array:
    lower_tail = ((high >> 1).astype(dtype) + (low.astype(dtype) + 0.5) * 2.0**-32) * 2.0**-32  # in (0, 1/2]
    magnitude = -jax.scipy.special.ndtri(lower_tail)
    return jnp.where(high & 1, magnitude, -magnitude)


def standard_laplace(key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draws from the Laplace law of scale 1, density e^-|x| / 2, whose tails reach 44 scales.

    Inverted at 63 bits and a sign, both from one block of the cipher, as `standard_normal` is: with U uniform on (0, 1),

        |X| = -log U,        of which U below 1/2 decides the tail and 1 - U, exact too, decides the body

    so that no magnitude from 1e-19 to 44.4 is rounded by more than a few units in its last place, none is zero, and a magnitude
    beyond the end has probability 2^-64.

    Args:
        key: One typed key. It serves this draw alone (S8).
        shape: Shape of the result.
        dtype: float32 or float64.
    """
    return _laplace_of_bits(*counter_normal.bits(_key_words(key), shape), dtype)


def _laplace_of_bits(high: jax.Array, low: jax.Array, dtype: Any) -> jax.Array:
    def fraction(high: jax.Array, low: jax.Array) -> jax.Array:
        return ((high >> 1).astype(dtype) + (low.astype(dtype) + 0.5) * 2.0**-32) * 2.0**-31  # in (0, 1]

    tail, body = fraction(high, low), fraction(~high, ~low)  # U and 1 - U: the bits turned over, and nothing cancels
    magnitude = jnp.where(tail < 0.5, -jnp.log(tail), -jnp.log1p(-body))
    return jnp.where(high & 1, magnitude, -magnitude)


def _key_words(key: Key) -> jax.Array:
    if str(jax.random.key_impl(key)) != "threefry2x32":
        return jax.random.bits(key, (2,), jnp.uint32)
    return jax.random.key_data(key)


def allocate_stddevs(
    clip_norms: jax.Array, sizes: tuple[int, ...], *, noise_multiplier: float, allocation: str
) -> jax.Array:
    """Divides one Gaussian mechanism between K groups: the noise std s_k of each, on the scale of the sum (S5).

    **Guarantee**: sum_k C_k^2 / s_k^2 = 1 / noise_multiplier^2, so the joint release of all groups is one Gaussian
    mechanism of that noise multiplier.

        global         s_k   = sigma * sqrt(sum_j C_j^2)
        equal_budget   s_k   = sigma * sqrt(K) * C_k
        least_energy   s_k^2 = sigma^2 * C_k / sqrt(d_k) * sum_j C_j sqrt(d_j)

    Args:
        clip_norms: C_k, `[K]`.
        sizes: d_k, the number of parameters of each group.
        noise_multiplier: sigma.
        allocation: One of the names above.

    Returns:
        s_k, `[K]`; zeros for a noise multiplier of zero, whatever the clip norms.
    """
    if noise_multiplier == 0:
        return jnp.zeros_like(clip_norms)
    if allocation == "global":
        largest = jnp.max(clip_norms)  # scaled, so that squares neither overflow nor vanish
        return jnp.full_like(
            clip_norms, noise_multiplier * largest * jnp.sqrt(jnp.sum(jnp.square(clip_norms / largest)))
        )
    if allocation == "equal_budget":
        return noise_multiplier * np.sqrt(len(sizes)).item() * clip_norms
    if allocation == "least_energy":
        root_sizes = jnp.sqrt(jnp.asarray(sizes, clip_norms.dtype))
        return noise_multiplier * jnp.sqrt(clip_norms / root_sizes * jnp.sum(clip_norms * root_sizes))
    raise ValueError(f"unknown noise allocation {allocation!r}.")


def laplace_stddevs(clip_norms: jax.Array, *, noise_multiplier: float) -> jax.Array:
    """sqrt(2) b C, the std of Laplace noise of scale b C; zero for a noise multiplier b of zero, whatever the clip norm."""
    if noise_multiplier == 0:
        return jnp.zeros_like(clip_norms)
    return np.sqrt(2).item() * noise_multiplier * clip_norms


def add_noise(clipped_sum: Any, stddevs: jax.Array, leaf_groups: tuple[int | tuple[int, ...], ...], *, key: Key) -> Any:
    """Adds one independent N(0, s_k^2) draw to every entry of every leaf of group k.

    Noise is drawn and added in the dtype of the sum, float32 or wider. Each leaf has its own stream, keyed by its position
    in the pytree, so the draw depends on the key alone: every replica that holds the key adds the same noise.

    Args:
        clipped_sum: Pytree of float32 or float64 arrays.
        stddevs: s_k, `[K]`.
        leaf_groups: The group index of each leaf; a tuple holds that of each slice along its leading axis.
        key: Fresh for each sum; two different sums must never be noised with one key (S8). `noise_keys` has what is derived
            from it.

    Raises:
        TypeError: a leaf is narrower than float32.
    """
    _validate.typed_key("key", key)
    leaves, treedef = jax.tree.flatten(clipped_sum)
    noised = []
    for index, (leaf, group, own_key) in enumerate(zip(leaves, leaf_groups, leaf_keys(key, len(leaves)), strict=True)):
        if leaf.dtype.itemsize < 4:
            raise TypeError(
                f"leaf {index} of the clipped sum has dtype {leaf.dtype}; add noise in float32 or wider, then cast."
            )
        draw = standard_normal(own_key, leaf.shape, leaf.dtype)
        scale = stddevs[jnp.asarray(group)].astype(leaf.dtype)  # of the leaf, or of each of its layers
        noised.append(leaf + scale.reshape(scale.shape + (1,) * (leaf.ndim - scale.ndim)) * draw)
    return treedef.unflatten(noised)


def add_laplace_noise(clipped_sum: Any, scale: jax.Array, *, key: Key) -> Any:
    """Adds one Laplace draw to the one number of `clipped_sum`, in its dtype, float32 or wider.

    **Guarantee**: if one example moves the number by at most C, the release is C / scale-differentially private, with delta = 0.
    There is no such function for more numbers: the L2 norm that their examples are clipped to does not bound what counts here,
    the L1 norm.

    Args:
        clipped_sum: Pytree of one float32 or float64 array with one entry.
        scale: b C, a scalar.
        key: Fresh for each sum; two different sums must never be noised with one key (S8).

    Raises:
        ValueError: there are several numbers.
        TypeError: the number is narrower than float32.
    """
    _validate.typed_key("key", key)
    leaves, treedef = jax.tree.flatten(clipped_sum)
    if sum(leaf.size for leaf in leaves) != 1:
        raise ValueError(
            f"Laplace noise is for one number, and the clipped sum has {[leaf.shape for leaf in leaves]}; use Gaussian noise."
        )
    noised = []
    for index, leaf in enumerate(leaves):
        if leaf.dtype.itemsize < 4:
            raise TypeError(
                f"leaf {index} of the clipped sum has dtype {leaf.dtype}; add noise in float32 or wider, then cast."
            )
        noised.append(leaf + scale.astype(leaf.dtype) * standard_laplace(key, leaf.shape, leaf.dtype))
    return treedef.unflatten(noised)
