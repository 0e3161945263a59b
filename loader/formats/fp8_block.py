"""DeepSeek FP8: E4M3 numbers with one fp32 scale to a block of 128 x 128.

``weight_scale_inv`` is the multiplier in spite of its name: ``weight_dequant`` in
https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loader.formats.base import MLP_ROUNDINGS, Part

BLOCK = 128


@dataclass(frozen=True, slots=True)
class FP8Block:
    """``weight`` E4M3 ``(out, in)``, ``weight_scale_inv`` fp32 ``(ceil(out / 128), ceil(in / 128))``."""

    name: str = "fp8_block"
    parts: tuple[Part, ...] = (
        Part(suffix="weight", dtype=torch.float8_e4m3fn),
        Part(suffix="weight_scale_inv", dtype=torch.float32, rows_per_item=BLOCK, columns_per_item=BLOCK),
    )
    shape_suffix: None = None
    column_multiple: int = 1  # the last block may be a partial one
    roundings: int = MLP_ROUNDINGS + 3  # number x scale is rounded to the compute dtype in each of gate, up and down

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``weight * scale`` of the block, multiplied in fp32."""
        weight, scale = stored["weight"], stored["weight_scale_inv"]
        rows, columns = weight.shape[-2:]
        wide = scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
        return (weight.float() * wide).to(dtype)


FORMAT = FP8Block()
