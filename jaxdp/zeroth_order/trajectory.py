"""A run as its scalars: a journal that survives a kill, and the parameters again from the base model and the journal.

A run is its base parameters, its direction key, its recipe (what turns scalars into updates), and for each step the projected
gradients and the learning rate. That is a few bytes a step, whatever the size of the model (arXiv 2305.17333, section 2.1).

File: 8 bytes of magic, the length of a header, the header as JSON, its CRC-32; then records of one size, each a kind, the
index of the step, the learning rate, K projected gradients, and the CRC-32 of everything before it. All little-endian.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdp import _validate
from jaxdp._files import sync_folder
from jaxdp.block_model import BlockParams
from jaxdp.checkpointing import plan_to_json
from jaxdp.fingerprint import fingerprint
from jaxdp.mechanism import PrivacyPlan
from jaxdp.zeroth_order.directions import words_of
from jaxdp.zeroth_order.training import DeferredState, State, Steps
from jaxdp.zeroth_order.updates import Scalars

_MAGIC = b"jaxdpzo1"
_STEP, _FLUSH = 0, 1


@dataclasses.dataclass(frozen=True)
class Header:
    """What a run is, besides its scalars.

    Attributes:
        direction_words: Of the direction key, two integers. Public.
        base: Fingerprint of the parameters before the first step.
        recipe: `Steps.recipe`.
        privacy: The numbers of the plan, whose noise is in the scalars; None for a run without one.
        about: Whatever else helps to find the base model and to make its functions again; JSON.
    """

    direction_words: tuple[int, int]
    base: str
    recipe: dict[str, Any]
    privacy: dict[str, Any] | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """One step, or a flush in front of the step of that index.

    Attributes:
        step: Index of the step.
        learning_rate: Of the step.
        projected_gradients: float32 `[K]`.
        is_flush: Whether it is a flush, whose scalars mean nothing. With `write_every` above 1 in a narrow dtype, when a block is
            written decides how it is rounded.
    """

    step: int
    learning_rate: np.float32
    projected_gradients: np.ndarray
    is_flush: bool = False


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The contents of a journal.

    Attributes:
        header: What the run is.
        records: Its complete records.
        num_bytes: Length of the journal up to the last complete record; what follows was being written when the run was killed.
    """

    header: Header
    records: tuple[Record, ...]
    num_bytes: int

    @property
    def num_steps(self) -> int:
        """How many steps it holds."""
        return sum(not record.is_flush for record in self.records)


class Journal:
    """Appends to a trajectory; every record is on the disk when `append` returns.

    Opened by `create` or `resume`; a context manager.
    """

    def __init__(self, path: Path, descriptor: int, checksum: int, num_directions: int) -> None:
        self._path, self._descriptor, self._checksum, self._num_directions = path, descriptor, checksum, num_directions

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Header) -> Journal:
        """A new journal.

        Raises:
            FileExistsError: there is one; it is a run, and is not overwritten.
        """
        path = Path(path)
        written = _encoded_header(header)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _write(descriptor, written)
        sync_folder(path.parent)
        return cls(path, descriptor, zlib.crc32(written), _num_directions(header))

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> tuple[Journal, Trajectory]:
        """The journal of a run to go on with, without the record that a kill may have cut off.

        Raises:
            ValueError: as in `read_trajectory`.
        """
        path = Path(path)
        trajectory = read_trajectory(path)
        descriptor = os.open(path, os.O_RDWR)
        os.ftruncate(descriptor, trajectory.num_bytes)
        os.lseek(descriptor, 0, os.SEEK_END)
        checksum = zlib.crc32(path.read_bytes())
        return cls(path, descriptor, checksum, _num_directions(trajectory.header)), trajectory

    def append(self, step: int, scalars: Scalars) -> None:
        """Writes what step `step` reported."""
        gradients = np.asarray(scalars.projected_gradients, np.float32)
        if gradients.shape != (self._num_directions,):
            raise ValueError(
                f"the journal {self._path} holds {self._num_directions} projected gradients a step, got {gradients.shape}."
            )
        self._append(_STEP, step, float(scalars.learning_rate), gradients)

    def append_flush(self, step: int) -> None:
        """Writes that the run was flushed in front of step `step`."""
        self._append(_FLUSH, step, 0.0, np.zeros(self._num_directions, np.float32))

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _append(self, kind: int, step: int, learning_rate: float, gradients: np.ndarray) -> None:
        body = struct.pack("<BIf", kind, step, learning_rate) + gradients.astype("<f4").tobytes()
        checksum = zlib.crc32(body, self._checksum)
        written = body + struct.pack("<I", checksum)
        _write(self._descriptor, written)
        self._checksum = zlib.crc32(struct.pack("<I", checksum), checksum)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_trajectory(path: str | os.PathLike[str]) -> Trajectory:
    """Reads a journal. A record that is cut off at the end is left out: its step was in flight.

    Raises:
        ValueError: it is no journal, or a record inside it is damaged.
    """
    path = Path(path)
    content = path.read_bytes()
    if content[:8] != _MAGIC:
        raise ValueError(f"{path} is not a jaxdp trajectory: it begins with {content[:8]!r}.")
    (length,) = struct.unpack_from("<I", content, 8) if len(content) >= 12 else (0,)
    begin = 12 + length + 4
    if len(content) < begin or zlib.crc32(content[: begin - 4]) != struct.unpack_from("<I", content, begin - 4)[0]:
        raise ValueError(
            f"the header of {path} is damaged; the run cannot be read from it. Start again from the base model."
        )
    header = json.loads(content[12 : 12 + length])
    header = Header(**header | {"direction_words": tuple(header["direction_words"])})
    K = _num_directions(header)
    size = struct.calcsize("<BIf") + 4 * K + 4
    records = []
    at, checksum = begin, zlib.crc32(content[:begin])
    while at + size <= len(content):
        body = content[at : at + size - 4]
        checksum = zlib.crc32(body, checksum)
        (stored,) = struct.unpack_from("<I", content, at + size - 4)
        if stored != checksum:
            if at + 2 * size > len(content):
                break  # the last record, half on the disk
            raise ValueError(
                f"record {len(records)} of {path} is damaged: its checksum is {stored:08x}, not {checksum:08x}. The run can "
                f"be read up to there: cut the file to {at} bytes."
            )
        checksum = zlib.crc32(content[at + size - 4 : at + size], checksum)
        kind, step, learning_rate = struct.unpack_from("<BIf", body)
        gradients = np.frombuffer(body, "<f4", offset=struct.calcsize("<BIf")).astype(np.float32)
        records.append(Record(step, np.float32(learning_rate), gradients, kind == _FLUSH))
        at += size
    return Trajectory(header, tuple(records), at)


