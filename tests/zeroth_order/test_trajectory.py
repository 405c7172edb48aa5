"""A journal holds the run: whatever the moment of a kill, what it says is a step that was finished."""

import itertools

import jax
import numpy as np
import pytest

from jaxdp.zeroth_order import Journal, Placement, Sgd, TwoSided, header_of, make_step, read_trajectory, replayed
from tests.zeroth_order.models import bits, toy, toy_batch, toy_params

pytestmark = pytest.mark.unoptimized  # all alike; test_training compares bits as users compile
K = 2


@pytest.fixture
def steps():
    return make_step(toy(), Sgd(1e-2), estimator=TwoSided(K))


@pytest.fixture
def finished(steps, key, tmp_path):
    """A journal of five steps with a flush inside, and the parameters after each step."""
    base, path = toy_params(), tmp_path / "run.trajectory"
    state, after = steps.init(base, direction_key=key), []
    with Journal.create(path, header_of(steps, base, key)) as journal:
        for t in range(5):
            state, info = steps.step(state, toy_batch(seed=t))
            journal.append(t, info.scalars)
            if t == 2:
                state = steps.flush(state)
                journal.append_flush(t + 1)
            after.append(t)
    return path, bits(steps.flush(state).params())


def test_replay_is_the_run(steps, key, finished):
    path, expected = finished
    trajectory = read_trajectory(path)
    assert trajectory.num_steps == 5
    state = replayed(steps, steps.init(toy_params(), direction_key=key), trajectory)
    assert bits(steps.flush(state).params()) == expected
    streamed = make_step(toy(), Sgd(7.0), estimator=TwoSided(K, 0.5), placement=Placement(True))
    state = replayed(streamed, streamed.init(toy_params(), direction_key=key), trajectory)
    assert bits(streamed.flush(state).params()) == expected
    assert path.stat().st_size < 600


def test_a_run_cut_anywhere_goes_on_to_the_same_bits(steps, key, finished, tmp_path):
    """A kill while a record is written loses that step alone; running it again gives the very run."""
    path, expected = finished
    content = path.read_bytes()
    whole = read_trajectory(path)
    size = (len(content) - len(content[: whole.num_bytes])) or (9 + 4 * K + 4)
    begin = len(content) - 6 * size
    cut = tmp_path / "cut"
    for end in (begin, begin + 1, begin + size - 1, begin + 3 * size + 5, begin + 4 * size, len(content) - 1):
        cut.write_bytes(content[:end])
        journal, trajectory = Journal.resume(cut)
        assert trajectory.records == () or trajectory.num_bytes == begin + (end - begin) // size * size
        state = replayed(steps, steps.init(toy_params(), direction_key=key), trajectory)
        with journal:
            for t in range(state.step, 5):
                state, info = steps.step(state, toy_batch(seed=t))
                journal.append(t, info.scalars)
        assert bits(steps.flush(state).params()) == expected
        assert read_trajectory(cut).num_steps == 5


def test_a_torn_last_record_is_left_out(finished, tmp_path):
    """Blocks of zeros at the end, as some file systems leave them after a power cut."""
    path, _ = finished
    content = path.read_bytes()
    torn = tmp_path / "torn"
    torn.write_bytes(content[:-4] + bytes(4))
    assert read_trajectory(torn).num_steps == 4


def test_damage_inside_is_named(finished, tmp_path):
    path, _ = finished
    content = bytearray(path.read_bytes())
    size = 9 + 4 * K + 4
    bad = tmp_path / "bad"
    for offset in range(-5 * size, -2 * size, 7):
        damaged = bytearray(content)
        damaged[offset] ^= 1
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"record \d of .* is damaged"):
            read_trajectory(bad)


def test_headers_are_checked(finished, tmp_path):
    path, _ = finished
    content = path.read_bytes()
    bad = tmp_path / "bad"
    bad.write_bytes(b"PK" + content[2:])
    with pytest.raises(ValueError, match="not a jaxdp trajectory"):
        read_trajectory(bad)
    for damaged in (content[:10], content[:40], content[:20] + b"x" + content[21:]):
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"header of .* is damaged"):
            read_trajectory(bad)


def test_another_run_is_refused(steps, key, finished):
    trajectory = read_trajectory(finished[0])
    other = steps.init(jax.tree.map(lambda leaf: leaf + 1, toy_params()), direction_key=key)
    with pytest.raises(ValueError, match="fingerprint"):
        replayed(steps, other, trajectory)
    other = steps.init(toy_params(), direction_key=jax.random.key(1))
    with pytest.raises(ValueError, match="direction key"):
        replayed(steps, other, trajectory)
    decaying = make_step(toy(), Sgd(1e-2, weight_decay=0.1), estimator=TwoSided(K))
    other = decaying.init(toy_params(), direction_key=key)
    with pytest.raises(ValueError, match="weight_decay"):
        replayed(decaying, other, trajectory)


def test_a_journal_is_never_overwritten(steps, key, finished):
    with pytest.raises(FileExistsError):
        Journal.create(finished[0], header_of(steps, toy_params(), key))


def test_scalars_of_another_run_are_refused(steps, key, tmp_path):
    header = header_of(steps, toy_params(), key)
    wider = make_step(toy(), Sgd(1e-2), estimator=TwoSided(3))
    _, info = wider.step(wider.init(toy_params(), direction_key=key), toy_batch())
    with Journal.create(tmp_path / "t", header) as journal, pytest.raises(ValueError, match="holds 2 projected"):
        journal.append(0, info.scalars)


def test_records_keep_every_bit(steps, key, tmp_path):
    """Scalars come back as they were, subnormal ones and negative zeros included."""
    from jaxdp.zeroth_order import Scalars

    values = np.asarray([[-0.0, 1e-40], [3.4e38, -1.1754944e-38], [0.1, 1 / 3]], np.float32)
    with Journal.create(tmp_path / "t", header_of(steps, toy_params(), key)) as journal:
        for t, row in enumerate(values):
            journal.append(t, Scalars(row, np.float32(1e-7)))
    records = read_trajectory(tmp_path / "t").records
    for record, row in itertools.zip_longest(records, values):
        assert record.projected_gradients.tobytes() == row.tobytes()
        assert record.learning_rate == np.float32(1e-7)
