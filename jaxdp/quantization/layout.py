"""What the bytes of packed weights mean: their spec, arrays and sizes, and one flat array of them all."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp import _validate

FormatName: TypeAlias = Literal["int8", "int6", "int4"]
#: Input rows per scale, where none is given.
DEFAULT_GROUP_SIZES: Final[dict[FormatName, int]] = {"int8": 128, "int6": 128, "int4": 64}
#: Bits of a code in each plane, highest first.
PLANE_BITS: Final[dict[FormatName, tuple[int, ...]]] = {"int8": (8,), "int6": (4, 2), "int4": (4,)}
#: code + offset is what the planes hold.
OFFSETS: Final[dict[FormatName, int]] = {"int8": 0, "int6": 32, "int4": 8}


@dataclasses.dataclass(frozen=True)
class PackedSpec:
    """Static and hashable, so that it can be closed over by, or a static argument of, a compiled function.

    Attributes:
        shape: `[.., m, p]` of the weights.
        format: "int8", "int6" or "int4".
        group_size: Input rows per scale, a multiple of the rows that share a byte (4 for int6, 2 for int4); the last group
            of a matrix may be shorter.
    """

    shape: tuple[int, ...]
    format: FormatName
    group_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # a spec read from a file brings a list
        if len(self.shape) < 2 or 0 in self.shape:
            raise ValueError(
                f"shape {self.shape} is not that of matrices [.., m, p] with weights in them; keep vectors and scalars "
                "(biases, norm gains) in bfloat16, and leave out empty arrays."
            )
        _validate.one_of("format", self.format, get_args(FormatName))
        _validate.positive_integer("group_size", self.group_size)
        rows = 8 // min(PLANE_BITS[self.format])
        if self.group_size % rows:
            raise ValueError(
                f"group_size must be a multiple of {rows} for {self.format}, which packs {rows} rows in a byte; "
                f"got {self.group_size}."
            )


class PackedArrays(NamedTuple):
    """What travels to the device.

    Attributes:
        planes: uint8; one plane for int8 `[.., m, p]` and int4 `[.., m/2, p]`, two for int6 `[.., m/2, p]` and
            `[.., m/4, p]`, where m is padded to rows that fill bytes.
        scales: bfloat16, `[.., ceil(m / group_size), p]`.
    """

    planes: tuple[Any, ...]
    scales: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Quantized weights: a pytree whose leaves are the arrays, and whose structure holds the rest.

    Attributes:
        arrays: Codes and scales.
        spec: What they mean.
        dtype: Of the weights before they were quantized, by name, and of those that whoever reads them expects.
    """

    arrays: PackedArrays
    spec: PackedSpec = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})


def num_bytes(spec: PackedSpec) -> int:
    """Bytes of the planes and the scales together, which is what crosses the link.

    >>> num_bytes(PackedSpec((4096, 11008), "int6", 128))
    34521088
    """
    return sum(map(math.prod, plane_shapes(spec))) + 2 * math.prod(scales_shape(spec))


def bytes_per_parameter(spec: PackedSpec) -> float:
    """`num_bytes` over the number of weights: bits / 8 + 2 / group_size where the rows fill bytes and groups.

    >>> [bytes_per_parameter(PackedSpec((4096, 4096), *f)) for f in (("int8", 128), ("int6", 128), ("int4", 64))]
    [1.015625, 0.765625, 0.53125]
    """
    return num_bytes(spec) / math.prod(spec.shape)


def to_bytes(packed: Packed) -> np.ndarray:
    """The planes in order, then the scales (little-endian), as flat uint8 `[num_bytes(spec)]` on the host.

    >>> from jaxdp.quantization import quantize
    >>> to_bytes(quantize(np.array([[7.0], [-2.0], [0.6]]), "int4")).tolist()
    [111, 137, 128, 63]
    """
    check_arrays(packed.arrays, packed.spec)
    scales = np.ascontiguousarray(packed.arrays.scales)
    return np.concatenate([np.ravel(x) for x in (*packed.arrays.planes, scales.view(np.uint8))])


def from_bytes(flat: Any, spec: PackedSpec) -> PackedArrays:
    """The arrays that `to_bytes` flattened, by slices and a bitcast: for use inside `jit`, on a slice of a block's bucket.

    Args:
        flat: uint8, `[num_bytes(spec)]`, from any offset of a bucket.
        spec: The spec of the weights.

    Raises:
        ValueError: `flat` is not uint8 of that size.

    >>> from jaxdp.quantization import quantize
    >>> packed = quantize(np.array([[7.0], [-2.0], [0.6]]), "int4")
    >>> arrays = jax.jit(from_bytes, static_argnums=1)(to_bytes(packed), packed.spec)
    >>> arrays.planes[0].tolist(), arrays.scales.tolist()
    ([[111], [137]], [[1.0]])
    """
    flat = jnp.asarray(flat)
    if flat.dtype != jnp.uint8 or flat.shape != (num_bytes(spec),):
        raise ValueError(
            f"flat must be uint8[{num_bytes(spec)}] for {spec}, got {flat.dtype}{list(flat.shape)}; make it with to_bytes, "
            "and slice a bucket by num_bytes(spec)."
        )
    planes, start = [], 0
    for shape in plane_shapes(spec):
        stop = start + math.prod(shape)
        planes.append(flat[start:stop].reshape(shape))
        start = stop
    scales = lax.bitcast_convert_type(flat[start:].reshape(*scales_shape(spec), 2), jnp.bfloat16)
    return PackedArrays(tuple(planes), scales)


def padded_rows(spec: PackedSpec) -> int:
    rows = 8 // min(PLANE_BITS[spec.format])
    return -(-spec.shape[-2] // rows) * rows


def plane_shapes(spec: PackedSpec) -> tuple[tuple[int, ...], ...]:
    *matrices, _, p = spec.shape
    return tuple((*matrices, padded_rows(spec) * bits // 8, p) for bits in PLANE_BITS[spec.format])


def scales_shape(spec: PackedSpec) -> tuple[int, ...]:
    *matrices, m, p = spec.shape
    return (*matrices, -(-m // spec.group_size), p)


def check_arrays(arrays: PackedArrays, spec: PackedSpec) -> None:
    """Checks that planes and scales have the dtypes and shapes that the spec gives them."""
    expected = [f"uint8{list(shape)}" for shape in plane_shapes(spec)] + [f"bfloat16{list(scales_shape(spec))}"]
    found = [f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (*arrays.planes, arrays.scales)]
    if found != expected:
        raise ValueError(
            f"{spec} is packed as {', '.join(expected)}; got {', '.join(found)}. Pass arrays with the spec that was made "
            "with them."
        )
