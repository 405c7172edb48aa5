"""Small per-example losses of unmodified code: what people write, and what a rewriter of gradients gets wrong.

Each case is a function `fun(params, example)`, its parameters, and a batch of B examples of varied sizes. Nothing in here
knows that it will be clipped. `must_not_copy` names leaves that are plainly used once in a dense layer, an embedding or a
convolution: giving each example its own copy of such a leaf would be exact, and the optimization lost.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn, nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

B, T, D, V = 5, 3, 4, 7  # examples, tokens, width, vocabulary
RNG = np.random.default_rng(2718)
EPSILON = float(jnp.finfo(jnp.bfloat16).eps)


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss.

    Attributes:
        name: The name of the test.
        fun: `fun(params, example) -> loss`, or `-> (loss, aux)` with `has_aux`.
        params: Arrays in float32, unless the case is about another dtype.
        batch: Arrays `[B, ...]`; at least one is floating-point and, once NaN, spoils its example.
        must_not_copy: Paths of leaves whose only use is recognizable.
        has_aux: As in `clipped_grad`.
        lenient: The code under test, such as flax, relies on implicit promotion of ranks or dtypes.
        tolerance: Relative to the largest entry of all leaves.
    """

    name: str
    fun: Callable[..., Any]
    params: Any
    batch: Any
    must_not_copy: tuple[str, ...] = ()
    has_aux: bool = False
    lenient: bool = False
    tolerance: float = 1e-5


CASES: dict[str, Case] = {}


def add(name: str, fun: Callable[..., Any], params: Any, batch: Any, *must_not_copy: str, **options: Any) -> None:
    assert name not in CASES
    CASES[name] = Case(name, fun, params, batch, must_not_copy, **options)


def case(params: Any, batch: Any, *must_not_copy: str, **options: Any) -> Callable[..., Any]:
    def decorate(fun: Callable[..., Any]) -> Callable[..., Any]:
        add(fun.__name__, fun, params, batch, *must_not_copy, **options)
        return fun

    return decorate


def normal(*shape: int) -> np.ndarray:
    """Parameters."""
    return np.asarray(0.6 * RNG.normal(size=shape), np.float32)


def examples(*shape: int) -> np.ndarray:
    """Data `[B, *shape]`; later examples are larger."""
    scale = np.linspace(0.4, 1.6, B).reshape((B,) + (1,) * len(shape))
    return np.asarray(scale * RNG.normal(size=(B, *shape)), np.float32)


def tokens(*shape: int, vocabulary: int = V) -> np.ndarray:
    return np.asarray(RNG.integers(0, vocabulary, (B, *shape)), np.int32)


def filled(tree: Any) -> Any:
    """Arrays in place of the abstract arrays of a module that was never run."""
    return jax.tree.map(lambda leaf: normal(*leaf.shape), tree)


def readout(out: jax.Array) -> jax.Array:
    """A scalar to which every entry contributes differently."""
    return jnp.sum(jnp.sin(out) + 0.3 * jnp.square(out - 0.4))


