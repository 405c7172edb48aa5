"""Whether one key follows from another by what `jax.random` offers: a noise key that follows from a public one is public (S8).

Threefry is a block cipher and can be run backwards: the counter at which `parent` gives `child` is its decryption. For
`fold_in(parent, i)`, and for entry i of `split(parent, n)` whatever n, that is (0, i), so one decryption tries all 2^32
indices. For two unrelated keys it is any of 2^64 counters, and the check wrong once in 2^32. Only the older `split`, under
`jax_threefry_partitionable=False`, pairs halves of two blocks, and has to be searched.
"""

from __future__ import annotations

import jax
import numpy as np

from jaxdp._typing import Key
from jaxdp.noise_keys import Domain

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_SMALL = 4096  # indices tried where each costs a block
_SMALL_SPLIT = 256  # that many keys of an older `split`, where it is not in use

_Words = tuple[np.ndarray, np.ndarray]


def relation(child: Key, parent: Key, *, name: str) -> str | None:
    """How `child` follows from `parent`, as an expression in `name`; None if it does not in any way that is tried.

    Tried are `parent` itself; `fold_in` and entries of `split`, at any index; two of them in a row at indices below 4096; keys
    of jaxdp's noise; and the older `split` into up to 4096 keys where `jax_threefry_partitionable` is off, into up to 256
    elsewhere. Each half of a key of four words counts as a key.

    Args:
        child: One typed key, of any generator.
        parent: One typed key.
        name: What `parent` is called.
    """
    for own in _halves(child):
        for root in _halves(parent):
            found = _relation(own, root)
            if found is not None:
                return found.format(name)
    return None


def _halves(key: Key) -> list[_Words]:
    words = np.asarray(jax.random.key_data(key), np.uint32).reshape(-1, 2)
    return [(pair[:1], pair[1:]) for pair in words]


def _relation(child: _Words, parent: _Words) -> str | None:
    if all(np.array_equal(one, other) for one, other in zip(child, parent, strict=True)):
        return "{0} itself"
    high, low = (int(word[0]) for word in _decrypted(parent, *child))
    if high == 0:
        return f"jax.random.fold_in({{0}}, {low}), which is also split({{0}}, ...)[{low}]"
    if high in set(Domain):
        return f"the key {Domain(high).name} {low} of the noise of {{0}}"
    small = np.arange(_SMALL, dtype=np.uint32)
    high, low = _decrypted(_encrypted(parent, np.zeros_like(small), small), *child)
    hits = np.flatnonzero((high == 0) & (low < _SMALL))
    if hits.size:
        return f"jax.random.fold_in(jax.random.fold_in({{0}}, {hits[0]}), {low[hits[0]]})"
    most = _SMALL_SPLIT if jax.config.jax_threefry_partitionable else _SMALL  # type: ignore[attr-defined]
    return _older_split(child, parent, most)


def _older_split(child: _Words, parent: _Words, most: int) -> str | None:
    """Key j of n is (out[2j], out[2j + 1]), where out holds the first words of the blocks at (t, n + t), t < n, then the second."""
    at_once = max(1, 2**16 // most)
    t = np.arange(most, dtype=np.uint32)[None]
    for start in range(1, most + 1, at_once):
        n = np.arange(start, min(start + at_once, most + 1), dtype=np.uint32)[:, None]
        first, second = _encrypted(parent, np.broadcast_to(t, (len(n), most)), n + t)
        rows = np.flatnonzero(np.any(((first == child[0]) | (second == child[0])) & (t < n), axis=1))
        for row in rows:  # hardly ever
            count = int(n[row, 0])
            pairs = np.concatenate([first[row, :count], second[row, :count]]).reshape(-1, 2)
            hits = np.flatnonzero((pairs[:, 0] == child[0]) & (pairs[:, 1] == child[1]))
            if hits.size:
                return f"jax.random.split({{0}}, {count})[{hits[0]}], of the older kind"
    return None


def _schedule(key: _Words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return *key, key[0] ^ key[1] ^ _PARITY


def _encrypted(key: _Words, x: np.ndarray, y: np.ndarray) -> _Words:
    """The block of threefry2x32 at the counter (x, y), uint32."""
    keys = _schedule(key)
    x, y = x + keys[0], y + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (y << np.uint32(rotation) | y >> np.uint32(32 - rotation))
        x, y = x + keys[(group + 1) % 3], y + (keys[(group + 2) % 3] + np.uint32(group + 1))
    return x, y


def _decrypted(key: _Words, x: np.ndarray, y: np.ndarray) -> _Words:
    """The counter of the block (x, y)."""
    keys = _schedule(key)
    for group in reversed(range(5)):
        x, y = x - keys[(group + 1) % 3], y - (keys[(group + 2) % 3] + np.uint32(group + 1))
        for rotation in reversed(_ROTATIONS[group % 2]):
            y = x ^ y
            y = y >> np.uint32(rotation) | y << np.uint32(32 - rotation)
            x = x - y
    return x - keys[0], y - keys[1]
