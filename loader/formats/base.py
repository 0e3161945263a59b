"""One storage format for one projection: the numbers are said here, names, dtypes and shapes in ``rules/formats``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Protocol, Self

from gatekeeper import PartSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Span = tuple[int, int]
BIAS = "bias"
"""What a parameter of biases is called after its matrix; no part of a format is."""


class StraddleError(ValueError):
    """A cut runs through a quantization block, so that no part can be sliced there."""


def _stored(span: Span, size: int, per_item: int | None) -> Span:
    """The stored items that hold elements `span` of an axis of `size` elements, `per_item` to an item (None: all)."""
    first, last = span
    if per_item is None:
        return 0, 1
    if first % per_item or (last % per_item and last != size):
        raise StraddleError(f"a cut at {first}:{last} runs through a block of {per_item}")
    return first // per_item, -(-last // per_item)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of a projection, stacked over experts as ``w13_<name>`` and ``w2_<name>``.

    In memory it is a matrix whatever the checkpoint has: a scale to each row is a column, a scale to the whole
    projection is 1 x 1, so that ``w13`` has gate's above up's as it has for all other parts.
    """

    spec: PartSpec
    """Suffix, dtypes and shapes that the tensor may have, as ``rules/formats`` gives them."""
    name: str
    """What it is called in memory, the same for all signatures of a format: ``weight_scale_inv``."""
    dtype: str
    """dtype in this checkpoint and in memory, the same by intention, by safetensors' word: ``I32``."""
    rows_per_item: int | None
    """Rows (output features) that one stored row covers: 128 for the scales of 128 x 128 blocks; None: all rows."""
    columns_per_item: int | None
    """Columns (input features) that one stored column covers: 8 for int4 packed in int32; None: all columns."""

    @classmethod
    def of(cls, spec: PartSpec, name: str, dtype: str) -> Self:
        """The part that `spec` describes, called `name` in memory."""
        per_item = {term.axis: term.by for term in spec.shapes[0]}
        return cls(
            spec=spec,
            name=name,
            dtype=dtype,
            rows_per_item=per_item.get("out"),
            columns_per_item=per_item.get("in"),
        )

    @property
    def role(self) -> str:
        """What it is for: ``scale``."""
        return self.spec.role

    @property
    def suffix(self) -> str:
        """What follows the projection's name in this checkpoint: ``weight_scale``."""
        return self.spec.suffix

    def fits(self, shape: tuple[int, ...], rows: int, columns: int) -> bool:
        """Whether the checkpoint may have this shape for a weight of ``(rows, columns)``."""
        return shape in self.shapes(rows, columns)

    def shapes(self, rows: int, columns: int) -> list[tuple[int | None, ...]]:
        """The shapes that the checkpoint may have; None where a size does not come out even."""
        sizes = {"out": rows, "in": columns}
        return [tuple(term.size(sizes) for term in shape) for shape in self.spec.shapes]

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape in memory for a weight of ``(rows, columns)``; the last block of either axis may be a partial one."""
        return -(-rows // (self.rows_per_item or rows)), -(-columns // (self.columns_per_item or columns))

    def stored_rows(self, span: Span, rows: int) -> Span:
        """Stored rows of `span` out of `rows`; raises `StraddleError` where the cut runs through a block."""
        return _stored(span, rows, self.rows_per_item)

    def stored_columns(self, span: Span, columns: int) -> Span:
        """Stored columns of `span` out of `columns`; raises `StraddleError` where the cut runs through a block."""
        return _stored(span, columns, self.columns_per_item)


class WeightFormat(Protocol):
    """The arithmetic of one format."""

    @property
    def name(self) -> str:
        """As in ``rules/formats``: ``int4_g32``."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the parts that `dequantize` reads: ``("weight", "scale")``. Others are not kept in memory."""

    @property
    def roundings(self) -> int:
        """Roundings to the compute dtype between the stored numbers and a layer's output, for its tolerance."""

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Parts by role, each ``(..., rows, columns)`` in stored items, to the weight ``(..., rows, columns)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one checkpoint stores a format: by which of its signatures, and with which dtype for each part."""

    format: WeightFormat
    parts: tuple[Part, ...]
    """What is stacked and kept in memory."""
    shape_part: Part | None = None
    """A part that only repeats the weight's shape, ``weight_shape``, where the checkpoint has it: never kept."""
    unused: tuple[Part, ...] = ()
    """Parts that a projection may have and this loader has no use for: ``input_scale`` is for quantized activations."""

    @property
    def name(self) -> str:
        """The format's: ``int4_g32``."""
        return self.format.name

    @property
    def column_multiple(self) -> int:
        """The number of columns must be a multiple of this: the elements of one block or word."""
        terms = (term for part in self.parts for term in part.spec.shapes[0])
        return lcm(*(term.by for term in terms if term.axis == "in" and not term.rounds_up))


def dequantize_stacked(layout: Layout, stored: Mapping[str, Tensor], dtype: torch.dtype, *, stacked: int) -> Tensor:
    """Dequantize a weight whose rows are `stacked` matrices of one shape, such as gate rows and then up rows.

    `stored` is by role. Scales that span rows are of one matrix only, so those formats are taken apart first.
    """
    import torch  # to plan takes none

    if stacked == 1 or all(part.rows_per_item == 1 for part in layout.parts):
        return layout.format.dequantize(stored, dtype)
    chunks = [
        dict(zip(stored, each, strict=True))
        for each in zip(*(t.chunk(stacked, -2) for t in stored.values()), strict=True)
    ]
    return torch.cat([layout.format.dequantize(chunk, dtype) for chunk in chunks], dim=-2)


# A SwiGLU expert rounds to the compute dtype after each of gate, up, SiLU, their product, and down.
MLP_ROUNDINGS = 5
# number x scale may have more digits than the compute dtype: each of gate, up and down is rounded once more.
SCALED_ROUNDINGS = MLP_ROUNDINGS + 3
