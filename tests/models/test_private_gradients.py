"""Every architecture is clipped without a gradient for each example, and exactly as by the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from jaxdp.models import Lora, causal_lm
from tests.models.tiny import CONFIGS

pytestmark = pytest.mark.unoptimized
EXAMPLES, LENGTH = 3, 6
LORA = Lora(2, 4.0, ("all-linear",))
POLICY = jaxdp.flat(0.3)


def tokens_of_batch(model):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, size=(EXAMPLES, LENGTH)).astype(np.int32)


def next_token_loss(logits, tokens):
    likeliest = jnp.take_along_axis(logits[:-1], tokens[1:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits[:-1], axis=-1) - likeliest)


def parts(model, key):
    """The adapters, and the rest; all of the parameters, and nothing, without adapters. Adapters are off their zeros."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), model.init(key))
    if model.lora is None:
        return params, {}
    return split(params)


def split(tree):
    chosen, rest = {}, {}
    for name, branch in tree.items():
        if isinstance(branch, dict):
            inner, outer = split(branch)
            chosen |= {name: inner} if inner else {}
            rest |= {name: outer} if outer else {}
        else:
            (chosen if name.startswith("lora_") else rest)[name] = branch
    return chosen, rest


def join(tree, other):
    return {
        name: join(tree[name], other[name]) if name in tree and name in other else (tree | other)[name]
        for name in tree | other
    }


def assert_same_gradients(loss_fn, params, batch, *, rtol=1e-4, method="auto"):
    both = [jaxdp.clipped_grad(loss_fn, clipping=POLICY, method=each) for each in (method, "vmap")]
    program = jax.jit(lambda params, batch: [grad_fn(params, batch) for grad_fn in both])
    (total, seen), (expected, seen_there) = program(params, batch)
    norms = seen_there.l2_norms
    assert jnp.all(norms > POLICY.total_l2_clip_norm), "nothing was clipped"
    np.testing.assert_allclose(seen.l2_norms, norms, rtol=rtol)
    np.testing.assert_allclose(seen.loss, seen_there.loss, rtol=rtol)
    size = float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(expected))))
    assert size > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=rtol * size), total, expected)


def routes(loss_fn, params, example):
    """The route of every leaf, by its path."""
    explanation = jaxdp.clipped_grad(loss_fn, clipping=POLICY).explain(params, example)
    return {leaf.path: leaf.route for leaf in explanation.leaves}


def assert_no_matrix_is_copied(model, found):
    for path, route in found.items():
        last = path.rpartition("/")[2]
        if last in ("kernel", "lora_a", "lora_b"):
            assert route == "dense", (path, route)
        elif last == "table":
            is_head_too = path == "embed/tokens/table" and model.config.is_tied
            assert route == ("joint" if is_head_too else "embedding"), (path, route)
        else:
            assert last in ("scale", "bias"), path
            assert route == "copy", (path, route)  # vectors: a copy is the cheapest way


# Every architecture, with tied and with untied heads among them; adapters look the same in all.
FULL = ("gpt2", "opt", "opt_post_norm", "llama", "llama_tied", "mistral", "qwen3_tied")
CASES = [*((name, None) for name in FULL), *((name, LORA) for name in ("gpt2", "llama"))]


@pytest.mark.parametrize(("name", "adapters"), CASES, ids=lambda value: value or "full" if value != LORA else "lora")
def test_clipped_gradients_of_every_architecture_equal_the_definition(name, adapters, key):
    model = causal_lm(CONFIGS[name], lora=adapters)
    params, frozen = parts(model, key)
    batch = tokens_of_batch(model)

    def loss_fn(params, tokens):
        return next_token_loss(model.logits(join(params, frozen), tokens), tokens)

    found = routes(loss_fn, params, batch[0])
    assert_no_matrix_is_copied(model, found)
    assert any(route == "dense" for route in found.values())
    assert_same_gradients(loss_fn, params, batch)


def test_so_they_are_with_remat(key):
    model = causal_lm(CONFIGS["llama"])
    params, _ = parts(model, key)
    batch = tokens_of_batch(model)

    def loss_fn(params, tokens):
        return next_token_loss(model.logits(params, tokens, remat=True), tokens)

    assert_no_matrix_is_copied(model, routes(loss_fn, params, batch[0]))
    assert_same_gradients(loss_fn, params, batch)


def test_so_they_are_in_bfloat16(key):
    """The head's product returns float32 of bfloat16 factors."""
    model = causal_lm(CONFIGS["qwen3_tied"], dtype=jnp.bfloat16)
    params, _ = parts(model, key)
    batch = tokens_of_batch(model)

    def loss_fn(params, tokens):
        return next_token_loss(model.logits(params, tokens), tokens)

    assert_no_matrix_is_copied(model, routes(loss_fn, params, batch[0]))
    assert_same_gradients(loss_fn, params, batch, rtol=0.03)


def test_so_they_are_for_the_last_block_alone_and_several_sequences(key):
    """One privacy unit of two sequences; the blocks in segments, of which only the last is trained."""
    model = causal_lm(CONFIGS["llama_tied"])
    params, _ = parts(model, key)
    first, last = (jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params["blocks"]) for i in range(2))
    batch = np.stack([tokens_of_batch(model), tokens_of_batch(model)[:, ::-1]], axis=1)

    def loss_fn(trained, tokens):
        logits = jax.vmap(lambda row: model.logits(params | {"blocks": (first, trained)}, row))(tokens)
        return jnp.mean(jax.vmap(next_token_loss)(logits, tokens))

    assert_no_matrix_is_copied(model, routes(loss_fn, last, batch[0]))
    assert_same_gradients(loss_fn, last, batch)


def test_a_merged_adapter_would_be_copied(key):
    """What the layers avoid: W + A B formed first is no product of an input and a parameter."""
    model = causal_lm(CONFIGS["llama"])
    params, _ = parts(model, key)
    batch = tokens_of_batch(model)
    kernel = params["head"]["out"]["kernel"]
    adapter = {"a": jnp.ones((kernel.shape[0], 2)), "b": jnp.ones((2, kernel.shape[1]))}

    def loss_fn(adapter, tokens):
        merged = params | {"head": params["head"] | {"out": {"kernel": kernel + adapter["a"] @ adapter["b"]}}}
        return next_token_loss(model.logits(merged, tokens), tokens)

    assert "copy" in routes(loss_fn, adapter, batch[0]).values()
