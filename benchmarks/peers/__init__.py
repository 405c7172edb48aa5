"""The contenders of the benchmarks: non-private training, jaxdp and its peers, all computing the same step.

Each has a file, `with_<package>.py`; under the bare name, a file would stand in for its package where that is not installed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import jax

from benchmarks.harness import process_memory
from benchmarks.peers.trainer import Problem as Problem, Settings as Settings, Trainer as Trainer


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that trains.

    Attributes:
        name: Its name in tables and records.
        maker: `module:function` below `benchmarks.peers`, of type `(Problem, Settings, **options) -> Trainer`.
        packages: The distributions whose versions matter.
        baseline: The name of the non-private contender in the same framework.
        peer: The peer that brings it; None if it always runs.
        imports: The modules without which it is skipped.
        policy: How it clips; contenders of one policy compute one update.
        adds_noise: Whether it adds noise.
        is_tuned: Whether it runs at the fastest of several microbatch sizes.
        microbatch_size: Rows differentiated at once; None for all of them.
        options: Further keyword arguments of the maker.
    """

    name: str
    maker: str
    packages: tuple[str, ...]
    baseline: str
    peer: str | None = None
    imports: tuple[str, ...] = ()
    policy: Literal["none", "flat", "per_layer"] = "flat"
    adds_noise: bool = True
    is_tuned: bool = False
    microbatch_size: int | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def why_skipped(self) -> str | None:
        """The reason why it cannot run here; None if it can."""
        missing = [name for name in self.imports if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if "torch" in self.imports and jax.default_backend() != "cpu":
            return f"its PyTorch runs on the CPU here, and JAX on {jax.default_backend()}: not comparable"
        return None

    def with_microbatch_size(self, microbatch_size: int | None) -> Contender:
        return dataclasses.replace(self, microbatch_size=microbatch_size)

    def make(self, problem: Problem, settings: Settings) -> Trainer:
        module, function = self.maker.split(":")
        options = dict(self.options)
        if self.microbatch_size is not None:
            options["microbatch_size"] = self.microbatch_size
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(problem, settings, **options)


_JAX = ("jax", "jaxlib", "numpy", "optax")
_TORCH = ("torch", "opacus")

Method: TypeAlias = Literal["auto", "vmap", "two_pass", "book_keeping", "per_layer"]
METHODS: tuple[Method, ...] = ("auto", "vmap", "two_pass", "book_keeping", "per_layer")


def jaxdp_contender(
    method: str = "auto",
    *,
    policy: Literal["flat", "per_layer"] | None = None,
    adds_noise: bool = True,
    microbatch_size: int | None = None,
) -> Contender:
    """jaxdp by one method; `"per_layer"` clips each layer by itself, so its update is that of another mechanism."""
    policy = policy or ("per_layer" if method == "per_layer" else "flat")
    name = "jaxdp" if method == "auto" else f"jaxdp_{method}"
    return Contender(
        name if adds_noise else f"{name}_clip_only",
        "with_jaxdp:make",
        (*_JAX, "jaxdp"),
        "non_private",
        policy=policy,
        adds_noise=adds_noise,
        microbatch_size=microbatch_size,
        options=(("method", method), ("policy", policy), ("adds_noise", adds_noise)),
    )


NON_PRIVATE = Contender(
    "non_private", "non_private:make", _JAX, "non_private", policy="none", adds_noise=False, is_tuned=True
)

OTHERS = (
    Contender("optax", "with_optax:make", _JAX, "non_private", "optax", ("optax",)),
    Contender(
        "jax_privacy",
        "with_jax_privacy:make",
        (*_JAX, "jax-privacy"),
        "non_private",
        "jax_privacy",
        ("jax_privacy",),
        is_tuned=True,
    ),
    Contender(
        "torch_non_private",
        "with_opacus:make_non_private",
        _TORCH,
        "torch_non_private",
        "opacus",
        _TORCH,
        policy="none",
        adds_noise=False,
    ),
    Contender("opacus", "with_opacus:make", _TORCH, "torch_non_private", "opacus", _TORCH),
    Contender("opacus_ghost", "with_opacus:make_ghost", _TORCH, "torch_non_private", "opacus", _TORCH),
)

_Name = TypeVar("_Name", bound=str)

PEERS = tuple(dict.fromkeys(str(contender.peer) for contender in OTHERS))


def parse_names(text: str, known: Sequence[_Name], what: str) -> tuple[_Name, ...]:
    """Splits a comma-separated list of names.

    Raises:
        ValueError: a name is not among the known ones.
    """
    by_name: dict[str, _Name] = {name: name for name in known}
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"there is no {what} {', '.join(map(repr, unknown))}; the {what}s are {', '.join(known)}.")
    return tuple(by_name[name] for name in names)


def choose(
    peers: Sequence[str],
    methods: Sequence[Method] = (),
    *,
    microbatch_size: int | None = None,
    tune_jaxdp: bool = False,
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that run here, and peer -> reason for those that do not.

    Args:
        peers: Those of `PEERS` to run.
        methods: Those of `METHODS` that jaxdp runs by beside "auto".
        microbatch_size: Of jaxdp.
        tune_jaxdp: Whether jaxdp is tuned, too.
    """
    ours = [jaxdp_contender(microbatch_size=microbatch_size)]
    ours.append(jaxdp_contender(adds_noise=False, microbatch_size=microbatch_size))
    ours += [jaxdp_contender(method, microbatch_size=microbatch_size) for method in methods if method != "auto"]
    running = [NON_PRIVATE, *(dataclasses.replace(contender, is_tuned=tune_jaxdp) for contender in ours)]
    skipped: dict[str, str] = {}
    for contender in OTHERS:
        if contender.peer in peers:
            reason = contender.why_skipped()
            if reason is None:
                running.append(contender)
            else:
                skipped[str(contender.peer)] = reason
    return running, skipped


def memory_alone(contender: Contender, problem: Problem, settings: Settings) -> dict[str, Any]:
    """The process memory of a contender's steps; to be called in a fresh process."""
    trainer = contender.make(problem, settings)
    if trainer.xla_memory is not None:
        trainer.xla_memory()  # compiles the step, which the steps then reuse: the compiler is not in the number
    trainer.params()  # the parameters are there before the first step, too
    return process_memory(trainer.step)
