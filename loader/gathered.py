"""Many small tensors from one device to another in one transfer: each transfer of its own waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`tensors`, which are on one device and of any dtype and shape, on `device`; there already, as they are."""
    if not tensors or tensors[0].device == device:
        return list(tensors)
    # INVARIANT: the widest numbers first, so that all begin at a multiple of their size.
    order = sorted(range(len(tensors)), key=lambda i: tensors[i].dtype.itemsize, reverse=True)
    pieces = [tensors[i].contiguous().flatten().view(torch.uint8) for i in order]
    there = torch.cat(pieces).to(device).split([len(piece) for piece in pieces])
    found = {i: piece.view(tensors[i].dtype).view(tensors[i].shape) for i, piece in zip(order, there, strict=True)}
    return [found[i] for i in range(len(tensors))]
