"""Processes of a group must share the noise key of a run and the seed of its batches, or nothing starts."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdp
from jaxdp import zeroth_order as zo
from tests.processes import user_environment

ROOT = pathlib.Path(__file__).parents[1]
PLAN = {"num_examples": 8, "expected_batch_size": 8.0, "num_steps": 2, "noise_multiplier": 1.0}
SECONDS = 60


def starts(plan, params, direction_key):
    """Every way to start a private run, as functions of its noise key."""
    block = zo.BlockModel(lambda r, x: x * r, lambda w, h, x: h * w, lambda r, h, x: jnp.sum(h))
    blocks = zo.BlockParams(jnp.ones(2), jnp.ones((1, 2)))
    loss = lambda p, x: jnp.sum(p * x)  # noqa: E731
    resident = zo.make_resident_step(loss, optax.sgd(1.0), plan=plan)[0]
    return {
        "dp_sgd": lambda key: jaxdp.make_dp_step(loss, optax.sgd(1.0), plan)[0](params, noise_key=key),
        "dp_aggregate": lambda key: jaxdp.dp_aggregate(plan, key).init(params),
        "resident": lambda key: resident(params, direction_key=direction_key, noise_key=key),
        "blocks": lambda key: zo.make_step(block, zo.Sgd(1.0), plan=plan).init(
            blocks, direction_key=direction_key, noise_key=key
        ),
    }


def outcome(function, *args):
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return "started"


def in_one_of_two(address, number):
    """What a process of a group of two does: the outcome of each start, for keys and seeds that agree and that do not."""
    jax.distributed.initialize(address, num_processes=2, process_id=number, initialization_timeout=SECONDS)
    from jax.experimental import multihost_utils

    plan = jaxdp.plan(clipping=jaxdp.flat(1.0), **PLAN)
    own = jaxdp.secret_key()
    words = jax.random.key_data(jaxdp.secret_key())
    shared = jax.random.wrap_key_data(multihost_utils.broadcast_one_to_all(words), impl="threefry2x32")
    params, direction_key = jnp.ones(2), jax.random.key(5)
    found = {"secret": np.asarray(jax.random.key_data(own)).tolist(), "own": {}, "shared": {}}
    for name, start in starts(plan, params, direction_key).items():
        found["own"][name], found["shared"][name] = outcome(start, own), outcome(start, shared)
    start = starts(plan, params, jax.random.key(number))["resident"]
    found["own direction"] = outcome(start, shared)
    other = jaxdp.plan(clipping=jaxdp.flat(1.0 + number), **PLAN)
    found["own plan"] = outcome(starts(other, params, direction_key)["dp_sgd"], shared)
    source = np.ones((8, 2), np.float32)

    def batches(rng, **options):
        return jaxdp.poisson_batches(source, plan, rng, **options)

    found["own rng"] = outcome(batches, np.random.default_rng())
    found["own seed"] = outcome(batches, np.random.SeedSequence(number))
    found["shared seed"] = outcome(batches, np.random.SeedSequence(2**100 + 1))
    found["own start"] = outcome(lambda: batches(np.random.SeedSequence(7), start_step=number))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def group():
    """What two processes on this machine found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = f"from tests.test_many_processes import in_one_of_two; in_one_of_two({address!r}, "
    environment = user_environment() | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code + f"{number})"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for number in (0, 1)
    ]
    end, outputs = time.monotonic() + SECONDS, []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=max(1.0, end - time.monotonic()))
            assert process.returncode == 0, errors[-3000:]
            outputs.append(json.loads(out.strip().splitlines()[-1]))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return outputs


@pytest.mark.parametrize("name", ["dp_sgd", "dp_aggregate", "resident", "blocks"])
def test_a_run_starts_on_a_shared_key_only(group, name):
    for found in group:
        assert "noise_key differs between the 2 processes" in found["own"][name]
        assert "broadcast_one_to_all" in found["own"][name]
        assert not any(str(word) in found["own"][name] for word in found["secret"])
        # Blocks wait on the first device of the group, which is not the second process's: that, not the key, stops it there.
        assert found["shared"][name] == "started" or (name == "blocks" and "addressable" in found["shared"][name])


def test_plan_and_directions_are_shared_too(group):
    for found in group:
        assert found["own direction"].startswith("direction_key differs")
        assert found["own plan"].startswith("plan differs")


def test_batches_are_one_draw_of_all_processes(group):
    for found in group:
        for name in ("own rng", "own seed", "own start"):
            assert found[name].startswith("rng differs between the 2 processes"), name
        assert found["shared seed"] == "started"


@pytest.mark.parametrize("name", ["dp_sgd", "resident", "blocks"])
def test_a_process_of_a_group_draws_no_key_of_its_own(name, monkeypatch):
    start = starts(jaxdp.plan(clipping=jaxdp.flat(1.0), **PLAN), jnp.ones(2), jax.random.key(5))[name]
    start(None)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match=r"without noise_key in one of 3 processes.*broadcast_one_to_all"):
        start(None)


def test_runs_without_privacy_start_as_they_are(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for name in ("resident", "blocks"):
        starts(None, jnp.ones(2), jax.random.key(5))[name](None)
