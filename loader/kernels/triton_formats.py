"""Which formats the Triton kernels have, and by what name; importable without Triton."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "bf16": "plain",
        "fp16": "plain",
        "fp32": "plain",
        "fp8_block": "fp8_block",
        "int4_g32": "int4_g32",
        "mxfp4": "mxfp4",
    }
)
"""What the kernels compute in, by the format of the checkpoint."""
