"""Reading a parsed `config.json`: what is missing or unsupported is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxdp import _validate

HfConfig = Mapping[str, Any]


def integer(hf_config: HfConfig, name: str, default: int | None = None) -> int:
    """A positive integer; `default` where the file has none or null, and an error if there is no default."""
    return _validate.positive_integer(f"config.json: {name}", _present(hf_config, name, default))


def number(hf_config: HfConfig, name: str, default: float | None = None) -> float:
    """A positive number, as `integer`."""
    return _validate.positive(f"config.json: {name}", _present(hf_config, name, default))


def flag(hf_config: HfConfig, name: str, *, default: bool) -> bool:
    """A boolean; `default` where the file has none or null."""
    value = _present(hf_config, name, default)
    if not isinstance(value, bool):
        raise TypeError(f"config.json: {name} must be true or false, got {value!r}.")
    return value


def choice(hf_config: HfConfig, name: str, default: str, supported: Iterable[str]) -> str:
    """One of a few words."""
    value, words = _present(hf_config, name, default), sorted(supported)
    if value not in words:
        raise ValueError(f"config.json: {name} is {value!r}, which is not implemented; supported: {', '.join(words)}.")
    return value


def refuse(hf_config: HfConfig, **only: Any) -> None:
    """Refuses settings that would change the function; `only` holds the one value of each that is implemented."""
    for name, value in (
        {"quantization_config": None, "is_encoder_decoder": False, "add_cross_attention": False} | only
    ).items():
        given = hf_config.get(name, value)
        if given is not None and given != value:
            remedy = f"only {value!r} is" if value is not None else "use a model without it"
            raise ValueError(f"config.json: {name} is {given!r}, which is not implemented; {remedy}.")


def divided(name: str, whole: int, parts_name: str, parts: int) -> int:
    """`whole / parts`, which must come out even."""
    if whole % parts:
        raise ValueError(f"config.json: {name} = {whole} must be a multiple of {parts_name} = {parts}.")
    return whole // parts


def _present(hf_config: HfConfig, name: str, default: Any) -> Any:
    value = hf_config.get(name)
    if value is not None:
        return value
    if default is None:
        raise ValueError(f"config.json has no {name!r}; use the config.json that came with the weights.")
    return default
