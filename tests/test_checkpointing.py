"""Save, load, continue equals the uninterrupted run; what is broken or foreign is refused and nothing is lost."""

import dataclasses
import json
import pathlib
import stat

import chex
import jax
import numpy as np
import optax
import pytest
from scipy import stats

import jaxdp

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.unoptimized]


def make_plan(clipping=None, **kwargs):
    settings = {
        "num_examples": 40,
        "sampling_prob": 0.2,
        "num_steps": 12,
        "padded_batch_size": 16,
        "noise_multiplier": 0.5,
    }
    return jaxdp.plan(clipping=clipping or jaxdp.quantile(0.3, count_stddev=2.0), **(settings | kwargs))


@pytest.fixture
def data():
    rng = np.random.default_rng(5)
    return rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=(40, 2)).astype(np.float32)


def continue_run(state, step, plan, data, seed, until):
    batches = jaxdp.poisson_batches(data, plan, seed, start_step=state.step)
    for _, (batch, mask) in zip(range(until - state.step), batches, strict=False):
        state, _ = step(state, batch, mask)
    return state


def test_save_load_continue_is_the_uninterrupted_run_bit_for_bit(tmp_path, params, loss_fn, data, key):
    plan, seed = make_plan(), np.random.SeedSequence()
    init, step = jaxdp.make_dp_step(loss_fn, optax.adam(0.05), plan)
    whole = continue_run(init(params, noise_key=key), step, plan, data, seed, 12)

    state = continue_run(init(params, noise_key=key), step, plan, data, seed, 5)
    with jaxdp.Checkpointer(tmp_path / "run", plan) as checkpointer:
        checkpointer.save(state, extra={"entropy": str(seed.entropy)})
        state = continue_run(state, step, plan, data, seed, 9)  # steps that the crash forgets
    with jaxdp.Checkpointer(tmp_path / "run", plan) as checkpointer:
        assert checkpointer.latest_step() == 5
        restored, extra = checkpointer.restore(init(params))
    assert restored.step == 5
    np.testing.assert_array_equal(jax.random.key_data(restored.noise_key), jax.random.key_data(state.noise_key))
    resumed = continue_run(restored, step, plan, data, np.random.SeedSequence(int(extra["entropy"])), 12)
    chex.assert_trees_all_equal(
        (resumed.params, resumed.opt_state, resumed.clip_norms), (whole.params, whole.opt_state, whole.clip_norms)
    )
    assert resumed.ledger == whole.ledger
    np.testing.assert_array_equal(jax.random.key_data(resumed.noise_key), jax.random.key_data(whole.noise_key))


def test_a_run_that_is_resumed_with_other_batches_draws_other_noise(tmp_path, key):
    """S8: with the noise of the interrupted run, the difference of two models would be that of two sums, in the clear."""
    width, lost = 4000, np.random.SeedSequence(7)
    rows = np.random.default_rng(0).normal(size=(40, width)).astype(np.float32)

    def run_of(noise_multiplier):
        plan = make_plan(noise_multiplier=noise_multiplier, clipping=jaxdp.flat(1.0), target_delta=1e-5)
        return plan, *jaxdp.make_dp_step(
            lambda w, row: jax.numpy.vdot(w, row), optax.sgd(plan.expected_batch_size), plan
        )

    plan, init, step = run_of(1.0)
    _, _, exact_step = run_of(0.0)
    state = continue_run(init(np.zeros(width, np.float32), noise_key=key), step, plan, rows, lost, 2)
    with jaxdp.Checkpointer(tmp_path / "run", plan) as checkpointer:
        checkpointer.save(state)
        with pytest.raises(ValueError, match=r"start_step=2 with a Generator"):
            jaxdp.poisson_batches(rows, plan, np.random.default_rng(), start_step=2)
        moves = []
        # The run as it was; with fresh entropy; and from its first batch again, start_step forgotten.
        for seed, start in ((lost, 2), (np.random.SeedSequence(), 2), (lost, 0), (lost, 2)):
            moved = []
            for take in (step, exact_step):
                restored, _ = checkpointer.restore(init(np.zeros(width, np.float32)))
                before = np.asarray(restored.params, np.float64)
                batch, mask = next(jaxdp.poisson_batches(rows, plan, seed, start_step=start))
                moved.append(before - np.asarray(take(restored, batch, mask)[0].params))
            moves.append(moved)
    np.testing.assert_array_equal(moves[0][0], moves[3][0])  # the same batches: the same release
    for one, other in ((0, 1), (0, 2), (1, 2)):
        of_sums = moves[one][1] - moves[other][1]
        found = moves[one][0] - moves[other][0] - of_sums
        assert np.abs(of_sums).max() > 1e-3
        assert stats.kstest(found, stats.norm(0, np.sqrt(2)).cdf).pvalue > 1e-3


def test_the_ledger_of_a_changed_plan_is_restored_exactly(tmp_path, params, loss_fn, key):
    first, second = make_plan(), make_plan(noise_multiplier=0.7654321)
    init, _ = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), second)
    state = dataclasses.replace(init(params), ledger=jaxdp.Ledger().record(first, 3).record(second, 4))
    with jaxdp.Checkpointer(tmp_path, second) as checkpointer:
        checkpointer.save(state)
        restored, _ = checkpointer.restore(init(params))
    assert restored.ledger == state.ledger