def bias(b: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(b, like.shape)


# --- Dense layers -----------------------------------------------------------------------------------------------------


@case(
    {"first": {"kernel": normal(D, 6), "bias": normal(6)}, "second": {"kernel": normal(6, 2), "bias": normal(2)}},
    (examples(D), examples(2)),
    "first/kernel",
    "second/kernel",
)
def mlp_of_one_token(params, example):
    x, y = example
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.sum(jnp.square(hidden @ params["second"]["kernel"] + params["second"]["bias"] - y))


@case({"w": normal(D, 6), "b": normal(6)}, examples(T, D), "w")
def dense_over_tokens(params, x):
    out = x @ params["w"]
    return readout(out + bias(params["b"], out))


@case({"w": normal(D, 5)}, examples(12, D), "w")
def dense_over_many_tokens(params, x):
    return readout(x @ params["w"])


@case({"w": normal(B, B), "v": normal(B, B), "b": normal(B)}, examples(B, B), "w", "v")
def every_axis_is_as_long_as_the_batch(params, x):
    hidden = jnp.tanh(x @ params["w"] + bias(params["b"], x))
    return readout(hidden @ params["v"])


@case(normal(D, 2), examples(T, D), "<root>")
def parameters_are_one_array(w, x):
    return readout(x @ w)


class Pair(NamedTuple):
    kernel: Any
    rest: Any


@case(Pair(normal(D, 5), [normal(5), (normal(5, 2),)]), examples(T, D), "kernel", "rest/1/0")
def parameters_in_tuples_and_lists(params, x):
    hidden = jnp.tanh(x @ params.kernel)
    return readout((hidden + bias(params.rest[0], hidden)) @ params.rest[1][0])


@case(normal(D), examples(D), "<root>")
def dense_without_a_free_axis(w, x):
    return jnp.sin(x @ w)


@case(normal(D), examples(T, D))
def matrix_of_data_times_a_vector_of_weights(w, x):
    return readout(x @ w)


for name, equation, data, weight, recognized in (
    ("x_times_w", "td,dp->tp", (T, D), (D, 5), True),
    ("x_times_w_transposed", "td,pd->tp", (T, D), (5, D), True),
    ("x_transposed_times_w", "dt,dp->pt", (D, T), (D, 5), True),
    ("heads_out", "td,dhk->thk", (T, D), (D, 2, 3), True),
    ("heads_in", "thk,hkd->td", (T, 2, 3), (2, 3, D), True),
    ("heads_in_permuted", "thk,dkh->td", (T, 2, 3), (D, 3, 2), True),
    ("one_weight_for_each_head", "htd,hdk->htk", (2, T, D), (2, D, 3), False),
    ("one_weight_for_each_head_permuted", "thd,hdk->tkh", (T, 2, D), (2, D, 3), False),
    ("one_weight_for_each_token", "td,tdp->tp", (T, D), (T, D, 5), False),
    ("only_batch_and_contracted_axes", "htd,hd->th", (2, T, D), (2, D), False),
    ("only_batch_axes", "td,td->td", (T, D), (T, D), False),
    ("no_contracted_axis", "t,dp->tdp", (T,), (D, 2), False),
    ("two_axes_of_tokens", "qtd,dp->qtp", (2, T, D), (D, 5), True),
    ("all_contracted", "td,td->", (T, D), (T, D), False),
    ("summed_over_tokens", "td,dp->p", (T, D), (D, 5), False),
    ("summed_over_outputs", "td,dp->t", (T, D), (D, 5), False),
):
    add(
        f"einsum_{name}",
        lambda params, x, equation=equation: readout(jnp.einsum(equation, x, params["w"])),
        {"w": normal(*weight)},
        examples(*data),
        *(("w",) if recognized else ()),
    )


@case({"w": normal(5, D)}, examples(D, T), "w")
def weight_on_the_left(params, x):
    return readout(params["w"] @ x)


@case({"w": normal(5, D)}, examples(T, D), "w")
def weight_transposed(params, x):
    return readout(x @ params["w"].T)


@case({"w": normal(D, 5)}, (examples(D), examples(5)))
def bilinear_form(params, example):
    x, y = example
    return jnp.sin(jnp.einsum("d,dp,p->", x, params["w"], y))


@case({"w": normal(D, 5)}, examples(T, D), "w", tolerance=4 * EPSILON)
def weight_cast_to_bfloat16(params, x):
    out = x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
    return readout(out.astype(jnp.float32))


@case({"w": jnp.asarray(normal(D, 5), jnp.bfloat16)}, examples(T, D), "w", tolerance=4 * EPSILON)
def weight_stored_in_bfloat16(params, x):
    return readout(jnp.dot(x.astype(jnp.bfloat16), params["w"], preferred_element_type=jnp.float32))


@case({"w": jnp.asarray(normal(D, 5), jnp.bfloat16)}, examples(T, D), "w", tolerance=4 * EPSILON)
def weight_stored_in_bfloat16_and_widened(params, x):
    return readout(x @ params["w"].astype(jnp.float32))


@case({"w": normal(2, 3, D)}, examples(T, D), "w")
def weight_reshaped_and_transposed(params, x):
    return readout(x @ params["w"].reshape(6, D).T)


@case({"w": normal(1, D, 1, 5)}, examples(T, D), "w")
def weight_squeezed(params, x):
    return readout(x @ jnp.squeeze(params["w"], (0, 2)))


@case({"w": normal(D, 5)}, examples(2, T, D))
def weight_broadcast_over_heads(params, x):
    return readout(jnp.matmul(x, jnp.broadcast_to(params["w"], (2, D, 5))))


@case({"w": normal(D, 2), "scale": normal(2)}, examples(T, D))
def weight_repeated(params, x):
    out = x @ jnp.repeat(params["w"], 2, axis=1)
    return readout(out * bias(jnp.tile(params["scale"], 2), out))


@case({"w": normal(D, 6), "out": normal(2, D)}, examples(T, D), "w", "out")
def fused_qkv(params, x):
    q, k, v = jnp.split(x @ params["w"], 3, axis=-1)
    weights = jax.nn.softmax(q @ k.T, axis=-1)
    return readout(weights @ v @ params["out"])


@case({"w": normal(D, 6)}, examples(T, D), "w")
def disjoint_slices(params, x):
    w = params["w"]
    return readout(jnp.tanh(x @ w[:, :2]) @ w[:2, 2:])


@case({"w": normal(D, 6)}, examples(T, D))
def overlapping_slices(params, x):
    w = params["w"]
    return readout(x @ w[:, :4]) + readout(jnp.cos(x) @ w[:, 3:])


@case({"w": normal(D, 6)}, examples(T, D))
def a_slice_and_the_whole(params, x):
    return readout(jnp.tanh(x @ params["w"]) @ params["w"][:1].T)


@case({"w": normal(6, D)}, examples(T, D))
def a_part_that_is_never_used(params, x):
    return readout(x @ params["w"][2:5].T)


@case({"w": normal(3, D, D), "b": normal(3, D)}, examples(T, D), "w")
def unrolled_stack(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params["w"][i] + bias(params["b"][i], x))
    return readout(x)


@case({"w": normal(2, D, D)}, examples(T, D))
def unrolled_stack_with_one_layer_twice(params, x):
    for i in (0, 1, 0):
        x = jnp.tanh(x @ params["w"][i])
    return readout(x)


@case({"w": normal(3, D, D)}, (examples(T, D), tokens(vocabulary=3)), "w")
def layer_chosen_by_the_example(params, example):
    x, layer = example
    return readout(x @ params["w"][layer])


@case({"a": normal(D, 2), "b": normal(D, 3)}, examples(T, D))
def weights_concatenated(params, x):
    return readout(x @ jnp.concatenate([params["a"], params["b"]], axis=1))


@case({"w": normal(D, D)}, examples(T, D))
def weight_masked(params, x):
    return readout(x @ jnp.tril(params["w"]))


@case({"w": normal(D, 5)}, (examples(T, D), examples(D, 5)))
def weight_masked_by_the_example(params, example):
    x, mask = example
    return readout(x @ jnp.where(mask > 0, params["w"], 0.0) + jnp.sum(mask))


@case({"w": normal(D, 5), "g": normal(5)}, examples(T, D))
def weight_normalized(params, x):
    w = params["w"]
    direction = w / bias(jnp.linalg.norm(w, axis=0), w)
    return readout(x @ (direction * bias(params["g"], w)))


@case({"w": normal(D, 5), "factor": normal()}, examples(T, D))
def weight_scaled(params, x):
    return readout(x @ (2.0 * params["w"])) * params["factor"]


@case({"w": normal(D, 5)}, examples(T, D))
def weight_rows_gathered(params, x):
    return readout(x @ params["w"][np.array([2, 0, 0, 1])])


@case({"w": normal(D, 5)}, examples(T, D))
def weight_flipped_and_padded(params, x):
    return readout(x @ jnp.pad(params["w"][::-1, ::2], ((0, 0), (1, 0))))


@case({"w": normal(D, 5)}, examples(T, D))
def weight_behind_a_barrier(params, x):
    return readout(x @ lax.optimization_barrier(params["w"]))


@case({"w": normal(D, 5)}, examples(T, D), "w")
def constant_data_joins_the_tokens(params, x):
    prompt = jnp.asarray(np.linspace(-1, 1, 2 * D).reshape(2, D), jnp.float32)
    return readout(jnp.concatenate([prompt, x]) @ params["w"])


@case({"w": normal(D, 5)}, (examples(T, D), examples()))
def dense_of_a_constant(params, example):
    x, weight = example
    return weight * readout(jnp.ones((2, D)) @ params["w"]) + jnp.sum(x)


FROZEN = jnp.asarray(normal(D, D))


@case({"w": normal(D, 5)}, examples(T, D), "w")
def frozen_array_closed_over(params, x):
    return readout(jnp.tanh(x @ FROZEN) @ params["w"])


# --- Used more than once, or not in a dense layer alone ---------------------------------------------------------------


@case({"w": normal(D, 5)}, (examples(T, D), examples(T, D)))
def siamese(params, example):
    left, right = example
    return readout(jnp.tanh(left @ params["w"]) * jnp.tanh(right @ params["w"]))


@case({"w": normal(D, D), "v": normal(D, D)}, examples(T, D), "v")
def one_weight_in_two_layers(params, x):
    hidden = jnp.tanh(x @ params["w"]) @ params["v"]
    return readout(jnp.tanh(hidden) @ params["w"])


@case({"w": normal(D, 5)}, examples(T, D))
def autoencoder_with_tied_weights(params, x):
    return jnp.sum(jnp.square(jnp.tanh(x @ params["w"]) @ params["w"].T - x))


@case({"w": normal(D, 3)}, examples(T, D))
def weight_times_itself(params, x):
    return readout(x @ (params["w"] @ params["w"].T))


@case({"q": normal(D, 2), "k": normal(D, 2), "v": normal(D, 2), "o": normal(2, D)}, examples(T, D), "q", "k", "v", "o")
def attention_with_shared_input(params, x):
    q, k, v = x @ params["q"], x @ params["k"], x @ params["v"]
    scores = jnp.where(np.tri(T, dtype=bool), q @ k.T, -1e9)
    return readout(jax.nn.softmax(scores, axis=-1) @ v @ params["o"])


@case({"w": normal(D, D)}, examples(D, D))
def dot_and_elementwise(params, x):
    return readout(x @ params["w"]) + readout(x * params["w"])


@case({"w": normal(D, 5)}, examples(T, D))
def weight_in_a_regularizer(params, x):
    return readout(x @ params["w"]) + 0.1 * jnp.sum(jnp.square(params["w"]))


@case({"w": normal(D, 5)}, examples())
def weight_in_a_regularizer_alone(params, scale):
    return scale * jnp.sum(jnp.square(params["w"]))


@case({"w": normal(D, 5), "unused": normal(3, 2)}, examples(T, D), "w")
def unused_parameter(params, x):
    return readout(x @ params["w"])


@case({"scale": normal(), "shift": normal()}, examples(T))
def scalars(params, x):
    return readout(params["scale"] * x + params["shift"])


@case({"w": normal(D, 5)}, examples(T, D))
def stop_gradient_in_one_place(params, x):
    out = x @ params["w"]
    return readout(out * lax.stop_gradient(jnp.tanh(x @ params["w"])))


@case({"w": normal(D, 5), "v": normal(5, 2)}, examples(T, D))
def stop_gradient_everywhere(params, x):
    return readout(jnp.tanh(x @ lax.stop_gradient(params["w"])) @ params["v"])


@case({"w": normal(D, 5), "threshold": normal(), "router": normal(D, 3)}, examples(T, D), "w")
def parameters_in_comparisons_only(params, x):
    out = x @ params["w"]
    out = jnp.where(out > params["threshold"], out, 0.1 * out)
    return readout(out) * (1.0 + jnp.argmax(jnp.sum(x, 0) @ params["router"]).astype(jnp.float32))


@case({"w": normal(D, 5), "b": normal(5)}, examples(T, D), "w", has_aux=True)
def parameter_in_aux(params, x):
    out = x @ params["w"]
    aux = {"w": params["w"], "b": params["b"] + 1.0, "argmax": jnp.argmax(out, axis=-1), "one": 1}
    return readout(out + bias(params["b"], out)), aux


@case({"w": normal(D, 5)}, (examples(T, D), tokens(T, vocabulary=5)), "w", has_aux=True)
def logits_in_aux(params, example):
    x, labels = example
    logits = x @ params["w"]
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), (logits, {"labels": labels})


