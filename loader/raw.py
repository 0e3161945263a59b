"""Raw tensors of a checkpoint as matrices, for verification: where numbers lie is worked out here anew.

`Placement.cut` says the same for loading; that the two agree is a part of what verification finds out.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from gatekeeper import CheckpointError, TensorInfo
from loader.checkpoint import DTYPES, Checkpoint
from loader.transfer import Transfer, read_piece


def matrix(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
    """What `info` means, ``(rows, columns)``, as a meta tensor over the data of its whole tensor; nothing is read.

    A vector is a column, a scalar 1 x 1. Of a stack of experts it is one expert's matrix: element ``(i, j)`` of item
    ``e`` stands at ``e * R * C + rows[i] * C + j``, or where rows and columns are swapped at ``e * R * C + j * C +
    rows[i]``, with all axes behind the item's first one merged.
    """
    whole = checkpoint.info(info.name)
    dtype = DTYPES.get(whole.dtype)
    if dtype is None:
        raise CheckpointError(f"{whole.shard}: `{whole.name}` is {whole.dtype}, which this loader does not read")
    data = torch.empty(prod(whole.shape), dtype=dtype, device="meta")
    view = info.view
    if view is None:
        rows = whole.shape[0] if whole.shape else 1
        return data.view(rows, -1)
    height, width = whole.shape[1], prod(whole.shape[2:])
    first = view.item * height * width
    count, start, step = len(view.rows), view.rows.start, view.rows.step
    if view.transposed:
        return data.as_strided((count, height), (step, width), first + start)
    return data.as_strided((count, width), (step * width, 1), first + start * width)


def read(checkpoint: Checkpoint, info: TensorInfo, wanted: Tensor | None = None) -> Tensor:
    """`wanted`, which is some of `matrix` (None: all), in new memory on the CPU."""
    wanted = matrix(checkpoint, info) if wanted is None else wanted
    found = torch.empty(wanted.shape, dtype=wanted.dtype)
    read_piece(checkpoint, [Transfer(checkpoint.info(info.name), wanted, found)], [found])
    return found
