"""Whether a run trains what it should: every trainable leaf moves, and no frozen leaf does.

An adapter that never enters the forward pass trains without an error, and without an effect. So the function is asked
before the run which leaves it reads, and the parameters are compared after the first updates. They are released anyway:
the comparison costs no privacy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxdp import _validate
from jaxdp.clipping import ClippingPolicy
from jaxdp.fingerprint import fingerprint
from jaxdp.gradients import clipped_grad
from jaxdp.models.lazy_stack import LazyStack


@dataclasses.dataclass(frozen=True)
class UpdateCheck:
    """What the comparison found.

    Attributes:
        step: After how many steps the parameters were compared with those before the run.
        unmoved: Trainable leaves that are still the same, bit for bit.
        moved: Frozen leaves that are not.
        non_finite: Trainable leaves with a NaN or an infinite entry at the end.
    """

    step: int
    unmoved: tuple[str, ...]
    moved: tuple[str, ...]
    non_finite: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        found = []
        if self.unmoved:
            found.append(
                f"after {self.step} steps these trainable parameters have not moved at all: {_some(self.unmoved)}. Nothing is "
                "learned there: raise --learning-rate, or stop the run and look for the reason."
            )
        if self.moved:
            found.append(
                f"frozen parameters have moved: {_some(self.moved)}. This is a bug of jaxdp: please report it."
            )
        if self.non_finite:
            found.append(
                f"the run diverged: {_some(self.non_finite)} hold NaN or infinity. Lower --learning-rate; note that this run "
                "spent its epsilon all the same."
            )
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "compared_after_step": self.step,
            "unmoved_trainable": list(self.unmoved),
            "moved_frozen": list(self.moved),
            "non_finite": list(self.non_finite),
            "warnings": self.warnings(),
        }


def refuse_unused(
    loss_fn: Callable[[Any, Any, Any], Any], clipping: ClippingPolicy, trainable: Any, frozen: Any, data: Any
) -> None:
    """Refuses a function that does not read every trainable leaf; nothing is computed.

    Args:
        loss_fn: `loss_fn(trainable, example, frozen)`.
        clipping: The policy of the run.
        trainable: Arrays or shapes.
        frozen: Arrays or shapes.
        data: The training set, arrays `[n, ...]`.

    Raises:
        ValueError: naming the leaves.
    """

    def shape(leaf: Any, skip: int = 0) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(leaf)[skip:], leaf.dtype)

    # The frozen arrays travel inside the example: as constants of the function they would have to be computed.
    example = (jax.tree.map(lambda leaf: shape(leaf, 1), data), jax.tree.map(shape, frozen))
    grad_fn = clipped_grad(lambda params, pair: loss_fn(params, *pair), clipping=clipping)
    explanation = grad_fn.explain(jax.tree.map(shape, trainable), example)
    unused = [leaf.path for leaf in explanation.leaves if leaf.route == "unused"]
    if unused:
        raise ValueError(
            f"the loss does not depend on the trainable parameters {_some(unused)}, so that a run would add noise to them and "
            "nothing else; train other ones, by --tune or --lora-targets."
        )


def compare(trainable: Any, params: Any, frozen: Any, frozen_now: Any, *, step: int) -> UpdateCheck:
    """Compares, leaf by leaf, what was trained for `step` steps.

    Args:
        trainable: The trainable parameters before the run.
        params: The same after `step` steps.
        frozen: The frozen parameters as they were read.
        frozen_now: The same as the step sees them, some of them in a narrower dtype.
        step: How many.
    """
    moved = [
        name
        for (name, old), new in zip(_validate.named_leaves(frozen), jax.tree.leaves(frozen_now), strict=True)
        if not _same(np.asarray(old).astype(new.dtype), new)
    ]
    pairs = zip(_validate.named_leaves(trainable), jax.tree.leaves(params), strict=True)
    return UpdateCheck(step, tuple(name for (name, old), new in pairs if _same(old, new)), tuple(moved))


def digests(params: Any) -> dict[str, str]:
    """A fingerprint of every leaf, where the leaves themselves are too large to keep."""
    return {name: fingerprint({name: leaf}) for name, leaf in _validate.named_leaves(params)}


def compare_digests(before: dict[str, str], params: Any, *, step: int) -> UpdateCheck:
    """`compare` from the fingerprints of the trainable parameters before the run."""
    after = digests(params)
    return UpdateCheck(step, tuple(name for name, found in before.items() if after[name] == found), ())


def with_non_finite(check: UpdateCheck, params: Any) -> UpdateCheck:
    """`check`, with the leaves of the final parameters that are not finite."""
    named = _validate.named_leaves(params)
    return dataclasses.replace(check, non_finite=tuple(name for name, leaf in named if not _is_finite(leaf)))


def _is_finite(leaf: Any) -> bool:
    arrays = leaf if isinstance(leaf, LazyStack) else (leaf,)
    return all(np.all(np.isfinite(np.asarray(array).astype(np.float32))) for array in arrays)


def _same(old: Any, new: Any) -> bool:
    first, second = (np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in (old, new))
    return np.array_equal(first, second)  # by bits: a NaN that stays has not moved


def _some(names: Sequence[str], *, limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
