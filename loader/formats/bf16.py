"""Unquantized weights: one tensor ``weight`` of ``(out, in)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loader.formats.base import MLP_ROUNDINGS

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dense:
    """A floating-point dtype that needs no arithmetic at all."""

    name: str
    roles: tuple[str, ...] = ("weight",)
    roundings: int = MLP_ROUNDINGS

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight itself, cast to `dtype`."""
        return stored["weight"].to(dtype)


FORMAT = Dense("bf16")
