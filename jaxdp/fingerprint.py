"""What tells one set of parameters from another."""

from __future__ import annotations

import hashlib

import jax
import numpy as np

from jaxdp import _validate
from jaxdp._typing import Params


def fingerprint(params: Params) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes of all leaves, as hexadecimal digits; of arrays on the host.

    A leaf that is no array and has the shape and dtype of one is read row by row, as it is iterated over: the digits are those of
    the array, which is never whole in memory.
    """
    digest = hashlib.sha256()
    for name, leaf in _validate.named_leaves(params):
        digest.update(repr((name, leaf.shape, str(leaf.dtype))).encode())
        for array in (leaf,) if isinstance(leaf, np.ndarray | np.generic | jax.Array) else leaf:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
