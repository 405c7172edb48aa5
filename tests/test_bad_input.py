"""Bad input: one table. Each case is a typed error that names the value and the remedy, and overwrites nothing."""

import dataclasses
import gzip
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import datasets
from jaxdp.cli import main, run_folder, train

FLAT = jaxdp.flat(1.0)
PARAMS = {"w": jnp.zeros(3), "b": jnp.zeros(())}
X = np.ones((8, 3), np.float32)


def loss(params, x):
    return x @ params["w"] + params["b"]


def plan(**changes):
    settings = {
        "num_examples": 100,
        "expected_batch_size": 10,
        "num_steps": 5,
        "clipping": FLAT,
        "noise_multiplier": 1.0,
        "padded_batch_size": None,
    }
    return jaxdp.plan(**(settings | changes))


def grad(fun=loss, params=PARAMS, batch=X, **kwargs):
    settings = {name: kwargs.pop(name) for name in ("has_aux", "microbatch_size", "clipping") if name in kwargs}
    return jaxdp.clipped_grad(fun, **({"clipping": FLAT} | settings))(params, batch, **kwargs)


def batches(source, **kwargs):
    return next(
        jaxdp.poisson_batches(
            source, plan(**kwargs.pop("plan", {})), kwargs.pop("rng", np.random.default_rng(0)), **kwargs
        )
    )


def step(batch=None, mask=None, state=None, **changes):
    the_plan = plan(**changes)
    init, one_step = jaxdp.make_dp_step(loss, optax.sgd(0.1), the_plan)
    rows = np.ones((the_plan.padded_batch_size, 3), np.float32) if batch is None else batch
    return one_step(init(PARAMS) if state is None else state, rows, mask)


def aggregate(update=None, params=PARAMS, mask=None):
    tx = jaxdp.dp_aggregate(plan(), jax.random.key(0))
    grads = {"w": jnp.zeros((plan().padded_batch_size, 3)), "b": jnp.zeros(plan().padded_batch_size)}
    return tx.update(update or grads, tx.init(PARAMS), params, is_padding_example=mask)


@dataclasses.dataclass(frozen=True)
class Case:
    call: Callable[[], Any]
    error: type[Exception]
    value: str  # what the message must name
    remedy: str  # what it must offer


