"""Image classification data sets that are on the machine already: nothing here touches the network."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """A training set, which privacy protects, and a test set, which it does not.

    Attributes:
        name: As in `--dataset`.
        train_images: uint8, `[N, H, W]`; divide by `max_pixel`.
        train_labels: int32, `[N]`.
        test_images: uint8, `[M, H, W]`.
        test_labels: int32, `[M]`.
        max_pixel: The value of a full pixel.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    max_pixel: int

    @property
    def num_classes(self) -> int:
        return 10

    def fingerprint(self) -> str:
        """SHA-256 of the training set: a resumed run must see the same data (S8)."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels):
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def load_digits() -> ImageDataset:
    """scikit-learn's bundled handwritten digits, 8 x 8: 1,437 for training and 360 for testing by a fixed public shuffle."""
    from sklearn import datasets  # slow to import

    bunch: Any = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images, labels = bunch.images[order].astype(np.uint8), bunch.target[order].astype(np.int32)
    return ImageDataset("digits", images[:1437], labels[:1437], images[1437:], labels[1437:], max_pixel=16)


def load_mnist(folder: Path) -> ImageDataset:
    """MNIST from the four IDX files in `folder`, gzipped or not: 60,000 for training and 10,000 for testing, 28 x 28.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not IDX, is truncated, or the parts do not belong together; the message names it.
    """
    parts = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(_find(folder, f"{stem}-images-idx3-ubyte"))
        labels = read_idx(_find(folder, f"{stem}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or images.shape[1:] != (28, 28):
            raise ValueError(
                f"the {part} files in {folder} do not fit each other: images {images.shape}, labels {labels.shape}; expected "
                "[N, 28, 28] and [N]. Get both from one copy of MNIST."
            )
        if len(labels) and labels.max() > 9:
            raise ValueError(f"the {part} labels in {folder} go up to {labels.max()}, expected digits 0 to 9.")
        parts[part] = images, labels.astype(np.int32)
    return ImageDataset("mnist", *parts["train"], *parts["test"], max_pixel=255)


def _find(folder: Path, stem: str) -> Path:
    for name in (stem, stem + ".gz"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has neither {stem} nor {stem}.gz; point --data-dir at the four MNIST IDX files.")


def read_idx(path: Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, gzipped if its name ends in `.gz`.

    Raises:
        ValueError: it is not such a file, or holds fewer or more bytes than its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise ValueError(
            f"cannot read {path}: {error}; the download is probably incomplete, get the file again."
        ) from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes (it starts with {data[:4].hex()!r}).")
    rank = data[3]
    header = 4 + 4 * rank
    if len(data) < header:
        raise ValueError(f"{path} ends inside its header; the download is probably incomplete, get the file again.")
    shape = struct.unpack(f">{rank}I", data[4:header])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(data) - header != expected:
        raise ValueError(
            f"{path} announces shape {shape}, {expected} bytes, and holds {len(data) - header}; the download is probably "
            "incomplete, get the file again."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
