"""The zeroth-order methods of `jaxdp finetune` by name: estimator, directions and update of each, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxdp import _validate
from jaxdp.cli.finetune_options import EstimatorName, MethodName, OptimizerOptions, PrivacyOptions, ZerothOrderOptions
from jaxdp.zeroth_order import Estimator, ForwardMode, Gaussian, Law, LowRank, OneSided, Rademacher, Sgd, TwoSided


@dataclasses.dataclass(frozen=True)
class _Method:
    num_directions: int = 1
    estimator: EstimatorName = "two-sided"
    is_low_rank: bool = False
    is_normalized: bool = False
    is_private: bool = False


#: MeZO (arXiv 2305.17333), LOZO (arXiv 2410.07698), FZOO (arXiv 2506.09034), DPZero (arXiv 2310.09639; with --noise laplace it is
#: DP-ZO, arXiv 2401.04343), DP-AggZO (USENIX Security 2025).
METHODS: dict[str, _Method] = {
    "mezo": _Method(),
    "lozo": _Method(is_low_rank=True),
    "fzoo": _Method(8, "one-sided", is_normalized=True),
    "dpzero": _Method(is_private=True),
    "dp-aggzo": _Method(16, is_private=True),
}


_WITHOUT_LAPLACE = {"dpsgd": "releases whole gradients", "dp-aggzo": "clips many numbers together"}


def is_zeroth_order(method: MethodName) -> bool:
    return method in METHODS


def resolved(method: MethodName, options: ZerothOrderOptions, *, tune: str) -> dict[str, Any]:
    """The options that decide what a step computes, with the method's defaults filled in."""
    chosen, values = METHODS[method], dataclasses.asdict(options)
    for name in ("stream", "max_device_memory"):  # where blocks wait changes no bit
        del values[name]
    is_low_rank = chosen.is_low_rank or options.low_rank is not None
    defaults = {
        "num_directions": chosen.num_directions,
        "estimator": chosen.estimator,
        "perturbation_scale": 1e-3 if tune == "full" else 1e-2,
        "directions": "low-rank" if is_low_rank else "rademacher",
        "low_rank": 2 if is_low_rank else None,
        "refresh_every": 50 if is_low_rank else None,
    }
    values |= {name: value for name, value in defaults.items() if values[name] is None}
    if values["estimator"] == "forward":
        values["perturbation_scale"] = None
    return values


def learning_rate(method: MethodName, *, tune: str) -> float:
    """The default: of full tuning as in the papers, of a few parameters as MeZO has it for adapters."""
    full, few = (5e-5, 5e-4) if METHODS[method].is_normalized else (1e-6, 5e-5)
    return full if tune == "full" else few


def l2_clip_norm(method: MethodName, options: ZerothOrderOptions) -> float:
    """The default: DPZero's for RoBERTa-large, and with K directions DP-AggZO's beta / sqrt(K) with the same beta."""
    K = METHODS[method].num_directions if options.num_directions is None else options.num_directions
    return 200.0 / math.sqrt(_validate.positive_integer("num_directions", K))


def nums_at_once(settings: dict[str, Any]) -> tuple[int, ...]:
    """How many directions may pass at once, most first: low-rank ones share every product with a matrix."""
    K = settings["num_directions"]
    if settings["directions"] != "low-rank" or settings["estimator"] == "forward":
        return (1,)
    return tuple(sorted({num for num in (K, 4, 1) if num <= K and K % num == 0}, reverse=True))


def make_estimator(settings: dict[str, Any], num_at_once: int = 1) -> Estimator:
    """The estimator of resolved options."""
    K, scale = settings["num_directions"], settings["perturbation_scale"]
    if settings["estimator"] == "forward":
        return ForwardMode(K)
    return {"two-sided": TwoSided, "one-sided": OneSided}[settings["estimator"]](K, scale, num_at_once)


def make_law(settings: dict[str, Any]) -> Law:
    """The law of the directions of resolved options."""
    if settings["directions"] == "low-rank":
        return LowRank(settings["low_rank"], settings["refresh_every"])
    return {"rademacher": Rademacher, "gaussian": Gaussian}[settings["directions"]]()


def make_sgd(settings: dict[str, Any], learning_rate: float | Callable[[Any], Any]) -> Sgd:
    """The update of resolved options."""
    return Sgd(
        learning_rate,
        weight_decay=settings["weight_decay"] or 0.0,
        momentum=settings["momentum"],
        is_normalized=METHODS[settings["method"]].is_normalized,
    )


