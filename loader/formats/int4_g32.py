"""compressed-tensors ``pack-quantized``: symmetric int4 with one scale to 32 columns, eight numbers in an int32.

Layout: https://github.com/vllm-project/compressed-tensors, ``compressors/pack_quantized``; pinned by its own bytes in
``tests/loader/test_conformance.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loader.formats.base import MLP_ROUNDINGS, Part

GROUP = 32


@dataclass(frozen=True, slots=True)
class Int4G32:
    """``weight_packed`` int32 ``(out, in / 8)``, ``weight_scale`` bf16 ``(out, in / 32)``, ``weight_shape`` int64."""

    name: str = "int4_g32"
    parts: tuple[Part, ...] = (
        Part(suffix="weight_packed", dtype=torch.int32, columns_per_item=8),
        Part(suffix="weight_scale", dtype=torch.bfloat16, columns_per_item=GROUP),
    )
    shape_suffix: str = "weight_shape"
    column_multiple: int = GROUP
    # number x scale has more digits than bf16 holds: each of gate, up and down is rounded once more
    roundings: int = MLP_ROUNDINGS + 3

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``(nibble - 8) * scale``; column ``i`` is bits ``4 * (i % 8)`` and up of word ``i // 8``."""
        packed = stored["weight_packed"]
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
        # The shift of a negative word drags its sign along; the mask takes that off again.
        numbers = ((packed.unsqueeze(-1) >> shifts) & 0xF).flatten(-2) - 8
        scale = stored["weight_scale"].to(dtype).unsqueeze(-1)
        weight: Tensor = (numbers.unflatten(-1, (-1, GROUP)).to(dtype) * scale).flatten(-2)
        return weight


FORMAT = Int4G32()