@case({"a": normal(D, 2), "b": normal(2, 5)}, examples(T, D), "a", "b")
def lora_beside_a_frozen_weight(params, x):
    return readout(x @ FROZEN @ np.ones((D, 5), np.float32) + 0.5 * (x @ params["a"] @ params["b"]))


@case({"w": normal(D, D), "a": normal(D, 2), "b": normal(2, D)}, examples(T, D))
def lora_merged(params, x):
    return readout(x @ (params["w"] + params["a"] @ params["b"]))


@case({"w": normal(D, 3)}, examples(D))
def linear_solve(params, x):
    matrix = 4.0 * jnp.eye(D) + params["w"] @ params["w"].T
    return readout(jnp.linalg.solve(matrix, x))


@case({"w": normal(D, 5), "v": normal(5)}, examples(D), tolerance=3e-5)
def gradient_penalty(params, x):
    def score(x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    return score(x) + jnp.sum(jnp.square(jax.grad(score)(x)))


@case({"w": normal(D, 2)}, (examples(T, D), examples(T, 2), examples(T, D)))
def inner_gradient_step(params, example):
    support, target, query = example

    def inner(w):
        return jnp.mean(jnp.square(support @ w - target))

    return readout(query @ (params["w"] - 0.1 * jax.grad(inner)(params["w"])))


@case({"w": normal(D, 5)}, (examples(D), examples(D)))
def forward_mode_inside(params, example):
    primal, tangent = example
    out, out_tangent = jax.jvp(lambda x: jnp.tanh(x @ params["w"]), (primal,), (tangent,))
    return readout(out) + readout(out_tangent)


@case({"table": normal(V, V)}, (tokens(T), tokens(T), examples()))
def bigram_table(params, example):
    here, there, weight = example
    return weight * readout(params["table"][here, there])


# --- Scales and biases ------------------------------------------------------------------------------------------------


@case({"scale": normal(D), "bias": normal(D), "w": normal(D, 3)}, examples(T, D), "w")
def layer_norm(params, x):
    centered = x - bias(jnp.mean(x, -1, keepdims=True), x)
    normed = centered * bias(lax.rsqrt(jnp.mean(jnp.square(centered), -1, keepdims=True) + 1e-3), x)
    return readout((normed * bias(params["scale"], x) + bias(params["bias"], x)) @ params["w"])


@case({"scale": normal(D), "w": normal(D, 3)}, examples(T, D), "w")
def rms_norm(params, x):
    normed = x * bias(lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-3), x)
    return readout((normed * bias(1.0 + params["scale"], x)) @ params["w"])


