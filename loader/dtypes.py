"""dtypes as safetensors calls them, which is how a plan names them: to plan takes no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gatekeeper import DTYPE_BITS

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "I16": "int16",
        "I32": "int32",
        "I64": "int64",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
    }
)
"""What torch calls those that this loader reads; https://github.com/huggingface/safetensors, ``tensor.rs``."""


def name_of(dtype: str) -> str:
    """``bfloat16`` for ``BF16``; of one that this loader does not read safetensors' word itself."""
    return NAMES.get(dtype, dtype)


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype of `NAMES`."""
    return DTYPE_BITS[dtype] // 8


def is_wide_float(dtype: str) -> bool:
    """Whether it is a float of 16 bits or more: numbers themselves, and no packing."""
    return NAMES.get(dtype, "").removeprefix("b").startswith("float") and itemsize(dtype) >= 2
