"""Laws of the noise's keys: no two are equal, none that draws is derived from as well, and a digest tells all inputs apart."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

import jaxdp
from jaxdp import noise, noise_keys
from jaxdp.noise_keys import PIPELINES, Domain, Stream

pytestmark = pytest.mark.unoptimized


def words(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.mark.parametrize(("impl", "sizes"), [("threefry2x32", (3, 4, 5)), ("rbg", (2, 2, 2))])
def test_all_keys_of_a_plan_are_distinct(impl, sizes):
    """Runs, steps, streams, digests and leaves of every pipeline, the user's key as a run's, and what `jax.random` derives."""
    num_runs, num_steps, num_leaves = sizes
    user = jax.random.key(5, impl=impl)
    digests = [jnp.array(pair, jnp.uint32) for pair in ((3, 1), (1, 3), (2**32 - 1, 17))]
    inner, drawn = [user], []
    runs = [noise_keys.run_key(user, pipeline, run) for pipeline in PIPELINES for run in range(num_runs)]
    inner += runs
    for run in [user, *runs]:
        for step in (*range(num_steps - 1), 2**32 - 1):
            inner.append(noise_keys.step_key(run, step))
            streams = noise_keys.stream_keys(inner[-1])
            inner += streams.values()
            for digest in digests:
                gradient, count = (
                    noise_keys.bound_key(streams[name], digest) for name in (Stream.GRADIENT, Stream.COUNT)
                )
                inner.append(gradient)
                drawn += [count, *noise_keys.leaf_keys(gradient, num_leaves)]
    found = [words(key) for key in inner + drawn]
    assert len(found) == 1 + len(runs) + (1 + len(runs)) * num_steps * (1 + 4 + 3 * (2 + num_leaves))
    # A draw reads the words that `fold_in` gives: they must be no keys of ours.
    some = np.array(found[: len(inner) : max(1, len(inner) // 300)], np.uint32)
    chosen = jax.random.wrap_key_data(jnp.asarray(some), impl=impl)
    of_jax = jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(40)))(chosen)
    found += map(tuple, np.asarray(jax.random.key_data(of_jax)).reshape(-1, len(found[0])).tolist())
    assert len(set(found)) == len(found)


def test_the_domains_are_distinct_and_beyond_every_counter_of_a_draw():
    assert len({domain.value for domain in Domain}) == len(Domain.__members__) == 7
    assert min(Domain) > 2**30
    assert max(Domain) < 2**32
    with pytest.raises(ValueError, match="not the domain of a pipeline"):
        noise_keys.run_key(jax.random.key(0), Domain.STEP)


def test_no_key_that_draws_is_equal_to_another_or_to_a_word_of_its_draw(key, monkeypatch):
    """By the keys that three runs of a plan with quantile clipping use: gradient leaves and counts, step by step."""
    drawn = []

    def recorded(key, _original=noise._key_words):
        drawn.append(key)
        return _original(key)

    monkeypatch.setattr(noise, "_key_words", recorded)
    settings = {"num_examples": 8, "sampling_prob": 1.0, "num_steps": 3, "noise_multiplier": 1.0, "target_delta": 1e-3}
    tx = jaxdp.dp_aggregate(jaxdp.plan(clipping=jaxdp.quantile(1.0, count_stddev=2.0), **settings), key)
    params, grads = {"a": jnp.zeros(2), "b": jnp.zeros(())}, {"a": jnp.zeros((8, 2)), "b": jnp.zeros(8)}
    for _ in range(3):
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(grads, state, params)
    found = {words(key) for key in drawn}
    assert len(found) == len(drawn) == 3 * 3 * 3  # runs, steps, two leaves and a count
    read = {words(jax.random.fold_in(key, i)) for key in drawn for i in range(4)}
    assert not found & read


def test_leaf_keys_in_one_go_are_those_one_by_one(key):
    together = [words(found) for found in noise_keys.leaf_keys(key, 5)]
    assert together[:3] == [words(found) for found in noise_keys.leaf_keys(key, 3)]
    by_hand = jax.extend.random.threefry_2x32(jax.random.key_data(key), jnp.uint32([Domain.LEAF, 4]))
    assert together[4] == tuple(by_hand.tolist())


# The digest.

STREAMS = noise_keys.stream_keys(noise_keys.step_key(jax.random.key(3, impl="threefry2x32"), 0))
LEAVES = {"a": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)}
LEAVES |= {
    "b": LEAVES["a"][::-1].copy(),
    "c": LEAVES["a"][0].astype(ml_dtypes.bfloat16),
    "d": np.arange(6, dtype=np.int32),
}


@jax.jit
def compiled_digest(arrays, streams):
    return noise_keys.digest(arrays, streams=streams, facts="")


def digest_of(arrays, streams=STREAMS):
    return tuple(np.asarray(compiled_digest(arrays, streams)).tolist())


def copied():
    return {name: leaf.copy() for name, leaf in LEAVES.items()}


def flipped(array, index, bit):
    """One bit of one entry."""
    raw = array.reshape(-1).view(f"uint{8 * array.itemsize}")
    raw[index % array.size] ^= raw.dtype.type(1 << bit % (8 * array.itemsize))


PLACES = st.tuples(st.sampled_from("abcd"), st.integers(0, 14), st.integers(0, 31))


@given(st.lists(PLACES, min_size=1, max_size=4))
def test_flipped_bits_are_told_apart(places):
    """One bit or a few, anywhere; two flips of one bit are none."""
    changed = copied()
    for name, index, bit in places:
        flipped(changed[name], index, bit)
    is_same = all(changed[name].tobytes() == leaf.tobytes() for name, leaf in LEAVES.items())
    assert (digest_of(changed) == digest_of(LEAVES)) == is_same


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 14)), min_size=2, max_size=6, unique=True))
def test_changed_signs_are_told_apart(places):
    """A linear sum mod 2^32 is blind to every pair of them."""
    changed = copied()
    for name, index in places:
        changed[name].reshape(-1)[index] *= -1
    assert digest_of(changed) != digest_of(LEAVES)


@given(st.permutations(range(15)), st.permutations(range(6)))
def test_permutations_are_told_apart(order, integers):
    changed = copied()
    changed["a"] = LEAVES["a"].reshape(-1)[order].reshape(3, 5)
    changed["d"] = LEAVES["d"][integers]
    is_same = order == sorted(order) and integers == sorted(integers)
    assert (digest_of(changed) == digest_of(LEAVES)) == is_same


def test_leaves_rows_zeros_shapes_dtypes_facts_and_keys_are_told_apart():
    zero, moved, negative = (np.zeros((2, 3), np.float32) for _ in range(3))
    zero[0, 0], moved[1, 2], negative[0, 0], negative[1, 1] = 1, 1, 1, -0.0
    cases = [
        LEAVES,
        LEAVES | {"a": LEAVES["b"], "b": LEAVES["a"]},
        LEAVES | {"a": LEAVES["a"][[1, 0, 2]]},
        LEAVES | {"a": LEAVES["a"].reshape(5, 3)},
        LEAVES | {"d": LEAVES["d"].astype(np.uint32)},
        *({"x": case} for case in (zero, moved, negative, zero[:, :2], zero.reshape(-1), zero.T.copy())),
        {"x": zero, "y": np.zeros(0, np.float32)},
        {"x": zero, "y": np.zeros((0, 2), np.float32)},
        {"x": zero, "y": np.zeros((), np.float32)},
        {"x": zero[0, 0]},
        {},
    ]
    found = [digest_of(case) for case in cases]
    found.append(tuple(np.asarray(noise_keys.digest(LEAVES, streams=STREAMS, facts="another")).tolist()))
    for step, impl in ((1, "threefry2x32"), (0, "rbg")):
        other = noise_keys.stream_keys(noise_keys.step_key(jax.random.key(3, impl=impl), step))
        found.append(digest_of(LEAVES, other))
    assert len(set(found)) == len(found) == len(cases) + 3


DTYPES = [
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float4_e2m1fn",
    "int4",
    "uint4",
    "int8",
    "uint8",
    "int16",
    "int32",
    "uint32",
    "bool",
    "complex64",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_counts_in_every_entry(dtype):
    array = np.array([0, 1, 1, 1, 0, 0])
    changed = [array, *(array ^ (np.arange(6) == i) for i in range(6)), array[[0, 3, 1, 4, 2, 5]]]
    cases = [jnp.asarray(case).astype(dtype).reshape(2, 3) for case in changed]
    assert len({digest_of(case) for case in cases}) == len(cases) == 8


def test_entries_of_64_bits_count_in_both_halves():
    with jax.enable_x64(True):
        for one in (jnp.arange(4, dtype=jnp.int64), jnp.linspace(0, 1, 4, dtype=jnp.float64)):
            raw = np.asarray(one).view(np.uint64)
            changed = [raw, raw ^ np.uint64(1), raw ^ np.uint64(1 << 32), raw ^ np.uint64(1 << 63), raw[::-1]]
            found = {digest_of(jnp.asarray(case.copy().view(one.dtype))) for case in changed}
            assert len(found) == len(changed)


def test_typed_keys_count():
    keys = jax.random.split(jax.random.key(0), 3)
    assert len({digest_of(keys), digest_of(keys[::-1]), digest_of(jax.random.key_data(keys))}) == 3


def test_the_digest_is_the_same_in_every_program_and_on_every_mesh():
    """Compiled or not, among other things, and sharded over two devices without an array that is gathered or copied."""
    arrays = {
        "x": np.random.default_rng(1).normal(size=(64, 32)).astype(np.float32),
        "y": np.arange(256, dtype=np.int32),
    }
    expected = digest_of(arrays)
    with jax.disable_jit():
        assert tuple(np.asarray(noise_keys.digest(arrays, streams=STREAMS, facts="")).tolist()) == expected
    busy = jax.jit(lambda a, s: (compiled_digest(a, s), a["x"] @ a["x"].T, jnp.sum(a["y"])))
    assert tuple(np.asarray(busy(arrays, STREAMS)[0]).tolist()) == expected
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), (None, "data")))
    for sharding in (rows, columns):
        placed = {"x": jax.device_put(arrays["x"], sharding), "y": jax.device_put(arrays["y"], rows)}
        streams = jax.device_put(STREAMS, NamedSharding(mesh, PartitionSpec()))
        assert digest_of(placed, streams) == expected
        program = compiled_digest.lower(placed, streams).compile()
        gathered = [line for line in program.as_text().splitlines() if " all-gather" in line or " all-to-all" in line]
        assert not [line for line in gathered if "[64,32]" in line or "[256]" in line or "[64,16]" in line]
        assert program.memory_analysis().temp_size_in_bytes < arrays["x"].nbytes // 2


def test_changes_of_two_entries_cancel_in_neither_sum():
    """Over 2^18 constants. As many pairs of a linear sum of odd multiples: every pair of sign flips cancels."""
    constants = jnp.asarray(np.random.default_rng(2).integers(0, 2**32, (2**18, 6), dtype=np.uint32))
    both = jax.jit(jax.vmap(noise_keys._sums, (None, 0)))
    one = np.float32([1.0, 1.5])
    for bit in (31, 30, 15, 0):
        other = (one.view(np.uint32) ^ np.uint32(1 << bit)).view(np.float32)
        changes = both(one.view(np.uint32), constants) - both(other.view(np.uint32), constants)
        assert np.all(np.sum(np.asarray(changes) == 0, axis=0) <= 1), bit
        swapped = both(one.view(np.uint32), constants) - both(one[::-1].view(np.uint32), constants)
        assert np.all(np.sum(np.asarray(swapped) == 0, axis=0) <= 1)
    odd = np.asarray(constants)[:, :2] | 1
    assert not np.any(((odd << 31).sum(axis=1, dtype=np.uint32)) != 0)


def test_words_of_the_digest_are_uniform():
    """Those of one input under 20,000 keys: all 64 bits are fair and independent."""
    keys = jax.random.split(jax.random.key(11, impl="threefry2x32"), 20_000)
    found = np.asarray(jax.jit(jax.vmap(lambda key: compiled_digest(LEAVES, noise_keys.stream_keys(key))))(keys))
    fair = (found[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(fair.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(found))
    for column in found.T:
        assert stats.kstest(column / 2**32, stats.uniform.cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(fair.reshape(len(found), 64).T) - np.eye(64)).max() < 6 / np.sqrt(len(found))


def test_tracers_are_refused_with_the_remedy():
    noise_keys.refuse_tracers("start", {"w": np.zeros(3)}, None)
    for transformed in (jax.jit, jax.vmap, lambda f: functools.partial(jax.eval_shape, f)):
        with pytest.raises(TypeError, match=r"start was called inside .* Call it outside; .* the shapes of its result"):
            transformed(lambda x: noise_keys.refuse_tracers("start", x))(jnp.zeros(3))