# --- Embeddings -------------------------------------------------------------------------------------------------------

LENGTH = 9  # more tokens than words: some repeat


@case({"embedding": normal(V, D), "w": normal(D, 3)}, (tokens(LENGTH), examples()), "embedding", "w")
def embedding_by_index(params, example):
    ids, weight = example
    return weight * readout(params["embedding"][ids] @ params["w"])


@case({"embedding": normal(V, D)}, (np.zeros((B, LENGTH), np.int32), examples(LENGTH, D)), "embedding")
def embedding_of_one_token_repeated(params, example):
    ids, x = example
    return readout(params["embedding"][ids] * x)


@case({"embedding": normal(V, D)}, (tokens(), examples(D)), "embedding")
def embedding_of_one_token(params, example):
    token, x = example
    return readout(params["embedding"][token] * x)


@case({"embedding": normal(V, D)}, (tokens(2, 3), examples(D)), "embedding")
def embedding_of_a_matrix_of_tokens(params, example):
    ids, x = example
    out = params["embedding"][ids]
    return readout(out * bias(x, out))


WILD = np.array([[0, -1, 6, 2], [7, 1, 0, 7], [-7, -8, 3, 3], [100, 2, -100, 2], [5, 5, -2, 5]], np.int32)

for mode in (None, "clip", "wrap", "fill"):

    def take_loss(params, example, *, mode=mode):
        ids, x = example
        return readout(jnp.take(params["embedding"], ids, axis=0, mode=mode) * x)

    add(
        f"embedding_by_take_{mode or 'default'}",
        take_loss,
        {"embedding": normal(V, D)},
        (WILD, examples(4, D)),
        "embedding",
    )


@case({"embedding": normal(V, D)}, (tokens(LENGTH), examples(LENGTH, D)), "embedding")
def embedding_promised_in_bounds(params, example):
    ids, x = example
    return readout(params["embedding"].at[ids].get(mode="promise_in_bounds") * x)


@case({"embedding": normal(V, D)}, (WILD, examples(4, D)), "embedding")
def embedding_by_index_out_of_bounds(params, example):
    ids, x = example
    return readout(params["embedding"][ids] * x)


@case({"embedding": normal(V, D)}, (WILD, examples(4, D)))
def embedding_filled_with_zero(params, example):
    ids, x = example
    return readout(params["embedding"].at[ids].get(mode="fill", fill_value=0.0) * x)


@case({"embedding": normal(V, D)}, (tokens(LENGTH), examples()), "embedding")
def embedding_by_one_hot(params, example):
    ids, weight = example
    return weight * readout(jax.nn.one_hot(ids, V) @ params["embedding"])


@case({"embedding": normal(V, D)}, (tokens(LENGTH), examples(LENGTH, D)), "embedding")
def embedding_scaled_and_masked(params, example):
    ids, x = example
    out = params["embedding"][ids] * np.float32(np.sqrt(D))
    return readout(jnp.where(ids[:, None] == 0, 0.0, out) * x)


@case({"embedding": normal(V, D)}, (tokens(T), examples(T, D)), "embedding", tolerance=4 * EPSILON)
def embedding_cast_to_bfloat16(params, example):
    ids, x = example
    return readout(params["embedding"].astype(jnp.bfloat16)[ids].astype(jnp.float32) * x)


@case({"embedding": normal(D, V)}, (tokens(LENGTH), examples(D, LENGTH)))
def embedding_along_the_second_axis(params, example):
    ids, x = example
    return readout(params["embedding"][:, ids] * x)


@case({"embedding": normal(V, D)}, (tokens(LENGTH), examples(LENGTH, D)))
def embedding_by_vmap(params, example):
    ids, x = example
    return readout(jax.vmap(lambda i: params["embedding"][i])(ids) * x)


@case({"embedding": normal(V, 2, D)}, (tokens(T), examples(T, 2, D)))
def embedding_of_matrices(params, example):
    ids, x = example
    return readout(params["embedding"][ids] * x)


@case({"embedding": normal(V, D)}, (tokens(), examples(D)), "embedding")
def embedding_by_dynamic_index(params, example):
    token, x = example
    return readout(lax.dynamic_index_in_dim(params["embedding"], token, keepdims=False) * x)


@case({"embedding": normal(V, D)}, (tokens(LENGTH), examples(2, D)), "embedding")
def bag_of_embeddings(params, example):
    ids, x = example
    bags = jax.ops.segment_sum(params["embedding"][ids], np.arange(LENGTH) % 2, num_segments=2)
    return readout(bags * x)


