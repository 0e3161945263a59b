"""compressed-tensors ``pack-quantized``: symmetric int4 with one scale to 32 columns, eight numbers in an int32.

Layout: https://github.com/vllm-project/compressed-tensors, ``compressors/pack_quantized``; pinned by its own bytes in
``tests/loader/test_conformance.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loader.formats.base import SCALED_ROUNDINGS
from loader.formats.numbers import by_group, scale_numbers

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Int4G32:
    """``weight`` int32 ``(out, in / 8)``, ``scale`` ``(out, in / 32)`` in bf16, fp16 or fp32."""

    name: str = "int4_g32"
    roles: tuple[str, ...] = ("weight", "scale")
    roundings: int = SCALED_ROUNDINGS

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``(nibble - 8) * scale`` in fp32; column ``i`` is bits ``4 * (i % 8)`` and up of word ``i // 8``."""
        import torch  # to plan takes none

        packed = stored["weight"]
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
        # The shift of a negative word drags its sign along; the mask takes that off again.
        numbers = ((packed.unsqueeze(-1) >> shifts) & 0xF).flatten(-2) - 8
        return by_group(numbers.float(), scale_numbers(stored["scale"])).to(dtype)


FORMAT = Int4G32()
