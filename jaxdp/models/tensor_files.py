"""Tensors in safetensors files: read piece by piece into arrays that exist already, and written in shards.

The `safetensors` library checks a file and writes one. Tensors are read here, from where the header says that they lie: a mapped
file would count as memory of the process, and the library (0.8) looks for float8 in numpy, where it is not. bfloat16 and float8
are the numpy types of `ml_dtypes`, which jax brings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxdp.models.folders import write_json

#: A tensor passes through memory in pieces of this size: reading one costs no second copy of it, and it is transposed in cache.
PIECE_BYTES = 1 << 18

FLOAT_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


class OpenFile:
    """A file that is read here and there, for as long as something refers to it.

    **Guarantee**: what is read is the file that was opened. One that takes its place under the same name, as a download or
    `save_model` puts it there, changes nothing; one that is written into is refused, as far as its size or time of change tell.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        self._as_opened = self._stamp()

    def read(self, offset: int, num_bytes: int) -> np.ndarray:
        """Some of its bytes, as uint8."""
        found = np.empty(num_bytes, np.uint8)
        start = 0
        while start < num_bytes:
            count = os.preadv(self._descriptor, [found[start:].data], offset + start)
            if count == 0:
                raise self._changed()
            start += count
        return found

    def check_unchanged(self) -> None:
        """Refuses a file that was written into since it was opened."""
        if self._stamp() != self._as_opened:
            raise self._changed()

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _changed(self) -> ValueError:
        return ValueError(
            f"{self.path} was written into while it was being read, so that its tensors may belong to two models; put the file in "
            "order, and start again."
        )


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file.

    Attributes:
        name: Its name in the file.
        file: The file.
        shape: As stored.
        dtype: As safetensors names it: `F32`, `BF16`.
        offset: Where it begins, in bytes.
    """

    name: str
    file: OpenFile
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.file.path

    def float_dtype(self) -> np.dtype:
        """The numpy dtype.

        Raises:
            ValueError: the tensor is not of a floating-point type: quantized weights, say.
        """
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"tensor {self.name!r} in {self.path} has dtype {self.dtype}, which is no weight in floating point "
                f"({', '.join(FLOAT_DTYPES)}); take the unquantized model."
            )
        return FLOAT_DTYPES[self.dtype]

    def pieces(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Consecutive rows, at most `PIECE_BYTES` of them at a time, and where they start and stop."""
        dtype = self.float_dtype()
        row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        step = max(1, PIECE_BYTES // max(1, row_bytes))
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            flat = self.file.read(self.offset + start * row_bytes, (rows.stop - start) * row_bytes)
            yield rows, flat.view(dtype).reshape(-1 if row_bytes else rows.stop - start, *self.shape[1:])
        self.file.check_unchanged()

    def read_into(self, place: np.ndarray, *, is_transposed: bool = False) -> None:
        """Writes the tensor, or its transpose, into `place`, in the dtype of `place`."""
        for rows, stored in self.pieces():
            piece = stored.astype(place.dtype, copy=False)
            if is_transposed:
                place[:, rows] = piece.T
            else:
                place[rows] = piece


def stored_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of several files by name. A file stays open for as long as one of its tensors is referred to.

    Raises:
        ValueError: a file is truncated or is not safetensors, or two files hold one name.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in _tensors_in(path):
            if tensor.name in tensors:
                raise ValueError(
                    f"tensor {tensor.name!r} is both in {tensors[tensor.name].path} and in {path}; remove the file that does not "
                    "belong."
                )
            tensors[tensor.name] = tensor
    return tensors


@contextlib.contextmanager
def open_tensors(paths: Iterable[Path]) -> Iterator[dict[str, StoredTensor]]:
    """`stored_tensors`, for as long as the block lasts."""
    tensors = stored_tensors(paths)
    files = [tensor.file for tensor in tensors.values()]
    try:
        yield tensors
    finally:
        for file in files:
            file.close()


def _tensors_in(path: Path) -> list[StoredTensor]:
    """The tensors of one file, by the names' order.

    The format is fixed, and the library checks it: the length of the header in 8 bytes, little endian, the header in JSON, and the
    tensors at offsets from its end.
    """
    try:
        file = OpenFile(path)
        with safetensors.safe_open(path, framework="numpy"):
            pass
        start = 8 + int.from_bytes(file.read(0, 8).tobytes(), "little")
        header = json.loads(file.read(8, start - 8).tobytes())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it may have been cut short on its way: copy or "
            "download it again."
        ) from error
    header.pop("__metadata__", None)
    return [
        StoredTensor(name, file, tuple(entry["shape"]), entry["dtype"], start + entry["data_offsets"][0])
        for name, entry in sorted(header.items())
    ]


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file, as PyTorch's tools expect it.

    Raises:
        OSError: the disk is full, say.
    """
    # The library takes the memory of an array as it lies, whatever its strides say.
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(mode)  # the library (0.8) makes files that their owner alone can read, whatever the umask


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int) -> None:
    """Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` and an index, as Hugging Face names them.

    Args:
        folder: An empty folder.
        tensors: Names and arrays. They are taken one by one and dropped when their shard is written.
        max_shard_bytes: A shard is closed before it grows past this; a larger tensor has a shard of its own.
    """
    names: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def close_shard() -> None:
        write_tensors(folder / f"{len(names)}.safetensors", shard)
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > max_shard_bytes:
            close_shard()
        shard[name] = tensor
        total += tensor.nbytes
    close_shard()

    if len(names) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, in_shard in enumerate(names):
        shard_name = f"model-{i + 1:05}-of-{len(names):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / shard_name)
        weight_map |= dict.fromkeys(in_shard, shard_name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
