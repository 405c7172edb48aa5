"""`clipped_grad`: `jax.grad` for a loss of one example, summed over a batch after clipping each example."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import NeighboringRelation

from jaxdp import _replicas, _validate
from jaxdp._typing import Batch, LossFn, Params
from jaxdp.clipping import ClippedSum, ClippingPolicy, check_policy
from jaxdp.gradients import couplings, jaxprs
from jaxdp.gradients.explanation import Explanation, explain
from jaxdp.gradients.kernels import check_implementation, check_runs_here
from jaxdp.gradients.methods import Method, Problem, check_method, choose_method, run_method
from jaxdp.gradients.microbatches import scan_microbatches
from jaxdp.gradients.plan import make_plan
from pallas_kernels import Implementation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NotPrivate:
    """Per-example values of one step. They are the data: look at them, and never publish them or feed them back (S15).

    Rows of padding hold zeros.

    Attributes:
        loss: The loss of each example, `[B]`.
        l2_norms: The gradient norm of each example in each clipping group before the clip, `[B, K]`.
        contributed: Bool `[B]`: False for padding and for examples with a non-finite loss or gradient.
        aux: What `fun` returned beside the loss with `has_aux=True`, stacked to `[B, ...]`; else None.
    """

    loss: jax.Array
    l2_norms: jax.Array
    contributed: jax.Array
    aux: Any

    def mean_loss(self) -> jax.Array:
        """Mean loss of the examples that contributed; NaN if none did."""
        total = jnp.sum(jnp.where(self.contributed, self.loss, 0.0))
        return total / jnp.sum(self.contributed).astype(total.dtype)


@dataclasses.dataclass(frozen=True)
class ClippedGrad:
    """The function that `clipped_grad` returns; call it as `grad_fn(params, batch, is_padding_example=...)`."""

    fun: LossFn
    clipping: ClippingPolicy
    has_aux: bool
    microbatch_size: int | None
    method: Method
    implementation: Implementation | None = None

    def __call__(
        self,
        params: Params,
        batch: Batch,
        *,
        is_padding_example: Any = None,
        clip_norms: Any = None,
    ) -> tuple[Params, NotPrivate]:
        """Returns the sum of the clipped per-example gradients, and the per-example values.

        Args:
            params: Pytree of floating-point arrays.
            batch: Pytree of arrays `[B, ...]`: examples stacked along the first axis.
            is_padding_example: Bool `[B]`, True for rows that are no example; None if every row is one.
            clip_norms: `[K]`, the current clip norms of an adaptive policy; None for the policy's own.

        Returns:
            The sum, with the shapes of `params` in float32 or wider, un-noised and therefore private; and `NotPrivate`.
        """
        clipped, not_private = self.clipped_sum(
            params, batch, is_padding_example=is_padding_example, clip_norms=clip_norms
        )
        return clipped.value, not_private

    def sensitivity(self, relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE) -> float:
        """L2 bound on the change of the sum when one record changes in the sense of `relation`, at the policy's clip norms.

        C = sqrt(sum_k C_k^2) when a record is added, removed, or replaced by one that contributes nothing; 2C when it is
        replaced by another (S1).
        """
        return self.clipping.total_l2_clip_norm * (2.0 if relation == NeighboringRelation.REPLACE_ONE else 1.0)

    def clipped_sum(
        self, params: Params, batch: Batch, *, is_padding_example: Any = None, clip_norms: Any = None
    ) -> tuple[ClippedSum, NotPrivate]:
        """As `__call__`, with the clipped sum as the mechanism takes it."""
        check_runs_here(self.implementation)
        _validate.floating_params(params)
        size = _validate.batch_axis(batch)
        is_padding = _validate.padding_mask(is_padding_example, size)
        groups = self.clipping.groups(params)
        norms = self.clipping.clip_norms(groups) if clip_norms is None else clip_norms
        norms = jnp.asarray(norms, jnp.float32)
        if norms.shape != (len(groups.names),):
            raise ValueError(
                f"clip_norms must have shape ({len(groups.names)},), one for each group, got {norms.shape}."
            )
        _replicas.check_clipping(params, batch, method=self.method)
        self._check_fun(params, batch)
        params = jax.tree.map(jnp.asarray, params)

        def on_rows(rows: Batch, rows_are_padding: jax.Array) -> tuple[ClippedSum, NotPrivate]:
            problem = Problem(
                self.fun,
                self.has_aux,
                self.clipping,
                groups,
                params,
                rows,
                rows_are_padding,
                norms,
                self.implementation,
            )
            done = run_method(self.method, problem)

            def blank(x: jax.Array) -> jax.Array:
                mask = rows_are_padding.reshape((-1,) + (1,) * (x.ndim - 1))
                return jnp.where(mask, jnp.zeros_like(x), x)

            not_private = NotPrivate(done.loss, done.norms, jnp.all(done.keep, axis=1), done.aux)
            return done.sum, jax.tree.map(blank, not_private)

        if self.microbatch_size is None or self.microbatch_size >= size:
            return on_rows(batch, is_padding)
        return scan_microbatches(on_rows, batch, is_padding, self.microbatch_size)

    def explain(self, params: Params, example: Any, *, rows: int = 1) -> Explanation:
        """How each leaf of `params` is handled, and why: print it.

        Args:
            params: Pytree of floating-point arrays, or of `jax.ShapeDtypeStruct`s.
            example: One example, without a batch axis; arrays or `jax.ShapeDtypeStruct`s.
            rows: Examples differentiated at once, to which the memory and FLOPs refer.
        """
        check_runs_here(self.implementation)
        _validate.floating_params(params)
        rows = _validate.positive_integer("rows", rows)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)), jnp.result_type(x)), example)
        self._check_fun(params, batch)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), example)
        groups = self.clipping.groups(params)
        traced = jaxprs.trace(self.fun, params, shapes)
        plan = make_plan(traced, params, groups, rows=rows, implementation=self.implementation)
        return explain(plan, choose_method(self.method, self.clipping, plan), groups, rows)

    def _check_fun(self, params: Params, batch: Batch) -> None:
        out = couplings.output_of_one_example(self.fun, params, batch)
        if self.has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                raise TypeError(f"with has_aux=True, fun must return (loss, aux); it returned {out}.")
            out = out[0]
        if not hasattr(out, "shape") or not hasattr(out, "dtype"):
            hint = "" if self.has_aux else "; pass has_aux=True if it returns (loss, aux)"
            raise TypeError(f"fun must return a scalar loss, it returned {out}{hint}.")
        if out.shape != ():
            raise ValueError(
                f"fun must return the scalar loss of one example, it returned shape {out.shape}; it is called on one example, "
                "without the batch axis: sum or average over the example's own axes."
            )
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise TypeError(f"fun must return a floating-point loss, it returned dtype {out.dtype}.")


def clipped_grad(
    fun: LossFn,
    *,
    clipping: ClippingPolicy,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    method: Method = "auto",
    implementation: Implementation | None = None,
) -> ClippedGrad:
    """Transforms the loss of one example into the sum of clipped per-example gradients over a batch.

        S = sum_i c_i * grad fun(params, example_i),        c_i from the clipping policy

    **Guarantee**: the sum changes by at most `sensitivity(relation)` in L2 norm when one record changes. It is not noised:
    on its own it is private data, for `jaxdp.make_dp_step` or `jaxdp.privatize` to release. Padding rows, and examples
    whose loss or gradient is not finite, contribute exactly zero. `fun` sees one example at a time, so no statistic can
    couple two records (S3): where `jax.vmap` would show it more (`custom_vmap`, `pure_callback`, primitives without a batching
    rule) that part, under `"vmap"` all of it, runs one example after the other. Inside `jax.shard_map` and `jax.pmap`
    the sum is of each device's own records.

    Args:
        fun: `fun(params, example) -> scalar`, or `-> (scalar, aux)` with `has_aux=True`; `example` has no batch axis. For
            dropout, let the example carry a key.
        clipping: The clipping policy, such as `jaxdp.flat(1.0)`.
        has_aux: As in `jax.grad`.
        microbatch_size: Rows differentiated at once. It bounds the memory of activations and per-example copies, and changes
            nothing else.
        method: How the sum is computed; all methods compute the same one. `"vmap"`, the definition, forms the gradient of
            every example. The others read off `fun` where each parameter enters a matrix product, an embedding or a
            convolution, and take norm and clipped sum from its inputs and output cotangents; other leaves (biases, norm
            scales, and whatever is not recognized) are copied for each example. `"book_keeping"`: one backward pass, the
            factors of all leaves kept. `"two_pass"`: a second backward pass, which clips once more; the factors of weights
            that are used more than once are kept, as a tied embedding's, and no others. `"per_layer"`: one backward
            pass that finishes each clipping group on the spot; for `per_layer` clipping. `"auto"` chooses by policy and
            function. `"ghost"` is `"auto"` that refuses to copy a matrix. See `explain`.
        implementation: What takes norms and sums of dense layers from factors; `explain` names it leaf by leaf. None is the
            automatic choice: a kernel of `pallas_kernels` where it was measured to be faster than XLA on this kind of device,
            which is nowhere so far, else XLA. `"xla"`: no kernel. `"mosaic_gpu"`, for a Hopper GPU and jax >= 0.11.2, and
            `"mosaic_gpu_interpret"`, its slow emulation on a CPU: a kernel for every leaf that one can serve, XLA for
            the others (float32 operands, products side by side, embeddings, weights with several uses, one token, stored
            gradients, copies). The bound on the contribution of an example is the same; its norm is charged for the
            rounding of what runs. `jax.jit` does not partition a kernel: on several devices call this inside `shard_map`, or
            choose `"xla"`.

    Returns:
        A `ClippedGrad`: `grad_fn(params, batch, is_padding_example=...) -> (sum, NotPrivate)`.

    Raises:
        ValueError: `method` does not fit the policy, or is `"ghost"` and a leaf would be copied; `fun` reads across an axis that is
            bound outside of it, or keeps state from call to call; inside `jax.shard_map`, batch and parameters vary along
            different axes; when called.
        NotImplementedError: the named `implementation` cannot run with this JAX or on this device; when called.

    Source: DP-SGD, arXiv 1607.00133; ghost norms, 2110.05679; book-keeping, 2210.00038; per-layer clipping in one backward
    pass, 2212.01539.

    >>> import jax.numpy as jnp, jaxdp
    >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
    >>> grad_fn = clipped_grad(loss_fn, clipping=jaxdp.flat(1.0))
    >>> total, _ = grad_fn(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.3, 0.0]]))
    >>> print([f"{value:.3f}" for value in total])
    ['-0.900', '-0.800']
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable as fun(params, example), got {fun!r}.")
    if microbatch_size is not None:
        microbatch_size = _validate.positive_integer("microbatch_size", microbatch_size)
    policy = check_policy(clipping)
    method = check_method(method, policy)
    return ClippedGrad(
        fun, policy, bool(has_aux), microbatch_size, method, check_implementation(implementation, method)
    )