@case({"embedding": normal(V, D)}, (tokens(LENGTH), tokens(2), examples(D)))
def embedding_used_twice(params, example):
    ids, others, x = example
    return readout(jnp.mean(params["embedding"][ids], 0) * x) + readout(jnp.sum(params["embedding"][others], 0))


@case({"word": normal(V, D), "position": normal(6, D), "w": normal(D, 3)}, (tokens(T), examples()), "word", "w")
def positions_by_slice(params, example):
    ids, weight = example
    return weight * readout((params["word"][ids] + params["position"][:T]) @ params["w"])


@case(
    {"word": normal(V, D), "position": normal(6, D), "w": normal(D, 3)},
    (tokens(T), examples()),
    "word",
    "w",
    "position",
)
def positions_by_arange(params, example):
    ids, weight = example
    return weight * readout((params["word"][ids] + params["position"][jnp.arange(T)]) @ params["w"])


@case({"position": normal(6, D)}, (tokens(vocabulary=3), examples(T, D)))
def positions_by_an_offset_of_the_example(params, example):
    start, x = example
    return readout(lax.dynamic_slice_in_dim(params["position"], start, T) * x)


@case({"embedding": normal(V, D), "w": normal(D, D)}, (tokens(LENGTH), examples()), "w")
def embedding_tied_to_the_head(params, example):
    ids, weight = example
    hidden = jnp.tanh(params["embedding"][ids] @ params["w"])
    logits = hidden[:-1] @ params["embedding"].T
    return weight * jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, ids[1:]))


@case({"embedding": normal(V, D)}, (tokens(LENGTH), examples(D)))
def embedding_in_a_recurrence(params, example):
    ids, h = example
    h, _ = lax.scan(lambda h, i: (jnp.tanh(0.5 * h + params["embedding"][i]), None), h, ids)
    return readout(h)


# --- Loops ------------------------------------------------------------------------------------------------------------


def dense_layer(x, w):
    return jnp.tanh(x @ w), None


def biased_layer(x, layer):
    hidden = jnp.tanh(x @ layer["w"])
    return x + hidden + bias(layer["b"], x), None


STACK = {"w": normal(3, D, D), "b": normal(3, D)}

for name, run in (
    ("", lambda params, x: lax.scan(biased_layer, x, params)),
    ("_reversed", lambda params, x: lax.scan(biased_layer, x, params, reverse=True)),
    ("_unrolled", lambda params, x: lax.scan(biased_layer, x, params, unroll=2)),
    ("_of_checkpoints", lambda params, x: lax.scan(jax.checkpoint(biased_layer), x, params)),
    ("_in_a_checkpoint", lambda params, x: jax.checkpoint(lambda p, y: lax.scan(biased_layer, y, p))(params, x)),
    ("_in_a_jit", lambda params, x: jax.jit(lambda p, y: lax.scan(biased_layer, y, p))(params, x)),
):
    add(
        f"scan_over_layers{name}",
        lambda params, x, run=run: readout(run(params, x)[0]),
        STACK,
        examples(T, D),
        "w",
    )


@case({"w": normal(1, D, D)}, examples(T, D))
def scan_of_length_one(params, x):
    return readout(lax.scan(dense_layer, x, params["w"])[0])


@case({"w": normal(2, 2, D, D)}, examples(T, D), "w")
def scan_nested(params, x):
    return readout(lax.scan(lambda h, ws: lax.scan(dense_layer, h, ws), x, params["w"])[0])


@case({"w": normal(3, D, D)}, examples(T, D))
def scan_over_layers_also_used_outside(params, x):
    h, _ = lax.scan(dense_layer, x, params["w"])
    return readout(h @ params["w"][0])


@case({"w": normal(4, D, D)}, examples(T, D), "w")
def scan_over_some_of_the_layers(params, x):
    return readout(lax.scan(dense_layer, x, params["w"][1:3])[0])


@case({"w": normal(3, D, D)}, examples(T, D))
def scan_with_a_layer_used_twice_inside(params, x):
    return readout(lax.scan(lambda h, w: (jnp.tanh(jnp.tanh(h @ w) @ w), None), x, params["w"])[0])


@case({"w": normal(3, D, D)}, examples(T, D))
def scan_that_returns_its_weights(params, x):
    h, ws = lax.scan(lambda h, w: (jnp.tanh(h @ w), 2.0 * w), x, params["w"])
    return readout(h) + readout(ws)


@case({"w": normal(T, D, D), "head": normal(D, 2)}, examples(T, D), "head")
def scan_over_tokens_and_layers_together(params, x):
    _, out = lax.scan(lambda h, pair: (jnp.tanh((h + pair[0]) @ pair[1]), h), jnp.zeros(D), (x, params["w"]))
    return readout(out @ params["head"])


@case({"w": normal(D, D), "u": normal(D, D), "b": normal(D)}, examples(T, D))
def recurrent_weight(params, x):
    def cell(h, token):
        return jnp.tanh(h @ params["w"] + token @ params["u"] + params["b"]), None

    return readout(lax.scan(cell, jnp.zeros(D), x)[0])


@case({"w": normal(D, 3)}, examples(T, D))
def weight_in_a_map_over_tokens(params, x):
    return readout(lax.map(lambda token: token @ params["w"], x))


@case({"w": normal(D, D)}, examples(T, D))
def weight_carried(params, x):
    def body(carry, _):
        h, w = carry
        return (jnp.tanh(h @ w), w), None

    (h, _), _ = lax.scan(body, (x, params["w"]), None, length=2)
    return readout(h)


@case({"w": normal(D, D)}, examples(T, D))
def weight_carried_and_changed(params, x):
    def body(carry, _):
        h, w = carry
        return (jnp.tanh(h @ w), 0.9 * w), None

    (h, w), _ = lax.scan(body, (x, params["w"]), None, length=2)
    return readout(h) + readout(w)


