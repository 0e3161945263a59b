"""Raw tensors of a checkpoint as matrices, for verification: where numbers lie is worked out here anew.

`Placement.cut` says the same for loading; that the two agree is a part of what verification finds out. All of it is
numbers, not meta tensors, since a layer has thousands of rows to look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from gatekeeper import CheckpointError, TensorInfo
from loader.checkpoint import DTYPES, Checkpoint, bytes_of
from loader.formats.base import Span

SCRATCH_BYTES = 1 << 18
"""What most strips take with all that lies between their rows."""


class Matrix(NamedTuple):
    """Numbers in a tensor's data: element ``(i, j)`` is number ``first + i * down + j * across``."""

    tensor: TensorInfo
    """The whole tensor."""
    first: int
    height: int
    width: int
    down: int
    across: int

    @property
    def is_by_rows(self) -> bool:
        """Whether a row lies in one piece; else a column does, or next to that: of a stack saved transposed."""
        return self.across == 1

    @property
    def is_contiguous(self) -> bool:
        """Whether all of it lies in one piece, row by row."""
        return (self.across == 1 or self.width == 1) and (self.down == self.width or self.height == 1)

    @property
    def extent(self) -> int:
        """Numbers from the first to the last one."""
        return 1 + (self.height - 1) * self.down + (self.width - 1) * self.across

    def cut(self, rows: Span, columns: Span) -> Matrix:
        """These rows and columns of it."""
        first = self.first + rows[0] * self.down + columns[0] * self.across
        return Matrix(self.tensor, first, rows[1] - rows[0], columns[1] - columns[0], self.down, self.across)


class Reader:
    """Reads matrices of one checkpoint, in one thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._grow(SCRATCH_BYTES)

    def matrix(self, info: TensorInfo) -> Matrix:
        """What `info` means; a vector is a column, a scalar 1 x 1. Nothing is read.

        Of a stack of experts it is one expert's matrix: element ``(i, j)`` of item ``e`` stands at ``e * R * C +
        rows[i] * C + j``, or where rows and columns are swapped at ``e * R * C + j * C + rows[i]``, with all axes
        behind the item's first one merged.
        """
        view = info.view
        if view is None:
            width = prod(info.shape[1:])
            return Matrix(info, 0, info.shape[0] if info.shape else 1, width, width, 1)
        whole = self.checkpoint.info(info.name)
        height, width = whole.shape[1], prod(whole.shape[2:])
        first = view.item * height * width
        count, start, step = len(view.rows), view.rows.start, view.rows.step
        if view.transposed:
            return Matrix(whole, first + start, count, height, step, width)
        return Matrix(whole, first + start * width, count, width, step * width, 1)

    def read(self, matrices: Sequence[Matrix]) -> Tensor:
        """Matrices of one shape and dtype, ``(N, rows, columns)`` in new memory on the CPU."""
        some = matrices[0]
        dtype = DTYPES.get(some.tensor.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{some.tensor.shard}: `{some.tensor.name}` is {some.tensor.dtype}, which this loader does not read"
            )
        found = torch.empty((len(matrices), some.height, some.width), dtype=dtype)
        memory, nbytes = bytes_of(found), some.height * some.width * dtype.itemsize
        for i, matrix in enumerate(matrices):
            if matrix.is_contiguous:
                self._fill(memory[i * nbytes : (i + 1) * nbytes], matrix, dtype)
            else:
                found[i].copy_(self._spread(matrix, dtype))
        return found

    def _spread(self, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """A view of memory that the next one is read into."""
        nbytes = matrix.extent * dtype.itemsize
        if nbytes > len(self._scratch):
            self._grow(nbytes)
        self._fill(self._memory[:nbytes], matrix, dtype)
        raw = self._scratch[:nbytes].view(dtype)
        return raw.as_strided((matrix.height, matrix.width), (matrix.down, matrix.across))

    def _fill(self, memory: memoryview, matrix: Matrix, dtype: torch.dtype) -> None:
        """With the bytes from the first number of a matrix on."""
        first_byte = matrix.first * dtype.itemsize
        assert first_byte + len(memory) <= matrix.tensor.nbytes
        self.checkpoint.read_into([matrix.tensor], matrix.tensor.start + first_byte, [memory])

    def _grow(self, nbytes: int) -> None:
        self._scratch = torch.empty(nbytes, dtype=torch.uint8)
        self._memory = bytes_of(self._scratch)