RAGGED = [np.zeros(3), np.zeros(3), np.zeros(4)] + [np.zeros(3)] * 97
CASES = {
    # Clipping policies.
    "clip_norm_negative": Case(lambda: jaxdp.flat(-1.0), ValueError, "-1.0", "l2_clip_norm must be positive"),
    "clip_norm_nan": Case(lambda: jaxdp.flat(float("nan")), ValueError, "NaN", "l2_clip_norm"),
    "clip_norm_zero": Case(lambda: jaxdp.flat(0.0), ValueError, "0.0", "must be positive"),
    "clip_norm_tiny": Case(lambda: jaxdp.flat(1e-30), ValueError, "1e-30", "Rescale the loss"),
    "clip_norm_text": Case(lambda: jaxdp.flat("1"), TypeError, "'1'", "must be a real number"),  # type: ignore[arg-type]
    "clip_norm_bool": Case(lambda: jaxdp.flat(True), TypeError, "True", "must be a real number"),
    "automatic_infinite": Case(lambda: jaxdp.automatic(np.inf), ValueError, "inf", "positive and finite"),
    "automatic_gamma_tiny": Case(lambda: jaxdp.automatic(gamma=1e-30), ValueError, "1e-30", "gamma must lie in"),
    "group_by_list": Case(
        lambda: grad(clipping=jaxdp.per_layer(1.0, group_by=lambda leaf: [leaf])),
        TypeError,
        "['b']",
        "must return a layer name",
    ),
    "automatic_gamma": Case(lambda: jaxdp.automatic(gamma=0.0), ValueError, "gamma", "positive"),
    "quantile_outside": Case(lambda: jaxdp.quantile(target_quantile=1.0), ValueError, "1.0", "must lie in (0, 1)"),
    "quantile_infinite": Case(lambda: jaxdp.quantile(np.inf), ValueError, "inf", "positive and finite"),
    "allocation_unknown": Case(
        lambda: jaxdp.per_layer(1.0, noise_allocation="equal"),  # type: ignore[arg-type]
        ValueError,
        "'equal'",
        "one of 'global', 'equal_budget', 'least_energy'",
    ),
    "per_layer_empty": Case(lambda: jaxdp.per_layer({}), ValueError, "empty mapping", "one clip norm for each layer"),
    "per_layer_unknown_layer": Case(
        lambda: grad(clipping=jaxdp.per_layer({"w": 1.0, "head": 1.0})),
        ValueError,
        "missing ['b'], unknown ['head']",
        "give one",
    ),
    # Plans.
    "examples_zero": Case(lambda: plan(num_examples=0), ValueError, "got 0", "num_examples must be at least 1"),
    "examples_float": Case(lambda: plan(num_examples=100.0), TypeError, "100.0", "must be an integer"),
    "steps_negative": Case(lambda: plan(num_steps=-3), ValueError, "-3", "num_steps must be at least 1"),
    "sampling_prob_over_one": Case(
        lambda: plan(expected_batch_size=None, sampling_prob=1.5), ValueError, "1.5", "sampling_prob must lie in (0, 1]"
    ),
    "sampling_prob_nan": Case(
        lambda: plan(expected_batch_size=None, sampling_prob=np.nan), ValueError, "NaN", "sampling_prob"
    ),
    "batch_over_dataset": Case(lambda: plan(expected_batch_size=101), ValueError, "101", "at most num_examples"),
    "both_batch_numbers": Case(lambda: plan(sampling_prob=0.1), ValueError, "0.1", "exactly one of"),
    "no_batch_number": Case(lambda: plan(expected_batch_size=None), ValueError, "None", "exactly one of"),
    "noise_negative": Case(lambda: plan(noise_multiplier=-1.0), ValueError, "-1.0", "nonnegative"),
    "noise_next_to_none": Case(
        lambda: plan(noise_multiplier=1e-6), ValueError, "1e-06", "or 0 for a run without privacy"
    ),
    "noise_nan": Case(lambda: plan(noise_multiplier=np.nan), ValueError, "NaN", "noise_multiplier"),
    "noise_and_goal": Case(lambda: plan(target_epsilon=1.0), ValueError, "1.0", "exactly one of"),
    "goal_without_delta": Case(
        lambda: plan(noise_multiplier=None, target_epsilon=1.0), ValueError, "target_delta", "such as 1e-5"
    ),
    "delta_one": Case(lambda: plan(target_delta=1.0), ValueError, "1.0", "target_delta must lie in (0, 1)"),
    "delta_unset": Case(lambda: plan().epsilon(), ValueError, "delta is not set", "pass delta="),
    "delta_below_pld": Case(lambda: plan().epsilon(delta=1e-20), ValueError, "1e-20", "accountant='rdp'"),
    "delta_zero": Case(
        lambda: plan(noise_multiplier=None, target_epsilon=1.0, target_delta=0), ValueError, "got 0", "noise='laplace'"
    ),
    "delta_zero_of_an_epsilon": Case(lambda: plan().epsilon(delta=0.0), ValueError, "got 0.0", "delta such as 1e-5"),
    "epsilon_zero": Case(
        lambda: plan(noise_multiplier=None, target_epsilon=0.0, target_delta=1e-5), ValueError, "0.0", "positive"
    ),
    "clipping_number": Case(lambda: plan(clipping=1.0), TypeError, "1.0", "jaxdp.flat(l2_clip_norm)"),
    "infinite_clip_with_noise": Case(
        lambda: plan(clipping=jaxdp.flat(np.inf)), ValueError, "infinite", "noise_multiplier=0"
    ),
    "relation_text": Case(lambda: plan(neighboring_relation="add"), TypeError, "'add'", "ADD_OR_REMOVE_ONE"),
    "rdp_replace_one": Case(
        lambda: plan(accountant="rdp", neighboring_relation=jaxdp.NeighboringRelation.REPLACE_ONE),
        ValueError,
        "REPLACE_ONE",
        "accountant='pld'",
    ),
    "accountant_unknown": Case(lambda: plan(accountant="gdp"), ValueError, "'gdp'", "one of 'pld', 'rdp'"),
    "padded_over_dataset": Case(lambda: plan(padded_batch_size=200), ValueError, "200", "leave it out"),
    "padded_under_mean": Case(lambda: plan(padded_batch_size=5), ValueError, "5", "microbatch_size"),
    "quantile_count_too_quiet": Case(
        lambda: plan(clipping=jaxdp.quantile(0.1)), ValueError, "it is 0.5", "set count_stddev to about 2"
    ),
    "noise_unknown": Case(lambda: plan(noise="uniform"), ValueError, "'uniform'", "one of 'gaussian', 'laplace'"),
    "laplace_per_layer": Case(
        lambda: plan(noise="laplace", clipping=jaxdp.per_layer(1.0)), ValueError, "per-layer", "noise='gaussian'"
    ),
    "laplace_quantile": Case(
        lambda: plan(noise="laplace", clipping=jaxdp.quantile(1.0)), ValueError, "quantile", "jaxdp.flat(C)"
    ),
    "laplace_rdp": Case(
        lambda: plan(noise="laplace", accountant="rdp"), ValueError, "accountant='rdp'", "accountant='pld'"
    ),
    "laplace_delta_negative": Case(
        lambda: plan(noise="laplace", target_delta=-1e-5), ValueError, "-1e-05", "target_delta must lie in (0, 1)"
    ),
    "laplace_gradients": Case(
        lambda: step(noise="laplace"), ValueError, "noise='laplace'", "jaxdp.zeroth_order.make_step"
    ),
    "laplace_aggregate": Case(
        lambda: jaxdp.dp_aggregate(plan(noise="laplace"), jax.random.key(0)),
        ValueError,
        "noise='laplace'",
        "Plan with noise='gaussian'",
    ),
    # Functions, parameters and batches.
    "loss_vector": Case(lambda: grad(lambda p, x: x * p["w"]), ValueError, "shape (3,)", "without the batch axis"),
    "loss_tuple": Case(lambda: grad(lambda p, x: (loss(p, x), x)), TypeError, "it returned (", "has_aux=True"),
    "loss_not_tuple": Case(lambda: grad(has_aux=True), TypeError, "has_aux=True", "must return (loss, aux)"),
    "loss_integer": Case(lambda: grad(lambda p, x: jnp.int32(1)), TypeError, "int32", "floating-point loss"),
    "method_unknown": Case(
        lambda: jaxdp.clipped_grad(lambda p, x: p, clipping=FLAT, method="fast"),
        ValueError,
        "'fast'",
        "'book_keeping'",  # type: ignore[arg-type]
    ),
    "method_needs_per_layer_clipping": Case(
        lambda: jaxdp.clipped_grad(lambda p, x: p, clipping=FLAT, method="per_layer"),
        ValueError,
        "flat clipping",
        "jaxdp.per_layer",
    ),
    "stacked_matches_nothing": Case(
        lambda: jaxdp.per_layer(1.0, stacked="layers").groups({"blocks": jnp.ones((2, 3))}),
        ValueError,
        "'layers'",
        "blocks",
    ),
    "stacked_scalar": Case(
        lambda: jaxdp.per_layer(1.0, stacked="scale").groups({"scale": jnp.float32(1.0)}),
        ValueError,
        "'scale'",
        "axis of layers",
    ),
    "stacked_not_a_path": Case(lambda: jaxdp.per_layer(1.0, stacked=[3]), TypeError, "3", "'blocks'"),  # type: ignore[list-item]
    "fun_not_callable": Case(lambda: jaxdp.clipped_grad(3, clipping=FLAT), TypeError, "3", "callable as fun(params"),  # type: ignore[arg-type]
    "params_integer": Case(
        lambda: grad(params={"w": jnp.zeros(3), "table": {"ids": jnp.arange(3)}}),
        TypeError,
        "table/ids",
        "close over the rest",
    ),
    "params_python_float": Case(lambda: grad(params={"w": 1.0}), TypeError, "'w' is 1.0", "jnp.asarray"),
    "params_empty": Case(lambda: grad(params={}), ValueError, "no array leaves", "nothing to differentiate"),
    "batch_scalar": Case(lambda: grad(batch=np.float32(1.0)), ValueError, "scalar", "value[None]"),
    "batch_disagrees": Case(
        lambda: grad(batch={"x": X, "y": X[:7]}), ValueError, "'x': 8, 'y': 7", "stack the same examples"
    ),
    "batch_of_none": Case(lambda: grad(batch=X[:0]), ValueError, "size 0", "is_padding_example"),
    "mask_integers": Case(
        lambda: grad(is_padding_example=np.zeros(8, np.int32)), TypeError, "int32", "must be boolean"
    ),
    "mask_shape": Case(
        lambda: grad(is_padding_example=np.zeros(7, bool)), ValueError, "(7,)", "one entry for each row"
    ),
    "microbatch_zero": Case(lambda: grad(microbatch_size=0), ValueError, "got 0", "microbatch_size must be at least 1"),
    "clip_norms_shape": Case(lambda: grad(clip_norms=jnp.ones(3)), ValueError, "(3,)", "one for each group"),
    # Steps and transformations.
    "step_without_mask": Case(lambda: step(), ValueError, "is_padding_example is missing", "jaxdp.poisson_batches"),
    "step_wrong_rows": Case(
        lambda: step(batch=X, mask=np.zeros(8, bool)), ValueError, "batch has 8 rows", "poisson_batches"
    ),
    "step_foreign_state": Case(lambda: step(state=PARAMS), TypeError, "dict", "TrainingState of init"),
    "tx_missing": Case(
        lambda: jaxdp.make_dp_step(loss, None, plan()),
        TypeError,
        "None",
        "optax.adam",  # type: ignore[arg-type]
    ),
    "plan_missing": Case(
        lambda: jaxdp.make_dp_step(loss, optax.sgd(0.1), {"sigma": 1}),
        TypeError,
        "dict",
        "jaxdp.plan",  # type: ignore[arg-type]
    ),
    "key_integer": Case(lambda: jaxdp.dp_aggregate(plan(), 0), TypeError, "int", "jaxdp.secret_key()"),  # type: ignore[arg-type]
    "key_raw": Case(
        lambda: jaxdp.dp_aggregate(plan(), jax.random.PRNGKey(0)), TypeError, "typed", "jaxdp.secret_key()"
    ),
    "key_array": Case(
        lambda: jaxdp.dp_aggregate(plan(), jax.random.split(jax.random.key(0))), ValueError, "(2,)", "single key"
    ),
    "aggregate_trees": Case(
        lambda: aggregate({"w": jnp.zeros((32, 3))}), ValueError, "differ in structure", "exactly the pytree"
    ),
    "aggregate_without_params": Case(lambda: aggregate(params=None), ValueError, "needs params", "pass params"),
    "aggregate_mean_gradient": Case(
        lambda: aggregate({"w": jnp.zeros(3), "b": jnp.zeros(())}), ValueError, "'b'", "per-example gradients"
    ),
    "step_inside_jit": Case(
        lambda: jax.jit(lambda s: step(state=s, mask=np.zeros(plan().padded_batch_size, bool)))(
            dataclasses.replace(
                jaxdp.make_dp_step(loss, optax.sgd(0.1), plan())[0](PARAMS), ledger=jaxdp.Ledger().record(plan())
            )
        ),
        TypeError,
        "ledger on the host",
        "outside jax.jit",
    ),
    # Data.
    "source_empty": Case(lambda: batches([]), ValueError, "source is empty", "no example"),
    "source_empty_array": Case(lambda: batches(np.zeros((0, 3))), ValueError, "source is empty", "no example"),
    "source_length": Case(lambda: batches(np.zeros((99, 3))), ValueError, "99", "num_examples=len(source)"),
    "source_iterator": Case(lambda: batches(iter([1, 2])), TypeError, "list_iterator", "load an iterable"),
    "source_disagrees": Case(
        lambda: batches((np.zeros((100, 3)), np.zeros(99))), ValueError, "100", "stack the same examples"
    ),
    "source_ragged": Case(
        lambda: batches(RAGGED, plan={"expected_batch_size": 100}), ValueError, "(3,)", "pad or crop every example"
    ),
    "source_ragged_in_memory": Case(lambda: batches(RAGGED), ValueError, "(4,)", "pad or crop every example"),
    "source_types": Case(lambda: batches([1] + [0.5] * 99), ValueError, "float64", "one type"),
    "resume_with_generator": Case(
        lambda: batches(np.zeros(100), start_step=3), ValueError, "start_step=3", "np.random.SeedSequence(entropy)"
    ),
    "source_structure": Case(
        lambda: batches([{"x": 1.0}] * 99 + [{"y": 1.0}], plan={"expected_batch_size": 100}),
        ValueError,
        "'y'",
        "same fields",
    ),
    "source_text": Case(lambda: batches([{"text": "a"}] * 100), TypeError, "'text'", "tokenize"),
    "rng_integer": Case(lambda: batches(np.zeros(100), rng=0), TypeError, "int", "np.random.default_rng()"),
    "start_step_negative": Case(lambda: batches(np.zeros(100), start_step=-1), ValueError, "-1", "start_step"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_a_typed_error_with_the_value_and_the_remedy(name):
    case = CASES[name]
    with pytest.raises(case.error) as caught:
        case.call()
    assert type(caught.value) is case.error
    message = str(caught.value)
    assert case.value in message, message
    assert case.remedy in message, message


def test_the_table_is_long_enough():
    assert len(CASES) + len(IDX_FILES) + len(COMMAND_LINES) >= 40


# Damaged IDX files.
def idx(shape=(2, 28, 28), payload=None, magic=b"\x00\x00\x08"):
    payload = bytes(int(np.prod(shape))) if payload is None else payload
    return magic + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + payload


IDX_FILES = {
    "truncated": (idx()[:-5], False, "holds 1563"),
    "too_long": (idx() + b"\0", False, "holds 1569"),
    "truncated_header": (idx()[:9], False, "ends inside its header"),
    "empty": (b"", False, "not an IDX file"),
    "not_idx": (b"<html>404</html>", False, "not an IDX file"),
    "wrong_type": (idx(magic=b"\x00\x00\x0d"), False, "not an IDX file of unsigned bytes"),
    "truncated_gzip": (gzip.compress(idx())[:-9], True, "incomplete"),
    "not_gzip": (idx(), True, "incomplete"),
}


@pytest.mark.parametrize("name", IDX_FILES)
def test_damaged_idx_files_are_named(name, tmp_path):
    data, gzipped, message = IDX_FILES[name]
    path = tmp_path / ("images.gz" if gzipped else "images")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.read_idx(path)
    assert str(path) in str(caught.value)


# Command lines: exit code 2, one line on stderr, nothing written.
COMMAND_LINES = {
    "mnist_without_folder": (["--dataset", "mnist"], "--data-dir"),
    "mnist_missing_files": (["--dataset", "mnist", "--data-dir", "."], "train-images-idx3-ubyte"),
    "cnn_on_digits": (["--model", "cnn"], "--model mlp"),
    "privacy_and_none": (["--no-privacy", "--target-epsilon", "1"], "contradicts"),
    "two_goals": (["--target-epsilon", "1", "--noise-multiplier", "1"], "exactly one"),
    "two_batch_sizes": (["--expected-batch-size", "10", "--sampling-prob", "0.1"], "exactly one"),
    "learning_rate": (["--learning-rate", "-1"], "learning_rate must be positive"),
    "momentum": (["--momentum", "nan"], "momentum is NaN"),
    "checkpoint_every": (["--checkpoint-every", "0"], "checkpoint_every must be at least 1"),
    "resume_nothing": (["--resume"], "no interrupted run"),
    "resume_not_a_run": (["--resume", "--out", "full"], "holds no run to resume"),
    "out_not_empty": (["--out", "full"], "nothing was overwritten"),
    "out_is_a_file": (["--out", "full/precious.txt"], "nothing was overwritten"),
    "out_unwritable": (["--out", "/proc/nowhere/run"], "cannot write to the output folder"),
    "out_under_a_file": (["--out", "full/precious.txt/run"], "cannot write to the output folder"),
}


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_bad_command_lines_exit_2_and_touch_nothing(name, tmp_path, monkeypatch, capsys):
    args, message = COMMAND_LINES[name]
    monkeypatch.chdir(tmp_path)
    pathlib.Path("full").mkdir()
    pathlib.Path("full/precious.txt").write_text("precious")
    with pytest.raises(SystemExit) as caught:
        main(["train", *args])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert [str(path) for path in pathlib.Path(".").rglob("*")] == ["full", "full/precious.txt"]
    assert pathlib.Path("full/precious.txt").read_text() == "precious"


def test_a_checkpoint_of_another_plan_is_refused_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = pathlib.Path("run")
    config = train.Train(num_steps=5, expected_batch_size=64, out=folder)
    run_folder.new_run_folder(folder, "digits")
    settings = {**train.resolved(config), "numpy": np.__version__}
    run_folder.write_config(folder, settings)
    init, _ = jaxdp.make_dp_step(loss, optax.sgd(0.1), plan())
    with jaxdp.Checkpointer(folder / "checkpoints", plan()) as checkpointer:
        checkpointer.save(init(PARAMS))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        main(["train", "--num-steps", "5", "--expected-batch-size", "64", "--out", "run", "--resume"])
    assert "belongs to another plan" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
