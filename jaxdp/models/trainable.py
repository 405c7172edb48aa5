"""Which parameters are trained: a pytree taken apart into what is differentiated and what is not, and put together again.

Differentiate the trainable part only, `loss_fn(trainable, example, frozen)` with `join(trainable, frozen)` inside: no gradient
of a frozen leaf is then computed, clipped or noised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxdp import _validate
from jaxdp._typing import Params
from jaxdp.models.causal_lm import CausalLM

#: Everything; the adapters; their B alone; the biases alone; the last blocks alone.
CHOICES = ("full", "lora", "ffa-lora", "bitfit", "last-k")


def parts(model: CausalLM, params: Params, how: str, *, last_k: int | None = None) -> tuple[Params, Params]:
    """The trainable and the frozen part of a model's parameters; `join` gives back what the model takes.

    - `full`: every parameter.
    - `lora`: A and B of every adapter.
    - `ffa-lora`: B of every adapter, with A frozen at its random start. The product A B is then linear in what is trained, so
      that noise on B is not multiplied by noise on A (arXiv 2403.12313).
    - `bitfit`: every bias (arXiv 2106.10199; privately, 2210.00036). GPT-2 and OPT have them, Llama has none.
    - `last-k`: every parameter of the last `last_k` blocks, and none of embedding and head.

    Args:
        model: Whose parameters these are.
        params: Blocks in one stack `[N, ...]`, arrays or `LazyStack`s. They are not copied, but for `last-k`, where numpy gives
            views, and a `LazyStack` one of fewer blocks.
        how: One of `CHOICES`.
        last_k: Number of blocks, for `last-k` alone.

    Returns:
        Two pytrees that share no leaf.

    Raises:
        ValueError: an unknown `how`, nothing to train, or `last_k` out of bounds.
    """
    _validate.one_of("how", how, CHOICES)
    if (last_k is not None) != (how == "last-k"):
        raise ValueError(
            f"last_k is {last_k!r} with how={how!r}; give a number of blocks with 'last-k', and only there."
        )
    if how == "full":
        return params, {}
    if how == "last-k":
        return _last_blocks(model, params, _validate.positive_integer("last_k", last_k))
    endings = {"lora": ("/lora_a", "/lora_b"), "ffa-lora": ("/lora_b",), "bitfit": ("/bias",)}[how]
    trainable, frozen = split(params, lambda path: path.endswith(endings))
    if not trainable:
        remedy = (
            "this model has no biases; train 'lora', 'last-k' or 'full' instead."
            if how == "bitfit"
            else "the model has no adapters; add them first with jaxdp.models.add_adapters."
        )
        raise ValueError(f"how={how!r} leaves nothing to train: {remedy}")
    return trainable, frozen


def split(params: Params, is_trainable: Callable[[str], bool]) -> tuple[Params, Params]:
    """Nested dicts of the leaves whose path satisfies the predicate, and of the others, without empty branches.

    Args:
        params: Nested dicts of arrays.
        is_trainable: Of a path such as `blocks/attention/q/kernel`.
    """
    return _split(params, is_trainable, "")


def _split(tree: Any, is_trainable: Callable[[str], bool], path: str) -> tuple[Any, Any]:
    if not isinstance(tree, dict):
        raise TypeError(
            f"{path or '<root>'} is a {type(tree).__name__}; split takes nested dicts, the blocks in one stack."
        )
    chosen, rest = {}, {}
    for name, branch in tree.items():
        branch_path = f"{path}/{name}" if path else name
        if hasattr(branch, "shape"):
            (chosen if is_trainable(branch_path) else rest)[name] = branch
            continue
        for part, found in zip((chosen, rest), _split(branch, is_trainable, branch_path), strict=True):
            if found:
                part[name] = found
    return chosen, rest


def join(trainable: Params, frozen: Params) -> Params:
    """Puts together what `split` or `parts` took apart. The arrays may have changed; a tracer will do.

    Blocks that both parts hold as tuples are segments one after the other, the frozen ones first.

    Raises:
        ValueError: both hold the same leaf.
    """
    return _join(trainable, frozen, "")


def _join(trainable: Any, frozen: Any, path: str) -> Any:
    if isinstance(trainable, tuple) and isinstance(frozen, tuple):
        return frozen + trainable
    if not (isinstance(trainable, dict) and isinstance(frozen, dict)):
        raise ValueError(f"leaf {path or '<root>'!r} is in both parts; join takes the two results of one split.")
    joined = dict(frozen)
    for name, branch in trainable.items():
        joined[name] = _join(branch, frozen[name], f"{path}/{name}" if path else name) if name in frozen else branch
    return joined


def _last_blocks(model: CausalLM, params: Params, last_k: int) -> tuple[Params, Params]:
    num_blocks = model.config.num_blocks
    if last_k > num_blocks:
        raise ValueError(f"last_k must be at most {num_blocks}, the number of blocks; got {last_k}.")
    if isinstance(params["blocks"], tuple):
        raise ValueError("the blocks are in segments already; call parts on parameters as load_model gives them.")
    first = jax.tree.map(lambda stack: stack[: num_blocks - last_k], params["blocks"])
    last = jax.tree.map(lambda stack: stack[num_blocks - last_k :], params["blocks"])
    frozen = {name: branch for name, branch in params.items() if name != "blocks"}
    return {"blocks": (last,)}, {**frozen, "blocks": (first,) if last_k < num_blocks else ()}
