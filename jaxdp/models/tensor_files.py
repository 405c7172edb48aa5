"""Tensors in safetensors files: read piece by piece into arrays that exist already, and written in shards.

Through the `safetensors` library with numpy; bfloat16 and float8 are the numpy types of `ml_dtypes`, which jax brings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file.

    Attributes:
        name: Its name in the file.
        path: The file.
        shape: As stored.
        dtype: As safetensors names it: `F32`, `BF16`.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    _rows: Any

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
        row_bytes = math.prod(self.shape[1:]) * self.float_dtype().itemsize
        step = max(1, PIECE_BYTES // max(1, row_bytes))
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            yield rows, self._rows[rows]

    def read_into(self, place: np.ndarray, *, is_transposed: bool = False) -> None:
        """Writes the tensor, or its transpose, into `place`, in the dtype of `place`."""
        for rows, stored in self.pieces():
            piece = stored.astype(place.dtype, copy=False)
            if is_transposed:
                place[:, rows] = piece.T
            else:
                place[rows] = piece


@contextlib.contextmanager
def open_tensors(paths: Iterable[Path]) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of several files by name, open for reading while the block lasts.

    Raises:
        ValueError: a file is truncated or is not safetensors, or two files hold one name.
    """
    with contextlib.ExitStack() as stack:
        tensors: dict[str, StoredTensor] = {}
        for path in paths:
            try:
                file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except (safetensors.SafetensorError, OSError, ValueError) as error:
                raise ValueError(
                    f"{path} is not a whole safetensors file ({error}); it may have been cut short on its way: copy or "
                    "download it again."
                ) from error
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in tensors:
                    raise ValueError(
                        f"tensor {name!r} is both in {tensors[name].path} and in {path}; remove the file that does not belong."
                    )
                rows = file.get_slice(name)
                shape, dtype = tuple(rows.get_shape()), rows.get_dtype()
                if dtype.startswith("F8"):
                    rows = _mapped(path, name, shape, dtype)
                tensors[name] = StoredTensor(name, path, shape, dtype, rows)
        yield tensors


def _mapped(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
    """A float8 tensor as it lies in the file: the library (0.8) looks for its dtype in numpy, where it is not.

    The format is fixed, and the library has checked it when this is called: the length of the header in 8 bytes, little
    endian, the header in JSON, and the tensors at offsets from its end.
    """
    if dtype not in FLOAT_DTYPES or 0 in shape:
        return None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, _ = json.loads(file.read(length))[name]["data_offsets"]
    return np.memmap(path, FLOAT_DTYPES[dtype], "r", offset=8 + length + start, shape=shape)


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