@case({"w": normal(D, D)}, examples(T, D))
def weight_carried_and_used_outside(params, x):
    (h, w), _ = lax.scan(lambda c, _: ((jnp.sin(c[0]), c[1]), None), (x @ params["w"], params["w"]), None, length=2)
    return readout(h) + readout(x @ w)


@case({"w": normal(D, D)}, examples(T, D))
def fori_loop(params, x):
    return readout(lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ params["w"]), x))


@case({"w": normal(2, D, D)}, examples(T, D))
def fori_loop_over_layers(params, x):
    return readout(lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ params["w"][i]), x))


@case({"w": normal(D, 5)}, examples(T, D))
def while_loop_on_the_data(params, x):
    def grow(state):
        return state[0] * 1.5, state[1] + 1

    x = lax.stop_gradient(x)
    x, count = lax.while_loop(lambda s: (jnp.max(jnp.abs(s[0])) < 2.0) & (s[1] < 9), grow, (x, 0))
    return readout(x @ params["w"]) * count.astype(jnp.float32)


@case({"w": normal(D, D)}, examples(T, D))
def while_loop_on_a_stopped_weight(params, x):
    w = lax.stop_gradient(params["w"])
    h, _ = lax.while_loop(lambda s: s[1] < 2, lambda s: (jnp.tanh(s[0] @ w), s[1] + 1), (lax.stop_gradient(x), 0))
    return readout(h @ params["w"] + jnp.sum(x))


@case({"decay": normal(D), "w": normal(D, 3)}, examples(T, D), "w")
def associative_scan(params, x):
    decay = bias(jax.nn.sigmoid(params["decay"]), x)
    _, h = lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, x))
    return readout(h @ params["w"])


# --- jit, checkpoint, custom rules, control flow ----------------------------------------------------------------------


@jax.jit
def jitted_dense(w, x):
    return jnp.tanh(x @ w)


@case({"w": normal(D, D), "v": normal(D, D)}, examples(T, D), "w", "v")
def jit_inside_for_two_weights(params, x):
    return readout(jitted_dense(params["v"], jitted_dense(params["w"], x)))


@case({"w": normal(D, D)}, examples(T, D))
def jit_inside_twice_for_one_weight(params, x):
    return readout(jitted_dense(params["w"], jitted_dense(params["w"], x)))


@case({"w": normal(D, D), "v": normal(D, D)}, examples(T, D))
def jit_that_returns_its_weight(params, x):
    h, w = jax.jit(lambda w, x: (jnp.tanh(x @ w), w))(params["w"], x)
    return readout(h @ params["v"]) + readout(w)


def two_layers(params, x):
    hidden = checkpoint_name(jnp.tanh(x @ params["w"]), "hidden")
    return jnp.tanh(hidden @ params["v"])


for name, policy in (
    ("everything", None),
    ("but_dots", jax.checkpoint_policies.dots_saveable),
    ("but_names", jax.checkpoint_policies.save_only_these_names("hidden")),
):
    add(
        f"checkpoint_{name}",
        lambda params, x, policy=policy: readout(jax.checkpoint(two_layers, policy=policy)(params, x)),
        {"w": normal(D, D), "v": normal(D, D)},
        examples(T, D),
        "w",
        "v",
    )


@case({"w": normal(D, D), "v": normal(D, 2)}, examples(T, D), "v")
def checkpoint_of_a_shared_weight(params, x):
    block = jax.checkpoint(lambda x: jnp.tanh(x @ params["w"]))
    return readout(block(block(x)) @ params["v"])


@case({"w": normal(D, 5), "v": normal(5, 3)}, (examples(T, D), tokens(T, vocabulary=3)), "w", "v")
def custom_jvp_of_jax(params, example):
    x, labels = example
    hidden = jax.nn.silu(jax.nn.relu(x @ params["w"]))
    probabilities = jax.nn.softmax(hidden @ params["v"], axis=-1)
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(probabilities, labels))


@jax.custom_jvp
def scaled_dense(w, x):
    return x @ w


@scaled_dense.defjvp
def _(primals, tangents):
    (w, x), (w_dot, x_dot) = primals, tangents
    return x @ w, 2.0 * (x @ w_dot) + x_dot @ w  # not the derivative: a rewriter that ignores the rule is found out


@case({"w": normal(D, 5)}, examples(T, D))
def custom_jvp_around_a_weight(params, x):
    return readout(scaled_dense(params["w"], x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ruled_dense(factor, w, x):
    return x @ w


def _ruled_forward(factor, w, x):
    return x @ w, (w, x)


def _ruled_backward(factor, residuals, g):
    w, x = residuals
    return factor * jnp.tanh(x.T @ g), g @ w.T  # not linear in g: the sum over examples must come after


ruled_dense.defvjp(_ruled_forward, _ruled_backward)


@case({"w": normal(D, D), "v": normal(D, 2)}, examples(T, D), "v")
def custom_vjp_around_a_weight(params, x):
    return readout(jnp.tanh(ruled_dense(0.5, params["w"], x)) @ params["v"])


@case({"w": normal(2, D, D)}, examples(T, D))
def custom_vjp_in_a_scan(params, x):
    return readout(lax.scan(lambda h, w: (jnp.tanh(ruled_dense(2.0, w, h)), None), x, params["w"])[0])


@jax.custom_vjp
def with_bounded_cotangent(x):
    return x


with_bounded_cotangent.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@case({"w": normal(D, 5)}, examples(T, D))
def custom_vjp_of_a_weight_before_its_dot(params, x):
    return readout(x @ with_bounded_cotangent(params["w"]))


@case({"w": normal(D, 5), "v": normal(5, 2)}, examples(T, D), "v", "w")
def custom_vjp_of_an_activation(params, x):
    return readout(with_bounded_cotangent(x @ params["w"]) @ params["v"])


@jax.custom_vjp
def rounded(x):
    return jnp.round(4.0 * x) / 4.0


rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))


