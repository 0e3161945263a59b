"""MXFP8: E4M3 numbers with one E8M0 scale to 32 columns (OCP Microscaling Formats specification 1.0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loader.formats.base import MLP_ROUNDINGS
from loader.formats.numbers import by_group, scale_numbers

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class MXFP8:
    """``weight`` E4M3 ``(out, in)``, ``scale`` uint8 or E8M0 ``(out, in / 32)``."""

    name: str = "mxfp8"
    roles: tuple[str, ...] = ("weight", "scale")
    roundings: int = MLP_ROUNDINGS  # an E4M3 number times a power of two is exact in bf16

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``weight * 2 ** (scale - 127)``."""
        return by_group(stored["weight"].float(), scale_numbers(stored["scale"])).to(dtype)


FORMAT = MXFP8()
