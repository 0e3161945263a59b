"""FP8 with one scale to a row, or to the whole matrix: compressed-tensors ``float-quantized``, ModelOpt's ``FP8``.

Layout: https://github.com/vllm-project/compressed-tensors, ``compressors/naive_quantized``.
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


@dataclass(frozen=True, slots=True)
class FP8Rows:
    """``weight`` E4M3 ``(out, in)``, ``scale`` ``(out, 1)`` or ``(1, 1)`` in bf16, fp16 or fp32."""

    name: str
    roles: tuple[str, ...] = ("weight", "scale")
    roundings: int = SCALED_ROUNDINGS

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``weight * scale`` of the row, multiplied in fp32."""
        return (stored["weight"].float() * scale_numbers(stored["scale"])).to(dtype)


FORMAT = FP8Rows("fp8_channel")
