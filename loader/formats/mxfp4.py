"""MXFP4: E2M1 numbers, two to a byte, with one E8M0 scale to 32 columns.

Quark, compressed-tensors, gpt-oss and DeepSeek V4 write the same bytes under other names and dtypes: the first column
is the low nibble. Pinned by their own bytes in ``tests/loader/test_conformance.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loader.formats.base import MLP_ROUNDINGS
from loader.formats.numbers import by_group, e2m1, scale_numbers

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class MXFP4:
    """``weight`` uint8 or int8 ``(out, in / 2)``, ``scale`` uint8 or E8M0 ``(out, in / 32)``."""

    name: str = "mxfp4"
    roles: tuple[str, ...] = ("weight", "scale")
    roundings: int = MLP_ROUNDINGS  # an E2M1 number times a power of two is exact in bf16

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``e2m1(nibble) * 2 ** (scale - 127)``."""
        return by_group(e2m1(stored["weight"]), scale_numbers(stored["scale"])).to(dtype)


FORMAT = MXFP4()


def join_blocks(blocks: Tensor) -> Tensor:
    """gpt-oss's ``*_blocks``, uint8 ``(..., rows, columns / 32, 16)``, to ``weight`` ``(..., rows, columns / 2)``.

    A view of the same bytes; ``*_scales`` is ``scale`` as it stands. Source: `convert_moe_packed_tensors` in
    ``transformers/integrations/mxfp4.py``, before it transposes.
    """
    return blocks.flatten(-2)
