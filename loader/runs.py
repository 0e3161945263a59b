"""Scales of groups in runs of columns: what a step of a kernel reads of neighbouring rows lies side by side.

A step reads a few scales of each row: 8 bytes of MXFP4, where memory gives 32 at least. In runs the 8 of one row are
followed by those of the next, so that every byte that memory gives is wanted. Shapes: E slots, R rows, C columns, G
groups to a row.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from loader.kernels.configs import PACKED

if TYPE_CHECKING:
    from torch import Tensor

    from loader.formats import Layout, Part

RUN = 8
"""Groups in a run: 256 columns in groups of 32, what a step of most configurations has."""
PIECE_BYTES = 8 << 20
"""What is laid out at once, and held twice for that long."""


def parts_in_runs(layout: Layout) -> list[Part]:
    """What the Triton kernels read in runs: scales of groups."""
    return [part for part in layout.parts if part.role == "scale"] if layout.name in PACKED else []


def in_runs(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in memory of scales ``(E, R, G)``: ``(E, G / 8, R, 8)``; as it is where runs are no other order."""
    *slots, rows, groups = shape
    return (*slots, groups // RUN, rows, RUN) if groups > RUN and groups % RUN == 0 else shape


def lay_out(scales_ERG: Tensor) -> Tensor:
    """Scales as they are in a checkpoint, contiguous, to the shape of `in_runs`, in the same memory."""
    shape = in_runs(tuple(scales_ERG.shape))
    if len(shape) == scales_ERG.dim():
        return scales_ERG
    import torch  # to plan takes none

    # As bytes: not every device copies every small float.
    stack, (_, runs, rows, run) = scales_ERG.view(torch.uint8), shape
    for some in stack.split(max(1, PIECE_BYTES // max(prod(stack.shape[1:]), 1))):
        by_row = some.view(len(some), rows, runs, run * scales_ERG.element_size())
        some.copy_(by_row.transpose(1, 2).contiguous().view(some.shape))
    return scales_ERG.view(shape)


def rows_of(stack: Tensor) -> Tensor:
    """A view ``(E, R, runs, run)`` of a stack, whichever way it lies: a row ``(E, R, C)`` is one run, so is a number of
    ``(E, R)``.
    """
    if stack.dim() == 4:
        return stack.transpose(1, 2)
    return stack.unsqueeze(2) if stack.dim() == 3 else stack[..., None, None]


def by_rows(stack: Tensor) -> Tensor:
    """A stack ``(E, R, C)``, whichever way it lies: what lies in runs is copied."""
    return rows_of(stack).flatten(2)
