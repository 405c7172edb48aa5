"""A process that has loaded what jaxdp is built on, and forks for each run of pytest: most runs are shorter than the loading.

A line of JSON `{"folder": ..., "args": [...], "output": ...}` on stdin is answered by pytest's exit code on stdout.
"""

import importlib
import json
import os
import signal
import sys
import warnings

import pytest

LIBRARIES = (
    "jax",
    "jax.experimental.pallas",
    "optax",
    "flax.nnx",
    "chex",
    "hypothesis.extra.numpy",
    "orbax.checkpoint",
    "dp_accounting",
    "scipy.stats",
    "matplotlib",
)
SECONDS = 300


def run(folder: str, args: list[str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    signal.alarm(SECONDS)
    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take longer to load than most runs
    code = pytest.main(args)
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    # Neither jaxdp, which differs between folders, nor any device of JAX, whose threads would not live on in a fork.
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns of every fork
            child = os.fork()
        if child == 0:
            run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
