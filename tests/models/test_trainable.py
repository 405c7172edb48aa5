"""The trainable part and the frozen part: apart they are everything once, together they are the model."""

import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdp
from jaxdp.models import CHOICES, Lora, add_adapters, join, load_model, parts, split

pytestmark = pytest.mark.unoptimized
GOLDENS = pathlib.Path(__file__).parent / "goldens"
TOKENS = np.random.default_rng(0).integers(0, 96, size=20).astype(np.int32)

names = st.text("abc", min_size=1, max_size=3)
trees = st.recursive(
    st.dictionaries(names, st.integers(0, 9).map(np.asarray), min_size=1, max_size=3),
    lambda branches: st.dictionaries(names, branches | st.integers(0, 9).map(np.asarray), min_size=1, max_size=3),
    max_leaves=8,
)


def paths(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat}


def is_empty(branch):
    return isinstance(branch, dict) and not branch


def leaves_of(part):
    """Paths without the index of a segment."""
    if not isinstance(part.get("blocks"), tuple):
        return paths(part)
    rest = {name: branch for name, branch in part.items() if name != "blocks"}
    return paths(rest) | {path for segment in part["blocks"] for path in paths({"blocks": segment})}


@hypothesis.given(tree=trees, chosen=st.sets(names))
def test_joining_what_was_split_gives_it_back(tree, chosen):
    trainable, frozen = split(tree, lambda path: path.split("/")[-1] in chosen)
    joined = join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(tree), strict=True))


@hypothesis.given(tree=trees, chosen=st.sets(names))
def test_every_leaf_is_in_one_part_and_no_branch_is_empty(tree, chosen):
    parts_of_it = split(tree, lambda path: path.split("/")[-1] in chosen)
    assert not paths(parts_of_it[0]) & paths(parts_of_it[1])
    assert paths(parts_of_it[0]) | paths(parts_of_it[1]) == paths(tree)
    assert all(path.split("/")[-1] in chosen for path in paths(parts_of_it[0]))
    for part in parts_of_it:
        assert not part or not any(isinstance(leaf, dict) for leaf in jax.tree.leaves(part, is_leaf=is_empty))


@pytest.fixture(scope="module")
def adapted():
    """A model with adapters on queries, and with biases; its parameters, with random adapters."""
    base = load_model(GOLDENS / "llama_tied")
    model, params = add_adapters(jax.random.key(0), base.model, base.params, Lora(2, 4, ("q", "down")))
    rng = np.random.default_rng(3)
    for layer in (params["blocks"]["attention"]["q"], params["blocks"]["mlp"]["down"]):
        layer["lora_b"] = rng.normal(0, 0.1, layer["lora_b"].shape).astype(np.float32)
    return model, params


def loss(model, params, tokens=TOKENS):
    return jnp.mean(jnp.square(model.logits(params, tokens)))


@pytest.fixture(scope="module")
def logits_of_the_whole(adapted):
    model, params = adapted
    return np.asarray(jax.jit(model.logits)(params, TOKENS))


@pytest.fixture(scope="module")
def gradient_of_the_whole(adapted):
    model, params = adapted
    return jax.jit(jax.grad(lambda params: loss(model, params)))(params)


@pytest.mark.parametrize(("how", "last_k"), [*((how, None) for how in CHOICES[:-1]), ("last-k", 1), ("last-k", 2)])
def test_the_parts_together_have_the_logits_of_the_whole(how, last_k, adapted, logits_of_the_whole):
    model, params = adapted
    trainable, frozen = parts(model, params, how, last_k=last_k)
    logits = jax.jit(lambda trainable, frozen: model.logits(join(trainable, frozen), TOKENS))(trainable, frozen)
    np.testing.assert_allclose(logits, logits_of_the_whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "last_k", "is_trainable"),
    [
        ("full", None, lambda path: True),
        ("lora", None, lambda path: "/lora_" in path),
        ("ffa-lora", None, lambda path: path.endswith("/lora_b")),
        ("bitfit", None, lambda path: path.endswith("/bias")),
        ("last-k", 1, lambda path: path.startswith("blocks/")),
        ("last-k", 2, lambda path: path.startswith("blocks/")),
    ],
)
def test_each_way_trains_its_own_leaves_and_no_other(how, last_k, is_trainable, adapted):
    model, params = adapted
    trainable, frozen = parts(model, params, how, last_k=last_k)
    assert leaves_of(trainable) == {path for path in paths(params) if is_trainable(path)}
    if last_k is None:
        assert leaves_of(frozen) == paths(params) - leaves_of(trainable)
    else:
        sizes = [jax.tree.leaves(segment)[0].shape[0] for segment in (*frozen["blocks"], *trainable["blocks"])]
        assert sizes == ([1, 1] if last_k == 1 else [2])
        assert frozen.keys() == {"embed", "head", "blocks"}


