"""The folder of one run: which one to use, and files that are either whole or absent."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from jaxdp import _validate
from jaxdp._files import PRIVATE, write_whole

_CONFIG = "config.json"


def new_run_folder(out: Path | None, name: str) -> Path:
    """Makes the folder of a new run: `out`, or the first free one of `runs/<name>`, `runs/<name>-2`, ...

    Raises:
        FileExistsError: `out` holds something already; nothing is overwritten.
        OSError: the folder cannot be made or written.
    """
    if out is None:
        number = 1
        while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
    else:
        check_free(out)
        folder = out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write to the output folder {folder}: {error.strerror or error}; choose another --out."
        ) from error
    return folder


def check_free(folder: Path) -> None:
    """Raises FileExistsError if `folder` holds something already; nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not an empty folder; nothing was overwritten. Choose another --out, or go on "
            "with that run by --resume."
        )


def interrupted_run_folder(out: Path | None, name: str) -> Path:
    """The folder to resume: `out`, or the newest unfinished one of `runs/<name>*`.

    Raises:
        FileNotFoundError: there is none.
        FileExistsError: the run in `out` is complete.
    """
    if out is not None:
        if not (out / _CONFIG).is_file():
            raise FileNotFoundError(
                f"{out} holds no run to resume (it has no {_CONFIG}); run without --resume to start one."
            )
        if (out / "report.json").exists():
            raise FileExistsError(
                f"the run in {out} is complete, see {out / 'report.json'}; start a new one without --resume."
            )
        return out
    candidates = [
        path.parent
        for path in Path("runs").glob(f"{name}*/{_CONFIG}")
        if path.parent.name.removeprefix(name).removeprefix("-").isdigit() or path.parent.name == name
        if not (path.parent / "report.json").exists()
    ]
    if not candidates:
        raise FileNotFoundError(f"no interrupted run in runs/{name}*; run without --resume, or name one with --out.")
    return max(candidates, key=lambda folder: (folder / _CONFIG).stat().st_mtime)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    write_json(folder / _CONFIG, config)


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Refuses to resume under other settings: the same noise must meet the same batches (S8).

    Raises:
        ValueError: naming every setting that differs.
    """
    try:
        saved = json.loads((folder / _CONFIG).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {folder / _CONFIG}: {error}; start a new run in another folder.") from error
    if listing := _validate.differences(saved, config):
        raise ValueError(
            f"the run in {folder} was started with other settings ({listing}). Give the same settings to resume "
            "it, or start a new run in another folder."
        )


def write_json(path: Path, value: Any, *, mode: int = 0o666) -> None:
    """Writes JSON so that the file is whole or absent, whatever happens."""
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), mode=mode)


def write_report(folder: Path, report: dict[str, Any], curve: bytes) -> None:
    """Writes `curve.png` and last `report.json`, readable by their owner only: both hold losses of the training set (S15)."""
    write_whole(folder / "curve.png", curve, mode=PRIVATE)
    write_json(folder / "report.json", report, mode=PRIVATE)
