"""How tests start `jaxdp` as a person does: in a process of its own."""

import os
import pathlib

from tests import unoptimized


def user_environment() -> dict[str, str]:
    """Nothing of the tests' own configuration, but for the compilation cache, and the options of a test marked `unoptimized`."""
    root = str(pathlib.Path(__file__).parents[1])
    configured = ("JAX_", "XLA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(configured) or "CACHE" in name}
    # A process compiles the small programs that every other one does: they are kept too.
    cached = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags = {"XLA_FLAGS": unoptimized.xla_flags()} if unoptimized.xla_flags() else {}
    return kept | cached | flags | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