@pytest.mark.parametrize(("how", "last_k"), [("lora", None), ("ffa-lora", None), ("bitfit", None), ("last-k", 1)])
def test_the_gradient_has_the_trainable_leaves_alone_and_is_that_of_the_whole(
    how, last_k, adapted, gradient_of_the_whole
):
    model, params = adapted
    trainable, frozen = parts(model, params, how, last_k=last_k)
    grad = jax.jit(jax.grad(lambda trainable, frozen: loss(model, join(trainable, frozen))))(trainable, frozen)
    whole, _ = parts(model, gradient_of_the_whole, how, last_k=last_k)
    assert jax.tree.structure(grad) == jax.tree.structure(trainable)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.max(np.abs(b)))))
        assert np.any(a)


def test_per_example_clipping_sees_the_trainable_leaves_alone(adapted):
    model, params = adapted
    batch = np.random.default_rng(5).integers(0, 96, size=(3, 8)).astype(np.int32)
    trainable, frozen = parts(model, params, "ffa-lora")
    grad_fn = jaxdp.clipped_grad(
        lambda trainable, tokens: loss(model, join(trainable, frozen), tokens), clipping=jaxdp.flat(1e-2)
    )
    clipped, _ = jax.jit(grad_fn)(trainable, batch)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(clipped)))
    assert jax.tree.structure(clipped) == jax.tree.structure(trainable)
    assert 0 < norm <= 3e-2


def test_bitfit_without_biases_is_refused():
    llama = load_model(GOLDENS / "llama3")
    with pytest.raises(ValueError, match=r"no biases.*'lora'"):
        parts(llama.model, llama.params, "bitfit")


@pytest.mark.parametrize("how", ["lora", "ffa-lora"])
def test_adapters_that_are_not_there_cannot_be_trained(how):
    llama = load_model(GOLDENS / "llama3")
    with pytest.raises(ValueError, match=r"no adapters.*add_adapters"):
        parts(llama.model, llama.params, how)


@pytest.mark.parametrize(
    ("how", "last_k", "error", "message"),
    [
        ("last-k", 3, ValueError, "at most 2"),
        ("last-k", 0, ValueError, "at least 1"),
        ("last-k", 1.0, TypeError, "must be an integer"),
        ("last-k", None, ValueError, "number of blocks with 'last-k'"),
        ("full", 1, ValueError, "number of blocks with 'last-k'"),
        ("qlora", None, ValueError, "one of 'full', 'lora', 'ffa-lora', 'bitfit', 'last-k'; got 'qlora'"),
    ],
)
def test_bad_choices_are_refused_with_the_remedy(how, last_k, error, message, adapted):
    with pytest.raises(error, match=message):
        parts(*adapted, how, last_k=last_k)


def test_parts_that_do_not_belong_together_are_refused(adapted):
    model, params = adapted
    trainable, frozen = parts(model, params, "last-k", last_k=1)
    with pytest.raises(ValueError, match=r"'blocks' is in both parts"):
        join(params, frozen)
    with pytest.raises(TypeError, match="blocks is a tuple"):
        split(join(trainable, frozen), lambda path: True)
    with pytest.raises(ValueError, match="in segments already"):
        parts(model, join(trainable, frozen), "last-k", last_k=1)
