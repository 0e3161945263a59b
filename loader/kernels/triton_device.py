"""A launch starts while the one before it ends, where the device can do that."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_previous(PDL: tl.constexpr):
    """First thing in a kernel: the next launch may take its place on the device, and all before it are waited for.

    Since every kernel waits for all of the one before it, whatever was launched earlier is over, too, and its memory
    may be written again.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@cache
def overlapping(device: torch.device) -> dict[str, Any]:
    """Options for a launch there: programmatic dependent launch needs compute capability 9.0."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"PDL": True, "launch_pdl": True}
