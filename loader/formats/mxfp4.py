"""Quark MXFP4: E2M1 numbers, two to a byte, with one E8M0 scale to 32 columns.

Element formats: OCP Microscaling Formats specification 1.0, sections 5.3 and 5.4; the order of nibbles (the first
column is the low one) is Quark's ``Pack_fp4``, pinned by its own bytes in ``tests/loader/test_conformance.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loader.formats.base import MLP_ROUNDINGS, Part

BLOCK = 32
# Code is sign, two bits of exponent, one of mantissa.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
# Code is the exponent plus 127; there is no zero and no sign, and 255 is NaN.
_E8M0 = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [float("nan")])


@dataclass(frozen=True, slots=True)
class MXFP4:
    """``weight`` uint8 ``(out, in / 2)``, ``weight_scale`` uint8 ``(out, in / 32)``."""

    name: str = "mxfp4"
    parts: tuple[Part, ...] = (
        Part(suffix="weight", dtype=torch.uint8, columns_per_item=2),
        Part(suffix="weight_scale", dtype=torch.uint8, columns_per_item=BLOCK),
    )
    shape_suffix: None = None
    column_multiple: int = BLOCK
    roundings: int = MLP_ROUNDINGS  # an E2M1 number times a power of two is exact in bf16

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``e2m1(nibble) * 2 ** (scale - 127)``."""
        packed = stored["weight"]
        nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
        numbers = _E2M1.to(packed.device, dtype)[nibbles.int()].unflatten(-1, (-1, BLOCK))
        scale = _E8M0.to(packed.device, dtype)[stored["weight_scale"].int()].unsqueeze(-1)
        weight: Tensor = (numbers * scale).flatten(-2)
        return weight


FORMAT = MXFP4()
