"""Storage formats by the name that ``rules/formats`` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from loader.formats import bf16, fp8_block, fp16, int4_g32, mxfp4
from loader.formats.base import Part, StraddleError, WeightFormat, dequantize_stacked

_ALL: tuple[WeightFormat, ...] = (bf16.FORMAT, fp16.FORMAT, fp8_block.FORMAT, int4_g32.FORMAT, mxfp4.FORMAT)

FORMATS: Mapping[str, WeightFormat] = MappingProxyType({each.name: each for each in _ALL})
"""What this loader can put into memory."""

__all__ = ["FORMATS", "Part", "StraddleError", "WeightFormat", "dequantize_stacked"]
