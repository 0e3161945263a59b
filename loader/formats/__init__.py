"""Storage formats: ``rules/formats`` says what a checkpoint's tensors look like, one small file here what they mean."""

from __future__ import annotations

from loader.formats.base import Layout, Part, StraddleError, WeightFormat, dequantize_stacked
from loader.formats.layouts import FORMATS, layout_of, match_layout

__all__ = [
    "FORMATS",
    "Layout",
    "Part",
    "StraddleError",
    "WeightFormat",
    "dequantize_stacked",
    "layout_of",
    "match_layout",
]
