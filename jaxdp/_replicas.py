"""Checks of what runs in several copies at once: on the devices of a manual mesh axis, and in the processes of a group.

Inside `jax.shard_map` and `jax.pmap` a program runs once for each device, and in a group of processes
(`jax.distributed.initialize`) once for each process. Copies that should be one release must share its noise and its sample, and
a gradient that JAX sums over devices before the clip is that of several records. Both go wrong without a word, so they are
refused here, before any work.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

_JIT = (
    "Or leave the partition to jax.jit: give it arrays of the whole batch, placed with jax.sharding.NamedSharding, outside "
    "jax.shard_map."
)


# ---- devices of a manual axis


def manual_axes() -> tuple[str, ...]:
    """Axes of the `jax.shard_map` or `jax.pmap` that this is traced in."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def varying_axes(tree: Any) -> frozenset[str]:
    """Manual axes along which JAX knows that a leaf may differ; always empty under `check_vma=False`, where it does not look."""
    found: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            found |= jax.typeof(leaf).manual_axis_type.varying
    return found


def check_clipping(params: Any, batch: Any, *, method: str) -> None:
    """Refuses to clip where JAX would sum the gradients of several devices before the clip (S3, S22).

    The gradient of a value that is the same on all devices is summed over the devices whose results depend on it: over the records
    of other devices, if the batch varies along the axis and a parameter does not. Under `check_vma=False` and in `pmap` JAX
    keeps no such books, and gradients stay on their device.

    Raises:
        ValueError: batch and parameters vary along different axes, or `method` reads factors, which have no axes to vary along.
    """
    here = varying_axes(batch)
    for leaf in jax.tree.leaves(params):
        there = varying_axes(leaf)
        if there == here:
            continue
        axes = sorted(here ^ there)
        raise ValueError(
            f"inside jax.shard_map the batch varies along {sorted(here)} and a parameter along {sorted(there)}: JAX would sum "
            "gradients over devices before the clip, so that one record moves the sum by more than its sensitivity. Cast every "
            f"parameter first, jax.lax.pcast(params, {tuple(axes)!r}, to='varying'), use method='vmap', and sum what it "
            f"returns, which is then of each device's own records, with jax.lax.psum. {_JIT}"
        )
    if here and method != "vmap":
        raise ValueError(
            f"inside jax.shard_map with check_vma=True, as here along {sorted(here)}, only method='vmap' runs; got {method!r}. "
            f"{_JIT}"
        )


def check_released_once(name: str, value: Any = None) -> None:
    """Refuses to noise what differs from device to device (S7).

    Under one key all devices would draw the same noise, and the difference of two results would show both sums bare; under keys of
    their own the total would carry the noise of each.

    Args:
        name: What is called.
        value: What is noised. None if it would be clipped here as well: JAX may have summed gradients over devices before.

    Raises:
        ValueError: `value` varies along a manual axis, or nothing tells that it does not.
    """
    axes = manual_axes()
    unseen = [axis for axis in axes if value is None or axis not in varying_axes(lax.axis_index(axis))]
    varying = sorted(varying_axes(value))
    if not varying and not unseen:
        return
    why = (
        f"what it noises varies along {varying}"
        if varying
        else f"nothing tells whether it varies along {sorted(unseen)}"
    )
    raise ValueError(
        f"{name} was called on each device of a jax.shard_map or jax.pmap, and {why}: noise is drawn once for a release, of the "
        "sum over all devices. Return jax.lax.psum of the clipped sums, and noise it outside. "
        f"{_JIT}"
    )


# ---- processes of a group


def check_agreed(name: str, value: Any, *, remedy: str) -> None:
    """Refuses a value that is not the same in all processes of the group. All of them must get here.

    What the processes exchange, and compare, is a hash of 128 bits: the value may be secret, and no error shows it.

    Args:
        name: Of the argument.
        value: Anything with a `repr` that tells it apart and is the same in every process.
        remedy: What to do instead.

    Raises:
        ValueError: in every process, if two of them differ.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.blake2b(
        repr((name, value)).encode(), digest_size=16, key=b"jaxdp: values that must agree"
    ).digest()
    everywhere = np.asarray(multihost_utils.process_allgather(np.frombuffer(digest, np.uint32)))  # [processes, 4]
    if np.any(everywhere != everywhere[:1]):
        raise ValueError(f"{name} differs between the {jax.process_count()} processes of this group. {remedy}")


def check_noise_key(noise_key: jax.Array | None, **facts: Any) -> None:
    """Refuses to start a run in a group of processes on a noise key that they do not share (S7).

    Each would noise, and release, sums with noise of its own: the replicas part, and together they show more than was paid for.

    Args:
        noise_key: The key that was passed, None for one of the process's own.
        facts: What else must agree, by its name: keys, or values with a `repr` that tells them apart.

    Raises:
        ValueError: in a group of several processes, no key was passed, or they differ in the key or a fact.
    """
    if jax.process_count() == 1:
        return
    remedy = (
        "Draw one and share it before init: words = jax.experimental.multihost_utils.broadcast_one_to_all("
        "jax.random.key_data(jaxdp.secret_key())), then the key is jax.random.wrap_key_data(words, impl='threefry2x32') in "
        "every process."
    )
    if noise_key is None:
        raise ValueError(
            f"init without noise_key in one of {jax.process_count()} processes: each would draw a noise key of its own. {remedy}"
        )
    check_agreed("noise_key", _comparable(noise_key), remedy=remedy)
    for name, fact in facts.items():
        check_agreed(name, _comparable(fact), remedy="Make it the same in every process.")


def _comparable(fact: Any) -> Any:
    if isinstance(fact, jax.Array) and jnp.issubdtype(fact.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(fact)), np.asarray(jax.random.key_data(fact)).tolist()
    return fact


def check_sampling(seed: np.random.SeedSequence, facts: Any) -> None:
    """Refuses to sample in a group of processes from seeds or numbers that they do not share.

    A batch whose rows come from several draws may hold a record twice, which doubles its effect.

    Args:
        seed: Of the draws.
        facts: What else decides them, with a `repr`.

    Raises:
        ValueError: processes differ in seed or facts; in a group of several processes only.
    """
    if jax.process_count() == 1:
        return
    check_agreed(
        "rng",
        (np.ravel(np.asarray(seed.entropy, object)).tolist(), tuple(seed.spawn_key), facts),
        remedy="Every batch must be one draw that all processes share: make seed = np.random.SeedSequence(entropy) in each of "
        "them from one entropy, drawn once (np.random.SeedSequence().entropy) and sent to the others as secretly as the noise key, "
        "with the same plan and start_step; then let each process take its rows of every batch.",
    )