def check(privacy: PrivacyOptions, optimizer: OptimizerOptions, options: ZerothOrderOptions, *, tune: str) -> None:
    """Refuses options that do not belong to the method, before anything is read."""
    _check_noise(privacy, options)
    if not is_zeroth_order(privacy.method):
        _refuse_for_gradients(options)
        return
    method = METHODS[privacy.method]
    if not method.is_private:
        _refuse_privacy(privacy)
    elif privacy.clipping not in ("flat", "automatic"):
        raise ValueError(
            f"--clipping {privacy.clipping}: {privacy.method} clips one vector of projected gradients for each unit; use flat or "
            "automatic."
        )
    if tune == "last-k":
        raise ValueError(
            f"--tune last-k trains some blocks, and {privacy.method} perturbs all by one program; use full, lora, ffa-lora "
            "or bitfit."
        )
    _refuse_optimizer(privacy.method, optimizer)
    _refuse_directions(privacy.method, options)
    if options.base_format is not None and tune not in ("lora", "ffa-lora"):
        raise ValueError(
            f"--base-format {options.base_format} is for weights that stay as they are, and --tune {tune} changes them; use "
            "--tune lora, or --param-dtype bfloat16 for half the memory."
        )
    if options.param_dtype != "float32" and tune != "full":
        raise ValueError(
            f"--param-dtype {options.param_dtype} is for --tune full; what --tune {tune} trains is small: leave it out."
        )
    if options.rounding != "nearest" and options.param_dtype == "float32":
        raise ValueError(
            "--rounding stochastic has no effect on float32; give --param-dtype bfloat16, or leave it out."
        )
    settings = resolved(privacy.method, options, tune=tune)
    make_estimator(settings)
    make_law(settings)
    _validate.positive_integer("write_every", options.write_every)
    if options.max_device_memory is not None:
        num_bytes(options.max_device_memory)


def num_bytes(text: str) -> int:
    """`6GB`, `5.5GiB` or `800MB` as a number of bytes."""
    units = {
        "KB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "TB": 1e12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "TIB": 2**40,
        "B": 1,
    }
    number, unit = text.strip().upper(), ""
    for name in units:
        if number.endswith(name) and len(name) > len(unit):
            unit = name
    try:
        found = float(number.removesuffix(unit)) * units[unit]
        if not 0 < found < math.inf:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"--max-device-memory {text!r} is not a size; write it as 6GB, 5.5GiB or 800MB.") from None
    return int(found)


def _check_noise(privacy: PrivacyOptions, options: ZerothOrderOptions) -> None:
    """Laplace noise is for the one number of dpzero (DP-ZO, arXiv 2401.04343)."""
    if privacy.noise == "gaussian":
        if privacy.target_delta == 0:
            raise ValueError(
                "--target-delta 0 is a pure epsilon, which Gaussian noise never has; give a delta such as 1e-5, or --method dpzero "
                "--noise laplace."
            )
        return
    if privacy.method != "dpzero":
        raise ValueError(
            f"--noise laplace is for one number a step, and --method {privacy.method} "
            f"{_WITHOUT_LAPLACE.get(privacy.method, 'adds no noise')}; use --method dpzero, or leave --noise out."
        )
    if options.num_directions not in (None, 1):
        raise ValueError(
            f"--num-directions {options.num_directions}: --noise laplace is for one number a step; give 1, or leave --noise out."
        )
    if privacy.accountant != "pld":
        raise ValueError(
            f"--accountant {privacy.accountant} has no answer for sampled Laplace noise; use pld, or leave it out."
        )
    if privacy.no_privacy:
        raise ValueError("--noise laplace contradicts --no-privacy, which adds none; leave one out.")


def _refuse_for_gradients(options: ZerothOrderOptions) -> None:
    for field in dataclasses.fields(options):
        if getattr(options, field.name) != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise ValueError(
                f"{flag} is for zeroth-order methods, and --method is dpsgd; give {', '.join(METHODS)}, or leave it out."
            )


def _refuse_privacy(privacy: PrivacyOptions) -> None:
    """MeZO, LOZO and FZOO make no private release."""
    for flag, value in (("--target-epsilon", privacy.target_epsilon), ("--noise-multiplier", privacy.noise_multiplier)):
        if value is not None:
            raise ValueError(
                f"{flag} {value:g}: {privacy.method} adds no noise and has no epsilon; use --method dpzero, or dp-aggzo for many "
                "directions."
            )
    if not privacy.no_privacy:
        raise ValueError(
            f"--method {privacy.method} is not private, and this must be said: add --no-privacy. For private training use "
            "--method dpzero or dp-aggzo."
        )


def _refuse_optimizer(method: MethodName, optimizer: OptimizerOptions) -> None:
    if optimizer.optimizer not in (None, "sgd"):
        raise ValueError(
            f"--optimizer {optimizer.optimizer}: {method} keeps an update as a few numbers, and no state for each parameter; "
            "use sgd, with --momentum if you like."
        )
    default = OptimizerOptions()
    for name in ("optimizer_options", "microbatch_size", "remat"):
        if getattr(optimizer, name) != getattr(default, name):
            raise ValueError(f"--{name.replace('_', '-')} is for dpsgd, and --method is {method}; leave it out.")


def _refuse_directions(method: MethodName, options: ZerothOrderOptions) -> None:
    is_low_rank = METHODS[method].is_low_rank or options.low_rank is not None
    if is_low_rank and options.directions is not None:
        raise ValueError(
            f"--directions {options.directions} contradicts low-rank directions (--low-rank, --method lozo); leave one out."
        )
    if options.refresh_every is not None and not is_low_rank:
        raise ValueError(
            f"--refresh-every {options.refresh_every} is for low-rank directions; add --low-rank, or leave it out."
        )
    if options.estimator == "forward" and options.perturbation_scale is not None:
        raise ValueError(
            f"--perturbation-scale {options.perturbation_scale:g}: --estimator forward takes derivatives; leave one out."
        )
    if METHODS[method].is_normalized and options.num_directions is not None and options.num_directions < 2:
        raise ValueError(
            f"--num-directions {options.num_directions}: {method} divides by the spread over the directions; give 2 or more."
        )
