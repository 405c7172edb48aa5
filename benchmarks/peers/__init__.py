"""The contenders of `benchmarks.dp_sgd`: non-private training, jaxdp and its peers, all computing the same step.

Each has a file, `with_<package>.py`; under the bare name, a file would stand in for its package where that is not installed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any

import jax

from benchmarks.harness import process_memory
from benchmarks.peers.trainer import Problem as Problem, Settings as Settings, Trainer as Trainer


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that trains.

    Attributes:
        name: Its name in tables and records.
        maker: `module:function` below `benchmarks.peers`, of type `(Problem, Settings) -> Trainer`.
        packages: The distributions whose versions matter.
        baseline: The name of the non-private contender in the same framework.
        peer: The peer that brings it; None if it always runs.
        imports: The modules without which it is skipped.
    """

    name: str
    maker: str
    packages: tuple[str, ...]
    baseline: str
    peer: str | None = None
    imports: tuple[str, ...] = ()

    @property
    def is_private(self) -> bool:
        return self.name != self.baseline

    def why_skipped(self) -> str | None:
        """The reason why it cannot run here; None if it can."""
        missing = [name for name in self.imports if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if "torch" in self.imports and jax.default_backend() != "cpu":
            return f"its PyTorch runs on the CPU here, and JAX on {jax.default_backend()}: not comparable"
        return None

    def make(self, problem: Problem, settings: Settings) -> Trainer:
        module, function = self.maker.split(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(problem, settings)


_JAX = ("jax", "jaxlib", "numpy", "optax")
_TORCH = ("torch", "opacus")

CONTENDERS = (
    Contender("non_private", "non_private:make", _JAX, "non_private"),
    Contender("jaxdp", "with_jaxdp:make", (*_JAX, "jaxdp"), "non_private"),
    Contender("optax", "with_optax:make", _JAX, "non_private", "optax", ("optax",)),
    Contender(
        "jax_privacy", "with_jax_privacy:make", (*_JAX, "jax-privacy"), "non_private", "jax_privacy", ("jax_privacy",)
    ),
    Contender("torch_non_private", "with_opacus:make_non_private", _TORCH, "torch_non_private", "opacus", _TORCH),
    Contender("opacus", "with_opacus:make", _TORCH, "torch_non_private", "opacus", _TORCH),
    Contender("opacus_ghost", "with_opacus:make_ghost", _TORCH, "torch_non_private", "opacus", _TORCH),
)

PEERS = tuple(dict.fromkeys(contender.peer for contender in CONTENDERS if contender.peer is not None))


def parse_peers(names: str) -> tuple[str, ...]:
    """Splits a comma-separated list of peers.

    Raises:
        ValueError: a peer does not exist.
    """
    peers = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise ValueError(f"there is no peer {', '.join(map(repr, unknown))}; the peers are {', '.join(PEERS)}.")
    return peers


def memory_alone(contender: Contender, problem: Problem, settings: Settings) -> dict[str, Any]:
    """The process memory of a contender's steps; to be called in a fresh process."""
    trainer = contender.make(problem, settings)
    if trainer.xla_memory is not None:
        trainer.xla_memory()  # compiles the step, which the steps then reuse: the compiler is not in the number
    return process_memory(trainer.step)
