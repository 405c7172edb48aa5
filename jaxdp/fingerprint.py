"""What tells one set of parameters from another."""

from __future__ import annotations

import hashlib

import numpy as np

from jaxdp import _validate
from jaxdp._typing import Params


def fingerprint(params: Params) -> str:
    """SHA-256 of the names, shapes, dtypes and bytes of all leaves, as hexadecimal digits; of arrays on the host."""
    digest = hashlib.sha256()
    for name, leaf in _validate.named_leaves(params):
        digest.update(repr((name, leaf.shape, str(leaf.dtype))).encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
