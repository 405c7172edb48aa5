"""How a parameter leaf is stored in a Hugging Face file."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One leaf in a file; a leaf below `blocks`, stacked `[N, ...]`, is N tensors.

    Attributes:
        name: Its name, with `{}` for the index of the block.
        is_transposed: Whether the file stores `[out, in]` where the leaf is `[in, out]`.
    """

    name: str
    is_transposed: bool = False


def layer(path: str, name: str, *, is_transposed: bool, use_bias: bool = True) -> dict[str, Tensor]:
    """The kernel, and the bias, of a linear layer at `path` that the file calls `name`."""
    kernel = {f"{path}/kernel": Tensor(f"{name}.weight", is_transposed)}
    return kernel | ({f"{path}/bias": Tensor(f"{name}.bias")} if use_bias else {})


def norm(path: str, name: str, *, use_bias: bool) -> dict[str, Tensor]:
    """The scale, and the bias, of a norm at `path` that the file calls `name`."""
    scale = {f"{path}/scale": Tensor(f"{name}.weight")}
    return scale | ({f"{path}/bias": Tensor(f"{name}.bias")} if use_bias else {})
