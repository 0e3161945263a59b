"""FP8 in blocks: E4M3 numbers with one scale to a block of 128 x 128, the last block of an axis may be a partial one.

DeepSeek's ``weight_scale_inv`` is the multiplier in spite of its name: ``weight_dequant`` in
https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/kernel.py. compressed-tensors (``weight_scale``) and
DeepSeek V4 (``scale``, an exponent) mean the same by theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loader.formats.base import SCALED_ROUNDINGS
from loader.formats.numbers import scale_numbers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 128


@dataclass(frozen=True, slots=True)
class FP8Block:
    """``weight`` E4M3 ``(out, in)``, ``scale`` ``(ceil(out / 128), ceil(in / 128))`` in fp32, bf16, fp16 or E8M0."""

    name: str = "fp8_block"
    roles: tuple[str, ...] = ("weight", "scale")
    roundings: int = SCALED_ROUNDINGS

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``weight * scale`` of the block, multiplied in fp32."""
        weight, scale = stored["weight"], scale_numbers(stored["scale"])
        rows, columns = weight.shape[-2:]
        wide = scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
        return (weight.float() * wide).to(dtype)


FORMAT = FP8Block()
