"""compressed-tensors NVFP4: as ``nvfp4``, but the matrix's factor is stored as its reciprocal.

Source: https://github.com/vllm-project/compressed-tensors, ``compressors/nvfp4`` and `dequantize`: the block's scale is
divided by the factor first, in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loader.formats.base import SCALED_ROUNDINGS
from loader.formats.numbers import by_group, e2m1

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class NVFP4Reciprocal:
    """``weight`` uint8 ``(out, in / 2)``, ``scale`` E4M3 ``(out, in / 16)``, ``global_scale`` fp32 ``(1, 1)``."""

    name: str = "nvfp4_ct"
    roles: tuple[str, ...] = ("weight", "scale", "global_scale")
    roundings: int = SCALED_ROUNDINGS

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``e2m1(nibble) * (scale / global_scale)`` in fp32."""
        scale = stored["scale"].float() / stored["global_scale"]
        return by_group(e2m1(stored["weight"]), scale).to(dtype)


FORMAT = NVFP4Reciprocal()