@case({"w": normal(D, 5)}, examples(T, D))
def straight_through_quantization(params, x):
    return readout(x @ rounded(params["w"]))


PUBLIC = jnp.asarray(3)


@case({"w": normal(D, 5), "v": normal(D, 5)}, examples(T, D), "w", "v")
def cond_on_a_public_predicate(params, x):
    return readout(lax.cond(PUBLIC > 2, lambda y: y @ params["w"], lambda y: y @ params["v"], x))


@case({"w": normal(D, 5), "v": normal(D, 5)}, examples(T, D))
def cond_on_the_example(params, x):
    return readout(lax.cond(x[0, 0] > 0, lambda y: y @ params["w"], lambda y: jnp.cos(y) @ params["v"], x))


@case({"w": normal(D, D)}, examples(T, D))
def cond_with_one_weight_in_both_branches(params, x):
    w = params["w"]
    return readout(lax.cond(x[0, 0] > 0, lambda y: y @ w, lambda y: jnp.tanh(y @ w) @ w, x))


@case({"w": normal(2, D, D), "v": normal(D, D)}, examples(T, D))
def cond_in_a_scan(params, x):
    def body(h, w):
        return lax.cond(h[0, 0] > 0, lambda y: jnp.tanh(y @ w), lambda y: jnp.tanh(y @ params["v"]), h), None

    return readout(lax.scan(body, x, params["w"])[0])


@case({"w": normal(D, 5)}, examples(T, D))
def cond_that_chooses_the_weight(params, x):
    w = lax.cond(x[0, 0] > 0, lambda w: w, lambda w: jnp.sin(w), params["w"])
    return readout(x @ w)


@case({"a": normal(D, 5), "b": normal(D, 5), "c": normal(5)}, (examples(T, D), tokens(vocabulary=3)))
def switch_on_the_example(params, example):
    x, index = example
    branches = [lambda y: y @ params["a"], lambda y: y @ params["b"] + bias(params["c"], y[:, :1] @ jnp.ones((1, 5)))]
    return readout(lax.switch(index, [*branches, lambda y: y @ (params["a"] + params["b"])], x))


@case({"w": normal(D, 5), "b": normal(5)}, examples(T, D), "w")
def vmap_inside(params, x):
    return readout(jax.vmap(lambda token: jnp.tanh(token @ params["w"] + params["b"]))(x))


@case({"w": normal(T, D, 5)}, examples(T, D))
def vmap_inside_over_the_weights(params, x):
    return readout(jax.vmap(lambda token, w: jnp.tanh(token @ w))(x, params["w"]))


@case({"w": normal(D, 5)}, examples(T, D))
def callback_inside(params, x):
    out = x @ params["w"]
    jax.debug.callback(lambda _: None, out)
    return readout(out)


@case({"w": normal(D, 5), "v": normal(5, 2)}, (examples(T, D), jax.random.split(jax.random.key(0), B)), "w", "v")
def dropout_with_a_key_in_the_example(params, example):
    x, key = example
    hidden = jnp.tanh(x @ params["w"])
    kept = jax.random.bernoulli(key, 0.5, hidden.shape)
    return readout(jnp.where(kept, 2.0 * hidden, 0.0) @ params["v"])


# --- Convolutions -----------------------------------------------------------------------------------------------------

# Grouped: XLA's CPU backend may compute the gradients of a batch of grouped kernels as one convolution with zeros between the
# examples, and 0 * NaN is NaN, so that one bad example spoils all others (S9).
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")

for name, image, kernel, dimensions, options, recognized in (
    ("same", (5, 5, 2), (3, 3, 2, 3), NHWC, {"window_strides": (1, 1), "padding": "SAME"}, True),
    ("valid", (5, 4, 2), (3, 2, 2, 3), NHWC, {"window_strides": (1, 1), "padding": "VALID"}, True),
    ("strided", (2, 5, 5), (3, 2, 3, 3), NCHW, {"window_strides": (2, 2), "padding": "SAME"}, True),
    ("padded", (2, 5, 4), (3, 2, 3, 3), NCHW, {"window_strides": (2, 1), "padding": [(2, 0), (0, 3)]}, True),
    (
        "dilated",
        (6, 6, 2),
        (3, 2, 2, 3),
        NHWC,
        {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 3)},
        True,
    ),
    (
        "grouped",
        (5, 5, 4),
        (3, 3, 2, 6),
        NHWC,
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
        False,
    ),
    (
        "depthwise",
        (4, 5, 5),
        (4, 1, 3, 3),
        NCHW,
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
        False,
    ),
    (
        "transposed",
        (3, 3, 2),
        (3, 3, 2, 3),
        NHWC,
        {"window_strides": (1, 1), "padding": [(2, 2), (2, 2)], "lhs_dilation": (2, 2)},
        False,
    ),
    ("of_sequences", (6, 2), (3, 2, 3), ("NHC", "HIO", "NHC"), {"window_strides": (1,), "padding": "SAME"}, True),
    ("of_points", (4, 4, 2), (1, 1, 2, 3), NHWC, {"window_strides": (1, 1), "padding": "VALID"}, True),
):

    def conv_loss(params, x, *, dimensions=dimensions, options=options):
        return readout(lax.conv_general_dilated(x[None], params["w"], dimension_numbers=dimensions, **options))

    add(
        f"convolution_{name}",
        conv_loss,
        {"w": normal(*kernel)},
        examples(*image),
        *(("w",) if recognized else ()),
    )