def header_of(steps: Steps, base: BlockParams, direction_key: Any, *, about: dict[str, Any] | None = None) -> Header:
    """The header of a run that begins with `steps.init(base, direction_key=direction_key)`."""
    first, second = (int(word) for word in np.asarray(words_of(direction_key)))
    privacy = None if steps.plan is None else _plan_to_json(steps.plan)
    return Header((first, second), fingerprint(base), steps.recipe, privacy, about or {})


def replayed(steps: Steps, state: State, trajectory: Trajectory) -> State | DeferredState:
    """The state of the run after the last record, from its base model: the same bits as when it ran.

    Args:
        steps: Of `make_step` with the run's recipe; placement, estimator and learning rate may differ.
        state: Of `steps.init` with the base parameters and the run's direction key.
        trajectory: The journal.

    Raises:
        ValueError: the recipe, the key, the base parameters or, if `steps` has one, the plan are not the run's. Steps without a
            plan replay any run, and cannot go on with its privacy.
    """
    header = trajectory.header
    if steps.plan is not None:
        expected, found = plan_to_json(steps.plan), header.privacy or {}
        if listing := _validate.differences({name: found.get(name) for name in expected}, expected):
            raise ValueError(
                f"the trajectory has another plan ({listing}); give make_step the run's, or none to replay only."
            )
    if header.recipe != steps.recipe:
        raise ValueError(
            f"the trajectory has another recipe: {_validate.differences(header.recipe, steps.recipe)}; give make_step the run's."
        )
    words = tuple(int(word) for word in np.asarray(state.direction_words))
    if words != header.direction_words:
        raise ValueError(f"the trajectory has direction key {header.direction_words}, and the state {words}.")
    if state.step != 0:
        raise ValueError(f"state is at step {state.step}; give that of init with the base parameters.")
    found = fingerprint(state.params_in_place())
    if found != header.base:
        raise ValueError(
            f"the base parameters have fingerprint {found[:16]}…, and the trajectory's {header.base[:16]}…."
        )
    current: State | DeferredState = state
    for record in trajectory.records:
        if record.step != current.step:
            raise ValueError(f"the trajectory goes on with step {record.step}, where step {current.step} belongs.")
        if record.is_flush:
            current = steps.flush(current)
        else:
            scalars = Scalars(jnp.asarray(record.projected_gradients), jnp.asarray(record.learning_rate))
            current = steps.replay(current, scalars)
    return current


def _plan_to_json(plan: PrivacyPlan) -> dict[str, Any]:
    return plan_to_json(plan) | {"num_steps": plan.num_steps, "target_delta": plan.target_delta}


def _encoded_header(header: Header) -> bytes:
    text = json.dumps(dataclasses.asdict(header), sort_keys=True).encode()
    begin = _MAGIC + struct.pack("<I", len(text)) + text
    return begin + struct.pack("<I", zlib.crc32(begin))


def _num_directions(header: Header) -> int:
    return _validate.positive_integer("num_directions", header.recipe["num_directions"])


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
