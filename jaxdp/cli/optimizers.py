"""Optimizers of optax by name, with a learning rate that follows a schedule."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxdp import _validate

ScheduleName: TypeAlias = Literal["constant", "linear", "cosine"]


def learning_rate_schedule(
    learning_rate: float, *, schedule: ScheduleName = "constant", warmup_steps: int = 0, num_steps: int
) -> Callable[[Any], jax.Array]:
    """The learning rate of step t = 0, 1, ..., num_steps - 1: no step is spent at a rate of zero.

        warmup      learning_rate * (t + 1) / warmup_steps                    for t < warmup_steps; after that, with
                    u = (t - warmup_steps) / (num_steps - warmup_steps):
        constant    learning_rate
        linear      learning_rate * (1 - u)
        cosine      learning_rate * (1 + cos(pi u)) / 2

    Raises:
        ValueError: the learning rate is not positive, or the warmup is no shorter than the run.
    """
    peak = _validate.positive("learning_rate", learning_rate)
    warmup = _validate.nonnegative_integer("warmup_steps", warmup_steps)
    _validate.one_of("schedule", schedule, ("constant", "linear", "cosine"))
    if warmup >= num_steps:
        raise ValueError(
            f"warmup_steps={warmup} leaves none of the {num_steps} steps at the full learning rate; use fewer, or train longer."
        )

    def rate(count: Any) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        passed = jnp.clip((step - warmup) / (num_steps - warmup), 0.0, 1.0)
        decay = {"constant": jnp.ones_like(passed), "linear": 1 - passed, "cosine": (1 + jnp.cos(jnp.pi * passed)) / 2}
        return peak * decay[schedule] * jnp.minimum(1.0, (step + 1) / max(warmup, 1))

    return rate


def make_optimizer(
    name: str,
    learning_rate: float | Callable[[Any], jax.Array],
    *,
    weight_decay: float | None = None,
    options: Sequence[str] = (),
) -> optax.GradientTransformation:
    """The optimizer `optax.<name>`.

    Args:
        name: A function of optax that makes a `GradientTransformation` from a `learning_rate` and updates parameters from
            gradients alone: the loss, which some ask for, is private.
        learning_rate: A number or a schedule.
        weight_decay: For optimizers that take it; matrices and tables decay, biases and norm scales never do.
        options: Further arguments as `name=value` with values as in JSON, such as `b1=0.9` or `nesterov=true`.

    Raises:
        ValueError: there is no such optimizer, or it does not take an argument.
    """
    function = _candidates().get(name)
    if function is None:
        raise ValueError(f"--optimizer {name!r} is no optimizer of optax that works here; choose from {_listing()}.")
    taken = set(inspect.signature(function).parameters) - {"learning_rate", "mask"}
    arguments = _parsed(options)
    if weight_decay is not None:
        if "weight_decay" not in taken:
            raise ValueError(
                f"--weight-decay {weight_decay:g}: optax.{name} takes none; use one of {_listing(having='weight_decay')}."
            )
        arguments["weight_decay"] = _validate.nonnegative("weight_decay", weight_decay)
    for key in arguments:
        if key not in taken:
            raise ValueError(
                f"--optimizer-options {key}=...: optax.{name} takes no {key!r}; it takes {', '.join(sorted(taken)) or 'none'}."
            )
    if "mask" in inspect.signature(function).parameters:
        arguments["mask"] = _decays
    try:
        return _tried(function, learning_rate, arguments)
    except Exception as error:  # optax raises whatever its arithmetic raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if callable(learning_rate) and _works(function, 1e-3, arguments):
            raise ValueError(
                f"--optimizer {name} takes a constant learning rate only; leave out --schedule and --warmup-steps, or choose "
                "another optimizer."
            ) from error
        if _works(function, learning_rate, {}):
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items() if key != "mask")
            raise ValueError(f"optax.{name} refuses {given}: {reason}; see its documentation.") from error
        raise ValueError(
            f"--optimizer {name!r} does not update from gradients alone ({reason}); choose from {_listing()}."
        ) from error


def _candidates() -> dict[str, Callable[..., Any]]:
    def is_one(name: str, value: Any) -> bool:
        if name.startswith(("_", "scale_by_")) or not inspect.isfunction(value):
            return False
        return next(iter(inspect.signature(value).parameters), None) == "learning_rate"

    return {name: value for name, value in vars(optax).items() if is_one(name, value)}


def _listing(having: str | None = None) -> str:
    names = [
        name
        for name, function in sorted(_candidates().items())
        if (having is None or having in inspect.signature(function).parameters) and _works(function, 1e-3, {})
    ]
    return ", ".join(names)


def _tried(function: Callable[..., Any], learning_rate: Any, arguments: dict[str, Any]) -> optax.GradientTransformation:
    """Makes the optimizer and traces one update, which some refuse without a loss value or with a schedule."""
    tx = function(learning_rate, **arguments)
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"it makes a {type(tx).__name__}")
    with jax.numpy_dtype_promotion("standard"):
        tree = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
        jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), tree)
    return tx


def _works(function: Callable[..., Any], learning_rate: Any, arguments: dict[str, Any]) -> bool:
    try:
        _tried(function, learning_rate, arguments)
    except Exception:
        return False
    return True


def _decays(params: Any) -> Any:
    """Which leaves decay: matrices, tables and adapters."""
    decaying = ("kernel", "table", "lora_a", "lora_b")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _validate.leaf_name(path).split("/")[-1] in decaying, params
    )


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    arguments = {}
    for option in options:
        key, separator, text = option.partition("=")
        try:
            if not separator or not key.isidentifier():
                raise ValueError
            value = json.loads(text)
            if not (value is None or isinstance(value, bool | int | float)):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"--optimizer-options {option!r} is not name=value with a number, true, false or null, such as b1=0.9."
            ) from None
        arguments[key] = value
    return arguments
