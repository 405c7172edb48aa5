"""What a zeroth-order run must keep to itself, and find again after a kill (S8).

One file, whole before the first step: whatever happens later, one noise key meets one sequence of batches. It is never part of
a trajectory. Losses lie beside it: they are private (S15).
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp._files import sync_folder, write_whole
from jaxdp._typing import Key
from jaxdp.noise import secret_key

_FILE, _PROGRESS = "run.json", "progress.f64"


class RunSecrets(NamedTuple):
    """What all processes of one run share.

    Attributes:
        noise_key: Of the run.
        sampling_entropy: Of the `SeedSequence` that draws its batches.
        data_sha256: Of its training set. It could confirm a guess of the data.
        head_tokens: Tokens of a sequence whose logits exist at once. Public, as the next, and here for company: another number
            could change the last bit of a sum, and the same noise must not meet two sums.
        num_at_once: Low-rank directions that pass at once.
        is_split: Whether blocks travel in stages.
    """

    noise_key: Key
    sampling_entropy: int
    data_sha256: str
    head_tokens: int
    num_at_once: int
    is_split: bool

    def __repr__(self) -> str:
        return "RunSecrets(...)"


def draw(data_sha256: str, head_tokens: int, num_at_once: int, *, is_split: bool) -> RunSecrets:
    """Fresh ones, from the operating system's entropy."""
    return RunSecrets(secret_key(), secrets.randbits(128), data_sha256, head_tokens, num_at_once, is_split)


def write(folder: Path, found: RunSecrets) -> None:
    """Writes them to a folder that only its owner can read, whole or not at all."""
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    content = json.dumps(
        {
            "noise_key": [int(word) for word in np.asarray(jax.random.key_data(found.noise_key))],
            "sampling_entropy": str(found.sampling_entropy),
            "data_sha256": found.data_sha256,
            "head_tokens": found.head_tokens,
            "num_at_once": found.num_at_once,
            "is_split": found.is_split,
        }
    )
    write_whole(folder / _FILE, content.encode(), mode=0o600)
    sync_folder(folder)
    sync_folder(folder.parent)


def read(folder: Path) -> RunSecrets | None:
    """Those of a run to go on with; None if it was killed before it had any, and so before its first step.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        stored: dict[str, Any] = json.loads(path.read_text())
        words = jnp.asarray(np.asarray(stored["noise_key"], np.uint32))
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        numbers = (int(stored[name]) for name in ("head_tokens", "num_at_once"))
        return RunSecrets(
            key, int(stored["sampling_entropy"]), stored["data_sha256"], *numbers, is_split=bool(stored["is_split"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); the run cannot go on: start a new one in another folder."
        ) from None


class ProgressFile:
    """Loss and seconds of every step, 16 bytes each. It may lag behind the journal: nothing depends on it."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        """Opens the file with what it has of the first `num_steps` steps; what is missing is NaN."""
        path = folder / _PROGRESS
        stored = path.read_bytes() if path.exists() else b""
        rows = np.frombuffer(stored[: len(stored) // 16 * 16], np.float64).reshape(-1, 2)[:num_steps]
        missing = np.full((num_steps - len(rows), 2), np.nan)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.ftruncate(self._descriptor, rows.nbytes)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        os.write(self._descriptor, missing.tobytes())
        rows = np.concatenate([rows, missing])
        self.losses = [float(loss) for loss in rows[:, 0]]
        known = rows[np.isfinite(rows[:, 1]), 1]
        self.wall_seconds = float(known[-1]) if len(known) else 0.0

    def append(self, loss: float, wall_seconds: float) -> None:
        """One more step."""
        os.write(self._descriptor, np.array([loss, wall_seconds]).tobytes())

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)
