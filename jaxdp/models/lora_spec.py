"""Which linear layers of a model carry a low-rank adapter, and of what rank."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping

from jaxdp import _validate

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters: y = x W + (alpha / rank) (x A) B, with A `[in, rank]` and B `[rank, out]`.

    Attributes:
        rank: Columns of A; `r` in PEFT.
        alpha: The adapter is scaled by alpha / rank; `lora_alpha` in PEFT.
        targets: Which linear layers: glob patterns of module paths (`blocks/attention/*`), bare names (`q`, `gate`, or as Hugging
            Face calls them: `q_proj`, `c_attn`), or `all-linear` for every one but the head over the vocabulary.

    Source: arXiv 2106.09685.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _validate.positive_integer("rank", self.rank))
        object.__setattr__(self, "alpha", _validate.positive("alpha", self.alpha))
        if isinstance(self.targets, str):
            raise TypeError(
                f"targets must be a tuple of patterns, got the string {self.targets!r}; write ({self.targets!r},)."
            )
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise ValueError(f"targets is empty: no layer would be adapted; name some, or use ({ALL_LINEAR!r},).")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def adapted(self, linears: Mapping[str, str]) -> frozenset[str]:
        """The module paths that carry an adapter.

        Args:
            linears: Path of each linear layer, such as `blocks/attention/q`, and its Hugging Face name, such as `q_proj`.

        Raises:
            ValueError: A target names no linear layer.
        """
        chosen: set[str] = set()
        for target in self.targets:
            found = {path for path, hf_name in linears.items() if _is_match(target, path, hf_name)}
            if not found:
                raise ValueError(
                    f"targets: {target!r} matches no linear layer; this model has {', '.join(sorted(linears))}, which Hugging "
                    f"Face calls {', '.join(sorted(set(linears.values())))}. Use one of these, a glob pattern, or {ALL_LINEAR!r}."
                )
            chosen |= found
        return frozenset(chosen)


def _is_match(target: str, path: str, hf_name: str) -> bool:
    if target == ALL_LINEAR:
        return path != "head/out"
    return any(fnmatch.fnmatchcase(name, target) for name in (path, path.rpartition("/")[2], hf_name))