@case({"w": normal(3, 3, 2, 3), "b": normal(3), "v": normal(3, 2)}, examples(2, 5, 5, 2), "v", "w")
def convolution_of_several_frames(params, x):
    out = lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=NHWC)
    out = jax.nn.relu(out + bias(params["b"], out))
    pooled = lax.reduce_window(out, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return readout(jnp.mean(pooled, (1, 2)) @ params["v"])


@case({"w": normal(1, 2, 6)}, examples(3, 2, 3))
def convolution_with_the_weight_as_its_image(params, x):
    return readout(lax.conv_general_dilated(params["w"], x, (1,), "VALID", dimension_numbers=("NCH", "OIH", "NCH")))


@case({"w": normal(3, 3, 2, 2)}, examples(4, 4, 2))
def convolution_used_twice(params, x):
    def conv(y):
        return lax.conv_general_dilated(y, params["w"], (1, 1), "SAME", dimension_numbers=NHWC)

    return readout(conv(jnp.tanh(conv(x[None]))))


# --- Blocks of models -------------------------------------------------------------------------------------------------


@case(
    {"q": normal(D, 4, 2), "k": normal(D, 2, 2), "v": normal(D, 2, 2), "o": normal(4, 2, D)},
    examples(T, D),
    "q",
    "k",
    "v",
    "o",
)
def grouped_query_attention(params, x):
    q = jnp.einsum("td,dhk->thk", x, params["q"]).reshape(T, 2, 2, 2)  # [T, groups, heads of a group, K]
    k = jnp.einsum("td,dgk->tgk", x, params["k"])
    v = jnp.einsum("td,dgk->tgk", x, params["v"])
    weights = jax.nn.softmax(jnp.einsum("tghk,sgk->ghts", q, k), axis=-1)
    out = jnp.einsum("ghts,sgk->tghk", weights, v).reshape(T, 4, 2)
    return readout(jnp.einsum("thk,hkd->td", out, params["o"]))


@case({"q": normal(D, D), "k": normal(D, D), "v": normal(D, D)}, examples(T, D), "q", "k", "v")
def attention_of_jax(params, x):
    q, k, v = ((x @ params[name]).reshape(T, 2, D // 2) for name in "qkv")
    return readout(jax.nn.dot_product_attention(q, k, v, is_causal=True))


@case({"gate": normal(D, 6), "up": normal(D, 6), "down": normal(6, D)}, examples(T, D), "gate", "up", "down")
def gated_mlp(params, x):
    return readout((jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"])


@case({"router": normal(D, 3), "experts": normal(3, D, 5)}, examples(T, D), "router", "experts")
def soft_mixture_of_experts(params, x):
    gates = jax.nn.softmax(x @ params["router"], axis=-1)
    return readout(jnp.einsum("te,teh->th", gates, jnp.einsum("td,edh->teh", x, params["experts"])))


@case({"router": normal(D, 3), "experts": normal(3, D, 5)}, examples(T, D), "router")
def soft_mixture_in_one_einsum(params, x):
    gates = jax.nn.softmax(x @ params["router"], axis=-1)
    return readout(jnp.einsum("td,edh,te->th", x, params["experts"], gates))


@case({"router": normal(D, 3), "experts": normal(3, D, 5)}, examples(T, D), "router")
def mixture_of_experts_by_gather(params, x):
    logits = x @ params["router"]
    chosen = jnp.argmax(logits, axis=-1)
    gates = jnp.take_along_axis(jax.nn.softmax(logits, -1), chosen[:, None], axis=-1)
    out = jnp.einsum("td,tdh->th", x, params["experts"][chosen])
    return readout(out * bias(gates, out))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    weight: Any
    offset: Any

    def __call__(self, x):
        out = jnp.einsum("td,pd->tp", x, self.weight)
        return out + bias(self.offset, out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    layers: tuple[Linear, ...]
    scale: Any

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.scale * x


@case(
    Network((Linear(normal(5, D), normal(5)), Linear(normal(2, 5), normal(2))), normal()),
    examples(T, D),
    "layers/0/weight",
    "layers/1/weight",
)
def module_that_is_a_dataclass(model, x):
    return readout(model(x))


# --- flax -------------------------------------------------------------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(nn.LayerNorm()(x)))), None


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(V, D, name="embed")(ids)
        blocks = nn.scan(nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(V, name="head")(nn.RMSNorm()(x))


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=(2, 2), name="conv")(x))
        return nn.Dense(2, name="head")(x.reshape(-1))


def of_linen(model, *inputs):
    return filled(jax.eval_shape(model.init, jax.random.key(0), *inputs))


def language_loss(logits, example):
    ids, weight = example
    return weight * jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits[:-1], ids[1:]))


@case(
    of_linen(LinenTransformer(), np.zeros(LENGTH, np.int32)),
    (tokens(LENGTH), examples()),
    "params/embed/embedding",
    "params/head/kernel",
    *(f"params/blocks/{name}/kernel" for name in ("Dense_0", "Dense_1")),
    *(f"params/blocks/MultiHeadDotProductAttention_0/{name}/kernel" for name in ("query", "key", "value", "out")),
    lenient=True,
    tolerance=3e-5,
)
def linen_transformer_with_remat_and_scan(params, example):
    return language_loss(LinenTransformer().apply(params, example[0]), example)


@case(
    of_linen(LinenConv(), np.zeros((5, 5, 2), np.float32)),
    examples(5, 5, 2),
    "params/conv/kernel",
    "params/head/kernel",
    lenient=True,
)
def linen_convolution(params, x):
    return readout(LinenConv().apply(params, x))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=D, decode=False, rngs=rngs)
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)
        self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attention(self.norm(x), mask=np.tri(LENGTH, dtype=bool)[None])
        return self.head(x + self.down(nnx.gelu(self.up(x))))


def of_nnx(make):
    """The structure of a module, its parameters, and whatever else it holds."""
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    return graph, filled(params), rest


NNX_GRAPH, NNX_PARAMS, NNX_REST = of_nnx(NnxTransformer)


@case(
    NNX_PARAMS,
    (tokens(LENGTH), examples()),
    "embed/embedding/value",
    *(f"{name}/kernel/value" for name in ("up", "down", "head")),
    *(f"attention/{name}/kernel/value" for name in ("query", "key", "value", "out")),
    lenient=True,
    tolerance=3e-5,
)
def nnx_transformer(params, example):
    return language_loss(nnx.merge(NNX_GRAPH, params, NNX_REST)(example[0]), example)
