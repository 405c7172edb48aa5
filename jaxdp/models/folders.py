"""Folders of the Hugging Face kind: their JSON files, and files that reach a folder all together or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def existing_folder(folder: str | os.PathLike[str], *, what: str, remedy: str) -> Path:
    """Returns `folder` as a path.

    Args:
        folder: The path given.
        what: What the folder is, for the message: `model`.
        remedy: The end of the message.

    Raises:
        FileNotFoundError: there is nothing at this path.
        NotADirectoryError: it is a file.
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"the {what} folder {path} does not exist; {remedy}")
    if not path.is_dir():
        raise NotADirectoryError(f"the {what} folder {path} is a file; {remedy}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is not UTF-8, not JSON, or not an object; the message says where.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); repair it, or copy it again from where the folder came."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__}, expected an object {{...}}; copy it again from where the folder came."
        )
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_names(folder: Path, *, limit: int = 8) -> str:
    """What a folder holds, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") if names else "nothing"


@contextlib.contextmanager
def placed_together(
    folder: str | os.PathLike[str], *, last: tuple[str, ...], stale: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Yields an empty folder; what is written there moves into `folder` when the block ends well.

    Everything is written before the first file of `folder` is touched, so a full disk, or any other error in the block,
    leaves `folder` as it was. The moves are renames within one file system. A machine that stops between two of them
    leaves none of `last`, so that nobody takes a mixture for a whole. Files of `folder` that are neither replaced nor stale
    stay.

    Args:
        folder: Where the files go; it is made, with its parents, if missing.
        last: The files without one of which the others are not read: removed first, moved in last.
        stale: Glob patterns of files of an earlier content, which are removed.

    Raises:
        OSError: the folder cannot be written; the message says what became of the old files.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    kept = "nothing was left behind" if is_new else "the files that were there are untouched"
    staging, is_moving = None, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the folder, not beside it: a mounted folder is a file system of its own, and renames stay within one.
        staging = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=folder))
        yield staging
        is_moving, kept = True, f"move the files that are still in {staging} yourself"
        _move_all(staging, folder, last=last, stale=stale)
        staging.rmdir()
    except OSError as error:
        message = f"cannot write {folder}: {error.strerror or error}; {kept}. Free space, or give another folder"
        raise (OSError(error.errno, message) if error.errno else OSError(message)) from error
    finally:
        # Once the moves began, what is still here is the only whole copy.
        if staging is not None and not is_moving:
            shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # only an empty folder goes
                folder.rmdir()


def _move_all(staging: Path, folder: Path, *, last: tuple[str, ...], stale: tuple[str, ...]) -> None:
    for pattern in (*last, *stale):
        for path in folder.glob(pattern):
            path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name in last):
        path.replace(folder / path.name)