def test_the_folder_is_readable_by_its_owner_only(tmp_path):
    with jaxdp.Checkpointer(tmp_path / "secret", make_plan()):
        assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o700


def files_under(folder):
    return {path: path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", ["noise_multiplier", "sampling_prob", "num_examples"])
def test_a_checkpoint_of_another_plan_is_refused_by_name(change, tmp_path, params, loss_fn):
    plan = make_plan()
    init, _ = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), plan)
    with jaxdp.Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(init(params))
    before = files_under(tmp_path)
    other = make_plan(**{change: {"noise_multiplier": 0.6, "sampling_prob": 0.21, "num_examples": 41}[change]})
    with (
        jaxdp.Checkpointer(tmp_path, other) as checkpointer,
        pytest.raises(jaxdp.CheckpointError, match=rf"another plan .*{change}"),
    ):
        checkpointer.restore(init(params))
    assert files_under(tmp_path) == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path, params, loss_fn):
    plan = make_plan()
    init, _ = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), plan)
    with jaxdp.Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(init(params))
        wider = {**params, "first": {"kernel": np.zeros((3, 5), np.float32), "bias": np.zeros(5, np.float32)}}
        with pytest.raises(jaxdp.CheckpointError, match=r"does not fit.*first/kernel"):
            checkpointer.restore(init(wider))
        adam_init, _ = jaxdp.make_dp_step(loss_fn, optax.adam(0.1), plan)
        with pytest.raises(jaxdp.CheckpointError, match="does not fit"):
            checkpointer.restore(adam_init(params))


def test_a_half_written_checkpoint_is_never_loaded(tmp_path, params, loss_fn, data, key):
    """Whatever subset of a newer checkpoint's files reached the disk under its temporary name, the older one is loaded."""
    plan, seed = make_plan(), np.random.SeedSequence(1)
    init, step = jaxdp.make_dp_step(loss_fn, optax.adam(0.05), plan)
    state = init(params, noise_key=key)
    with jaxdp.Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(state)
        state = continue_run(state, step, plan, data, seed, 3)
        checkpointer.save(state)
    (tmp_path / "3").rename(tmp_path / "3.orbax-checkpoint-tmp")
    with jaxdp.Checkpointer(tmp_path, plan) as checkpointer:
        assert checkpointer.latest_step() == 0
        restored, _ = checkpointer.restore(init(params))
    assert restored.step == 0


def test_a_damaged_checkpoint_is_a_clear_error(tmp_path, params, loss_fn):
    plan = make_plan()
    init, _ = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), plan)
    with jaxdp.Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(init(params))
    metadata = tmp_path / "0" / "metadata" / "metadata"
    metadata.write_text("{")
    with jaxdp.Checkpointer(tmp_path, plan) as checkpointer, pytest.raises(jaxdp.CheckpointError, match="cannot read"):
        checkpointer.restore(init(params))
    metadata.write_text(json.dumps({"format": 99}))
    with (
        jaxdp.Checkpointer(tmp_path, plan) as checkpointer,
        pytest.raises(jaxdp.CheckpointError, match="another format"),
    ):
        checkpointer.restore(init(params))


def test_a_longer_plan_of_the_same_mechanism_goes_on(tmp_path, params, loss_fn, data, key):
    plan, seed = make_plan(num_steps=3), np.random.SeedSequence(4)
    init, step = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), plan)
    with jaxdp.Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(continue_run(init(params, noise_key=key), step, plan, data, seed, 3))
    longer = plan.replace(num_steps=5)
    init, step = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), longer)
    with jaxdp.Checkpointer(tmp_path, longer) as checkpointer:
        state, _ = checkpointer.restore(init(params))
    assert continue_run(state, step, longer, data, seed, 5).step == 5


def test_checkpoints_of_another_run_are_not_mixed_with_ours(tmp_path, params, loss_fn):
    plan = make_plan()
    init, _ = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), plan)
    with jaxdp.Checkpointer(tmp_path, plan) as checkpointer:
        checkpointer.save(init(params))
    before = files_under(tmp_path)
    with jaxdp.Checkpointer(tmp_path, plan) as checkpointer:
        with pytest.raises(jaxdp.CheckpointError, match="earlier run"):
            checkpointer.save(dataclasses.replace(init(params), ledger=jaxdp.Ledger().record(plan)))
        assert files_under(tmp_path) == before
        checkpointer.restore(init(params))
        checkpointer.save(dataclasses.replace(init(params), ledger=jaxdp.Ledger().record(plan)))


def test_a_folder_with_other_files_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    mode = tmp_path.stat().st_mode
    with pytest.raises(jaxdp.CheckpointError, match=r"thesis\.tex"):
        jaxdp.Checkpointer(tmp_path, make_plan())
    assert tmp_path.stat().st_mode == mode


def test_a_plan_with_a_grouping_function_is_recognized_in_another_process():
    policies = [jaxdp.per_layer(1.0, group_by=first_letter) for _ in range(2)]
    assert "0x" not in repr(policies[0])
    assert repr(policies[0]) == repr(policies[1])


def first_letter(leaf: str) -> str:
    return leaf[0]


def test_an_empty_folder_has_nothing_to_restore(tmp_path, params, loss_fn):
    init, _ = jaxdp.make_dp_step(loss_fn, optax.sgd(0.1), make_plan())
    with jaxdp.Checkpointer(tmp_path, make_plan()) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(jaxdp.CheckpointError, match="no complete checkpoint"):
            checkpointer.restore(init(params))
