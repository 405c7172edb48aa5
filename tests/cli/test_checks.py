"""What is checked before a run and after its first updates."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp.cli import meters, plan_check, update_check

pytestmark = pytest.mark.unoptimized
TRAINABLE = {"used": np.ones(3, np.float32), "other": np.ones(2, np.float32)}
FROZEN = {"kernel": np.ones((2, 3), np.float32)}
DATA = {"x": np.ones((20, 2), np.float32)}


def loss_fn(trainable, example, frozen):
    return jnp.sum(jnp.tanh(example["x"] @ frozen["kernel"]) * trainable["used"]) * jnp.sum(trainable["other"])


def plan():
    return jaxdp.plan(
        num_examples=20,
        expected_batch_size=5,
        num_steps=3,
        clipping=jaxdp.flat(1.0),
        noise_multiplier=1.0,
        target_delta=0.01,
    )


def test_a_parameter_that_the_loss_does_not_read_is_refused_by_name():
    def without(trainable, example, frozen):
        return loss_fn(trainable | {"other": jnp.ones(2)}, example, frozen)

    update_check.refuse_unused(loss_fn, jaxdp.flat(1.0), TRAINABLE, FROZEN, DATA)
    with pytest.raises(ValueError, match="trainable parameters other, so that"):
        update_check.refuse_unused(without, jaxdp.flat(1.0), TRAINABLE, FROZEN, DATA)


def test_the_plan_check_names_the_unit_and_what_is_weak_before_the_run():
    weak = jaxdp.plan(
        num_examples=20,
        expected_batch_size=5,
        num_steps=3,
        clipping=jaxdp.flat(1.0),
        noise_multiplier=0.2,
        target_delta=0.01,
    )
    lines = str(plan_check.PlanCheck(weak, 1, None, None, 3, 1, unit="privacy unit")).splitlines()
    assert "(ADD_OR_REMOVE_ONE privacy unit, PLD accountant); noise multiplier 0.2" in lines[1]
    assert lines[2].startswith("  weak        epsilon=")
    assert lines[3].startswith("  weak        delta=0.01 exceeds 0.001: with a chance of up to 1 in 100")
    assert lines[4].startswith("  steps       3, expected batch size 5 of 20 privacy units, padded to")
    assert "weak" not in str(plan_check.PlanCheck(dataclasses.replace(weak, noise_multiplier=0.0), 1, None, None, 3, 1))


def test_what_moved_is_told_from_what_did_not():
    after = {"used": TRAINABLE["used"] + np.float32(1e-7), "other": TRAINABLE["other"].copy()}
    check = update_check.compare(TRAINABLE, after, FROZEN, jax.device_put(FROZEN), step=2)
    assert (check.unmoved, check.moved, check.step) == (("other",), (), 2)
    assert "after 2 steps these trainable parameters have not moved at all: other." in check.warnings()[0]
    # A frozen leaf may be held in fewer bits, and may not have other values in them.
    narrow = {"kernel": jnp.ones((2, 3), jnp.bfloat16)}
    assert update_check.compare(TRAINABLE, after, FROZEN, narrow, step=2).moved == ()
    changed = {"kernel": narrow["kernel"].at[1, 2].set(1.01)}
    assert update_check.compare(TRAINABLE, after, FROZEN, changed, step=2).moved == ("kernel",)


def test_divergence_is_told():
    check = update_check.compare(TRAINABLE, TRAINABLE, FROZEN, FROZEN, step=1)
    ended = update_check.with_non_finite(check, {"used": np.array([1.0, np.nan, 2.0]), "other": np.ones(2)})
    assert ended.non_finite == ("used",)
    assert "used hold NaN or infinity" in ended.warnings()[-1]


def test_the_plan_check_compiles_the_step_that_runs_and_not_another(caplog):
    init, step = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), plan())
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        check = plan_check.plan_check(step, optax.sgd(0.1), plan(), TRAINABLE, FROZEN, DATA)
        state, frozen = init(TRAINABLE), jax.device_put(FROZEN)
        for batch, is_padding_example in jaxdp.poisson_batches(DATA, plan(), np.random.default_rng(0)):
            state, _ = step(state, batch, is_padding_example, frozen)
    compiled = [
        record for record in caplog.records if "Finished XLA compilation of jit(released)" in record.getMessage()
    ]
    assert len(compiled) == 1
    assert check.step_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves((TRAINABLE, FROZEN)))
    assert (check.num_trainable, check.num_frozen) == (5, 6)
    assert "5 trainable of 11 (45.45%)" in str(check)


def test_a_run_is_refused_where_it_cannot_fit_and_only_there(monkeypatch):
    _, step = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), plan())
    check = plan_check.plan_check(step, optax.sgd(0.1), plan(), TRAINABLE, FROZEN, DATA)
    dataclasses.replace(check, available_bytes=check.step_bytes).refuse_if_too_large(["a remedy"])
    dataclasses.replace(check, available_bytes=None).refuse_if_too_large(["a remedy"])
    with pytest.raises(ValueError, match="to make it fit: this, or that"):
        dataclasses.replace(check, available_bytes=check.step_bytes - 1).refuse_if_too_large(["this", "or that"])


def test_a_container_may_have_less_than_its_machine(tmp_path):
    assert meters._left_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    assert meters._left_in_container(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert meters._left_in_container(tmp_path) is None
