"""Where kernels run, and what they can make use of there: a launch may start while the one before it ends."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def is_nvidia(device: torch.device) -> bool:
    """Whether kernels are compiled for an NVIDIA device there, and not interpreted."""
    return not INTERPRETED.value and device.type == "cuda" and torch.version.hip is None


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
    if not is_nvidia(device) or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"PDL": True, "launch_pdl": True}
