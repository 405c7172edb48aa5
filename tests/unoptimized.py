"""Programs compiled in a hurry, for tests marked `unoptimized`: their laws are of values within tolerances.

Most of the suite's time is compilation, and most of that is LLVM's passes and XLA's fusion emitters. A test whose law is of
bits across programs, of rounding, of the memory or the number of programs compiles as a user does, and has no mark.
"""

import functools
from typing import Any

import jax
from jax._src import compiler

OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
_is_on = False
_compile_options = compiler.get_compile_options  # JAX has flags for the whole process, and options for one program


@functools.cache
def _known_options() -> dict[str, Any]:
    """Those that this version of XLA has."""
    lowered = jax.jit(lambda: 0).lower()

    def is_known(name: str) -> bool:
        try:
            lowered.compile({name: OPTIONS[name]})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    return {name: value for name, value in OPTIONS.items() if is_known(name)}


def _with_ours(*args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    ours = _known_options() if _is_on else {}
    return _compile_options(*args, env_options_overrides=ours | (env_options_overrides or {}), **kwargs)


compiler.get_compile_options = _with_ours


def xla_flags() -> str:
    """For a process that the test starts: what it compiles there, it compiles like here."""
    known = _known_options() if _is_on else {}  # XLA aborts on a flag that it does not have
    return " ".join(f"--{name}={str(value).lower()}" for name, value in known.items())


def switch(is_on: bool) -> None:
    """From here on; programs of the other kind are not used again."""
    global _is_on
    if is_on != _is_on:
        _known_options()
        _is_on = is_on
        jax.clear_caches()
