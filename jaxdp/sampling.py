"""Poisson batches of examples on the host, padded to one shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from jaxdp import _replicas, _validate
from jaxdp._typing import Batch


class SamplingNumbers(Protocol):
    """What a sampler reads from a `PrivacyPlan`."""

    @property
    def num_examples(self) -> int: ...
    @property
    def sampling_prob(self) -> float: ...
    @property
    def padded_batch_size(self) -> int: ...
    @property
    def num_steps(self) -> int: ...


def poisson_indices(plan: SamplingNumbers, seed: np.random.SeedSequence, step: int) -> np.ndarray:
    """The indices of the examples of one step, `[padded_batch_size]` int64, padded with -1.

    Each example enters independently with probability q; a draw above `padded_batch_size` keeps a uniformly random subset
    (S10). The result is a function of (`seed`, `step`) alone, so any step can be drawn again.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, step))))
    # A Binomial(N, q) size and a uniform subset of that size: the same law as N coin flips, in O(qN) memory.
    size = min(int(rng.binomial(plan.num_examples, plan.sampling_prob)), plan.padded_batch_size)
    indices = np.full(plan.padded_batch_size, -1, np.int64)
    indices[:size] = rng.choice(plan.num_examples, size, replace=False, shuffle=False)
    return indices


def poisson_batches(
    source: Any,
    plan: SamplingNumbers,
    rng: np.random.Generator | np.random.SeedSequence,
    *,
    start_step: int = 0,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Draws the batches of a plan: truncated Poisson sampling, padded to a fixed shape.

    **Guarantee**: each example enters each batch independently with probability `plan.sampling_prob`, up to the truncation
    that the plan accounts for. This is the sampling that the plan's epsilon assumes; shuffled epochs are not (S10). The
    amplification holds while nobody learns who was sampled, so `rng` is as secret as the noise key.

    Args:
        source: The training set: an array `[N, ...]`; a tuple, dict or other pytree of arrays `[N, ...]`; or any sequence
            with `__len__` and `__getitem__` whose items are examples (a list, a Hugging Face data set, a grain source).
        plan: Owner of the sampling numbers; `len(source)` must equal its `num_examples`.
        rng: `np.random.default_rng()` for a run that need not be resumed. To resume, pass the same
            `np.random.SeedSequence` and `start_step`; keep its `entropy` with the checkpoint. With another seed a restarted run is
            sound, its noise follows its batches (S8); but it is not the same run, and steps that were released before count again.
        start_step: The first step to draw; `state.ledger.num_steps` after a restart. Left out, the first draws come a second time:
            the noise is then another one, but epsilon assumes a draw of its own for every step.

    Yields:
        `num_steps - start_step` pairs of a batch, pytree of `[padded_batch_size, ...]` arrays with zeros in the padding
        rows, and `is_padding_example`, bool `[padded_batch_size]`. An empty draw is all padding, and a step like any other.

    Raises:
        ValueError: the source is empty, has another length than the plan, or its examples differ in shape; the processes of a group
            (`jax.distributed`) differ in `rng`, the plan's numbers or `start_step`: a batch is one draw that all of them share.
    """
    start_step = _validate.nonnegative_integer("start_step", start_step)
    if start_step > 0 and isinstance(rng, np.random.Generator):
        raise ValueError(
            f"start_step={start_step} with a Generator: a resumed run must draw the batches of the first run again, or steps that "
            "were released already would be released a second time. Start the run with seed = np.random.SeedSequence(), keep "
            "seed.entropy with the checkpoint, and resume with np.random.SeedSequence(entropy)."
        )
    seed = _seed_sequence(rng)
    _replicas.check_sampling(seed, (plan.num_examples, plan.sampling_prob, plan.padded_batch_size, start_step))
    rows = _Rows(source)
    if rows.num_examples != plan.num_examples:
        raise ValueError(
            f"source has {rows.num_examples} examples and the plan was made for num_examples={plan.num_examples}; the sampling "
            "probability and epsilon depend on it: make the plan with num_examples=len(source)."
        )
    return _draw(rows, plan, seed, start_step)


def _draw(rows: _Rows, plan: SamplingNumbers, seed: np.random.SeedSequence, start_step: int) -> Iterator[Any]:
    for step in range(start_step, plan.num_steps):
        indices = poisson_indices(plan, seed, step)
        yield rows.take(indices), indices < 0


def _seed_sequence(rng: Any) -> np.random.SeedSequence:
    if isinstance(rng, np.random.SeedSequence):
        return rng
    if isinstance(rng, np.random.Generator):
        return np.random.SeedSequence([int(word) for word in rng.integers(0, 2**32, size=8, dtype=np.uint64)])
    raise TypeError(
        f"rng must be a np.random.Generator or np.random.SeedSequence, got {rng!r} of type {type(rng).__name__}; use "
        "np.random.default_rng() for fresh entropy: a small fixed seed can be guessed, and with it who was sampled."
    )


class _Rows:
    """Examples by index, from columns or from a sequence, stacked and padded with zeros."""

    def __init__(self, source: Any):
        if not hasattr(source, "__getitem__") and (hasattr(source, "__iter__") or jax.tree_util.all_leaves([source])):
            raise TypeError(
                f"source must be a pytree of arrays or a sequence with __len__ and __getitem__, got {type(source).__name__}; "
                "Poisson sampling needs random access: load an iterable data set into a list first."
            )
        self._source = source
        self._columns: Any = None
        if isinstance(source, np.ndarray | jax.Array | tuple | dict) or not hasattr(source, "__getitem__"):
            self._columns = jax.tree.map(np.asarray, source)
            leaves = jax.tree.leaves(self._columns)
            empty = not leaves or any(leaf.ndim > 0 and len(leaf) == 0 for leaf in leaves)
            self.num_examples = 0 if empty else _validate.batch_axis(self._columns, name="source")
        else:
            self.num_examples = len(source)
        if self.num_examples == 0:
            raise ValueError("source is empty: there is no example to sample.")
        if self._columns is None:
            self._template = self._as_arrays(source[0])
        if isinstance(
            source, list
        ):  # in memory: complain now, and not in the step that happens to draw the odd example
            for example in source:
                self._check(self._as_arrays(example))

    @staticmethod
    def _as_arrays(example: Any) -> Any:
        # Lists inside an example are data (token ids), not pytree nodes.
        arrays = jax.tree.map(np.asarray, example, is_leaf=lambda x: isinstance(x, list))
        for name, leaf in _validate.named_leaves(arrays):
            if leaf.dtype == object or leaf.dtype.kind in "USM":
                raise TypeError(
                    f"example leaf {name!r} has dtype {leaf.dtype}, which cannot enter a JAX function; tokenize text, and "
                    "pad ragged lists to one length."
                )
        return arrays

    def take(self, indices: np.ndarray) -> Batch:
        chosen = indices[indices >= 0]
        if self._columns is not None:
            return jax.tree.map(lambda column: self._pad(column[chosen], len(indices)), self._columns)
        fetch_many = getattr(self._source, "__getitems__", None)  # Hugging Face data sets read many rows at once
        rows = [int(i) for i in chosen]
        raw = fetch_many(rows) if fetch_many is not None and rows else [self._source[i] for i in rows]
        examples = [self._as_arrays(example) for example in raw]
        return jax.tree.map(
            lambda *leaves: self._stack(leaves, len(indices)), self._template, *map(self._check, examples)
        )

    def _check(self, example: Any) -> Any:
        if jax.tree.structure(example) != jax.tree.structure(self._template):
            raise ValueError(
                f"examples differ in structure: the first is {jax.tree.structure(self._template)}, another is "
                f"{jax.tree.structure(example)}; give every example the same fields."
            )
        expected = _validate.named_leaves(self._template)
        for (name, first), leaf in zip(expected, jax.tree.leaves(example), strict=True):
            if leaf.shape != first.shape:
                raise ValueError(
                    f"examples are ragged: leaf {name!r} has shape {first.shape} in the first example and {leaf.shape} in "
                    "another; pad or crop every example to one shape."
                )
            if leaf.dtype != first.dtype:
                raise ValueError(
                    f"examples differ in type: leaf {name!r} is {first.dtype} in the first example and {leaf.dtype} in another; "
                    "convert every example to one type."
                )
        return example

    @staticmethod
    def _stack(leaves: tuple[np.ndarray, ...], size: int) -> np.ndarray:
        first, *chosen = leaves
        out = np.zeros((size, *first.shape), first.dtype)
        for row, leaf in enumerate(chosen):
            out[row] = leaf
        return out

    @staticmethod
    def _pad(chosen: np.ndarray, size: int) -> np.ndarray:
        out = np.zeros((size, *chosen.shape[1:]), chosen.dtype)
        out[: len(chosen)] = chosen
        return out
