"""What a storage format has to say about one projection: its parts, their shapes, and how to get numbers back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Span = tuple[int, int]


class StraddleError(ValueError):
    """A cut runs through a quantization block, so that no part can be sliced there."""


def _stored(span: Span, size: int, per_item: int) -> Span:
    """The stored items that hold elements `span` of an axis of `size` elements, `per_item` to an item."""
    first, last = span
    if first % per_item or (last % per_item and last != size):
        raise StraddleError(f"a cut at {first}:{last} runs through a block of {per_item}")
    return first // per_item, -(-last // per_item)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of a projection, stacked over experts as ``w13_<suffix>`` and ``w2_<suffix>``."""

    suffix: str
    """What follows the projection's name in the checkpoint: ``weight_packed``."""
    dtype: torch.dtype
    """dtype in the checkpoint and in memory, the same by intention: ``torch.int32``."""
    rows_per_item: int = 1
    """Rows (output features) that one stored row covers: 128 for the scales of 128x128 blocks."""
    columns_per_item: int = 1
    """Columns (input features) that one stored column covers: 8 for int4 packed in int32, 32 for its scales."""

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Stored shape for a weight of ``(rows, columns)``; the last block of either axis may be a partial one."""
        return -(-rows // self.rows_per_item), -(-columns // self.columns_per_item)

    def stored_rows(self, span: Span, rows: int) -> Span:
        """Stored rows of `span` out of `rows`; raises `StraddleError` where the cut runs through a block."""
        return _stored(span, rows, self.rows_per_item)

    def stored_columns(self, span: Span, columns: int) -> Span:
        """Stored columns of `span` out of `columns`; raises `StraddleError` where the cut runs through a block."""
        return _stored(span, columns, self.columns_per_item)


class WeightFormat(Protocol):
    """The arithmetic of one format. What the file looks like is ``rules/formats/<name>.yaml``."""

    @property
    def name(self) -> str:
        """As in ``rules/formats``: ``int4_g32``."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is stacked and kept in memory."""

    @property
    def shape_suffix(self) -> str | None:
        """Suffix of a tensor that only repeats the weight's shape, ``weight_shape``: compared, not kept."""

    @property
    def column_multiple(self) -> int:
        """The number of columns must be a multiple of this: the elements of one block or word."""

    @property
    def roundings(self) -> int:
        """Roundings to the compute dtype between the stored numbers and a layer's output, for its tolerance."""

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Parts by suffix, each ``(..., rows, columns)`` in stored items, to the weight ``(..., rows, columns)``."""


def dequantize_stacked(
    weight_format: WeightFormat, stored: Mapping[str, Tensor], dtype: torch.dtype, *, stacked: int
) -> Tensor:
    """Dequantize a weight whose rows are `stacked` matrices of one shape, such as gate rows and then up rows.

    Blocks that span rows start anew in each matrix, so those formats are taken apart first.
    """
    if stacked == 1 or all(part.rows_per_item == 1 for part in weight_format.parts):
        return weight_format.dequantize(stored, dtype)
    chunks = [
        dict(zip(stored, each, strict=True))
        for each in zip(*(t.chunk(stacked, -2) for t in stored.values()), strict=True)
    ]
    return torch.cat([weight_format.dequantize(chunk, dtype) for chunk in chunks], dim=-2)


# A SwiGLU expert rounds to the compute dtype after each of gate, up, SiLU, their product, and down.
MLP_ROUNDINGS = 5
