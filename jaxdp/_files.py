"""Files that are whole or absent, and on the disk when the call returns."""

from __future__ import annotations

import os
from pathlib import Path

#: Of a file that its owner alone may read.
PRIVATE = 0o600


def write_whole(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Writes a file so that it is whole or absent, whatever happens; it has `mode`, less the umask, before it has content."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(
        missing_ok=True
    )  # of a write that was cut off: another mode may be on it, and another's descriptor open
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
