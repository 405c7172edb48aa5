"""Every method of `clipped_grad` on every loss of the zoo equals the definition: one gradient per example, in a loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from tests.gradients.zoo import CASES, B, Case

pytestmark = pytest.mark.unoptimized
METHODS = ("two_pass", "book_keeping", "per_layer")
FEW = (
    "mlp_of_one_token",
    "logits_in_aux",
    "embedding_tied_to_the_head",
    "scan_over_layers_of_checkpoints",
    "recurrent_weight",
    "dropout_with_a_key_in_the_example",
)


@dataclasses.dataclass(frozen=True)
class Definition:
    """What each example contributes, found without `jaxdp`.

    Attributes:
        gradients: Of each leaf, `[B, *shape]` float64.
        loss: `[B]`.
        aux: `[B, ...]`, or None.
        finite: Bool `[B]`: the loss and the whole gradient are.
    """

    gradients: list[np.ndarray]
    loss: np.ndarray
    aux: Any
    finite: np.ndarray

    def norms(self, groups: Any) -> np.ndarray:  # [B, K]
        squares = np.zeros((B, len(groups.names)))
        for gradient, group in zip(self.gradients, groups.leaf_groups, strict=True):
            squares[:, group] += np.sum(gradient.reshape(B, -1) ** 2, axis=1)
        return np.sqrt(squares)

    def total(self, policy: Any, groups: Any, counts: np.ndarray) -> list[np.ndarray]:
        bounds = policy.clip_norms(groups).astype(np.float64)
        norms = np.where(counts[:, None], self.norms(groups), 0.0)
        if isinstance(policy, type(jaxdp.automatic())):
            factors = bounds / (norms + policy.gamma)
        else:
            factors = np.minimum(1.0, bounds / np.maximum(norms, 1e-300))
        return [
            np.einsum("b,b...->...", factors[counts, group], gradient[counts])
            for gradient, group in zip(self.gradients, groups.leaf_groups, strict=True)
        ]


@functools.cache
def definition(name: str) -> Definition:
    case = CASES[name]
    gradient = jax.jit(jax.value_and_grad(case.fun, has_aux=case.has_aux))
    rows = [gradient(case.params, jax.tree.map(lambda x, i=i: x[i], case.batch)) for i in range(B)]
    losses = [np.asarray(out[0] if case.has_aux else out, np.float64) for out, _ in rows]
    gradients = [
        np.stack([np.asarray(leaf, np.float64) for leaf in leaves])
        for leaves in zip(*(jax.tree.leaves(grads) for _, grads in rows), strict=True)
    ]
    aux = jax.tree.map(lambda *xs: np.stack(xs), *(out[1] for out, _ in rows)) if case.has_aux else None
    finite = np.isfinite(losses)
    for gradient in gradients:
        finite &= np.isfinite(gradient).reshape(B, -1).all(axis=1)
    return Definition(gradients, np.asarray(losses), aux, finite)


def middle(norms: np.ndarray) -> float:
    """A bound that clips some of the examples."""
    norms = np.sort(norms[norms > 0])
    return float(np.mean(norms[(len(norms) - 1) // 2 :][:2])) if len(norms) else 1.0


def policies(case: Case) -> dict[str, Any]:
    truth = definition(case.name)
    flat = jaxdp.flat(1.0)
    bound = middle(truth.norms(flat.groups(case.params))[truth.finite, 0])

    def per_layer(group_by: Any) -> Any:
        groups = jaxdp.per_layer(1.0, group_by=group_by).groups(case.params)
        norms = truth.norms(groups)[truth.finite]
        bounds = {group: middle(norms[:, k]) for k, group in enumerate(groups.names)}
        return jaxdp.per_layer(bounds, group_by=group_by)

    return {
        "flat": jaxdp.flat(bound),
        "automatic": jaxdp.automatic(bound),
        "quantile": jaxdp.quantile(bound),
        "per_layer_module": per_layer("module"),
        "per_layer_leaf": per_layer("leaf"),
    }


def strictness(case: Case) -> contextlib.AbstractContextManager[Any]:
    stack = contextlib.ExitStack()
    if case.lenient:
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
    return stack


def transformed(case: Case, policy: Any, method: Any, **options: Any) -> Any:
    return jaxdp.clipped_grad(case.fun, clipping=policy, has_aux=case.has_aux, method=method, **options)


def spoiled(batch: Any, row: int, value: float) -> Any:
    """The batch with every number of one row replaced; tokens and keys stay."""

    def spoil(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        x = np.array(x)
        x[row] = value
        return x

    return jax.tree.map(spoil, batch)


PADDED, NOT_FINITE = 1, 3


def check(case: Case, pairs: Any, **options: Any) -> None:
    """Pairs of a policy and a method, in one program: compiling takes most of the time.

    A whole batch, and one with a row of padding that holds infinities and a row that is NaN, against the definition.
    """
    pairs = list(pairs)
    grad_fns = [transformed(case, policy, method, **options) for policy, method in pairs]
    compiled = jax.jit(lambda *args, **kwargs: [grad_fn(*args, **kwargs) for grad_fn in grad_fns])
    truth = definition(case.name)
    damaged = spoiled(spoiled(case.batch, NOT_FINITE, np.nan), PADDED, np.inf)
    rows = np.arange(B)
    for batch, padding, counts in (
        (case.batch, np.zeros(B, bool), truth.finite),
        (damaged, rows == PADDED, truth.finite & (rows != PADDED) & (rows != NOT_FINITE)),
    ):
        found = compiled(case.params, batch, is_padding_example=padding)
        for (policy, method), clipped in zip(pairs, found, strict=True):
            compare(case, policy, method, padding, counts, *clipped)
    assert compiled._cache_size() == 1


def compare(case: Case, policy: Any, method: str, padding: Any, counts: Any, total: Any, not_private: Any) -> None:
    truth, groups, told = definition(case.name), policy.groups(case.params), f"{method}, {policy}"
    assert not_private.contributed.tolist() == counts.tolist(), told

    expected = truth.total(policy, groups, counts)
    assert jax.tree.structure(total) == jax.tree.structure(case.params)
    largest = max(np.max(np.abs(leaf), initial=0.0) for leaf in expected)
    for got, want in zip(jax.tree.leaves(total), expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=case.tolerance * largest, err_msg=told)

    norms = truth.norms(groups)[counts]
    atol = case.tolerance * np.max(norms, initial=0.0)
    np.testing.assert_allclose(np.asarray(not_private.l2_norms)[counts], norms, rtol=0, atol=atol, err_msg=told)
    assert not np.any(np.asarray(not_private.l2_norms)[padding]), told

    np.testing.assert_allclose(not_private.loss[counts], truth.loss[counts], rtol=case.tolerance, atol=1e-5)
    if case.has_aux:
        rows_of = functools.partial(jax.tree.map, lambda x: np.asarray(x)[counts])
        chex.assert_trees_all_close(rows_of(not_private.aux), rows_of(truth.aux), rtol=1e-5, atol=1e-5)


def with_methods(case: Case, *methods: str, policy: str = "flat") -> Any:
    """The policy for each method; `per_layer` is for policies whose groups are finished in the backward pass."""
    named = policies(case)
    layered = policy if policy.startswith("per_layer") else "per_layer_module"
    return [(named[layered if method == "per_layer" else policy], method) for method in methods]


@pytest.mark.parametrize("name", CASES)
def test_every_method_equals_the_definition(name):
    case = CASES[name]
    with strictness(case):
        check(case, with_methods(case, *METHODS))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("convolution")])
@pytest.mark.parametrize("method", ["vmap"])
def test_gradients_one_by_one_equal_the_definition(name, method):
    """XLA may share the kernel gradients of a batch of convolutions."""
    case = CASES[name]
    with strictness(case):
        check(case, with_methods(case, method))


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, "per_layer_leaf") for name in FEW), *((name, "per_layer_module") for name in FEW[:3])],
)
def test_groups_of_leaves_equal_the_definition(name, policy):
    methods = ("vmap", "two_pass", "book_keeping", *(["per_layer"] if policy == "per_layer_leaf" else []))
    check(CASES[name], with_methods(CASES[name], *methods, policy=policy))


@pytest.mark.parametrize("name", ["mlp_of_one_token", "scan_over_layers_of_checkpoints"])
def test_other_factors_equal_the_definition(name):
    """Of one norm each: what a method makes of them does not depend on how they were found."""
    named = policies(CASES[name])
    check(CASES[name], itertools.product([named["automatic"], named["quantile"]], ["two_pass", "book_keeping"]))


@pytest.mark.parametrize("name", FEW)
def test_microbatches_equal_the_definition(name):
    check(CASES[name], with_methods(CASES[name], "vmap", *METHODS, policy="flat"), microbatch_size=2)


@pytest.mark.parametrize("name", FEW)
def test_the_method_of_choice_equals_the_definition(name):
    named = policies(CASES[name])
    check(CASES[name], [(named[policy], "auto") for policy in ("flat", "per_layer_leaf")])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.must_not_copy])
def test_recognizable_uses_need_no_copy(name):
    case = CASES[name]
    with strictness(case):
        grad_fn = jaxdp.clipped_grad(case.fun, clipping=jaxdp.flat(1.0), has_aux=case.has_aux)
        table = grad_fn.explain(case.params, jax.tree.map(lambda x: x[0], case.batch))
    routes = {row.path: row.route for row in table.leaves}
    assert set(case.must_not_copy) <= set(routes)
    assert not [path for path in case.must_not_copy if routes[path] == "copy"], str(table)


def test_the_bounds_clip_some_examples_and_not_others():
    for name in FEW:
        case = CASES[name]
        policy = policies(case)["flat"]
        norms = definition(name).norms(policy.groups(case.params))[:, 0]
        assert 0 < np.sum(norms > policy.l2_clip_norm) < B
