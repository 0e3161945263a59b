"""Where kernels run, and what they can make use of there: a launch may start while the one before it ends."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

log = logging.getLogger(__name__)

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def is_nvidia(device: torch.device) -> bool:
    """Whether kernels are compiled for an NVIDIA device there, and not interpreted."""
    return not INTERPRETED.value and device.type == "cuda" and torch.version.hip is None


@cache
def capability(device: torch.device) -> int:
    """Compute capability of an NVIDIA device that kernels are compiled for, 90 for 9.0; 0 anywhere else."""
    if not is_nvidia(device):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


kernel = triton.jit(do_not_specialize=("P", "T", "CHUNKS"))
"""Decorates what is launched: nothing is compiled for sizes that change from batch to batch (divisible by 16, or 1), so
that an engine that has run a few of them compiles nothing while it serves."""


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
    if capability(device) < 90:
        return {}
    return {"PDL": True, "launch_pdl": True}


def leave_cache(compiled: Any, device: torch.device) -> None:
    """Ask that multiprocessors keep most of their memory as cache while this kernel runs: a short one, before others.

    Else the driver makes room for as many of its thread blocks as fit, and the kernels after it keep what they find.
    Products of packed formats read a few bytes of each row of scales at a time, and so again and again from a cache
    that is large enough. `compiled` is what a launch on `device` gives; what was not loaded is left alone.
    """
    function = getattr(compiled, "function", None)
    if function is not None and is_nvidia(device):
        _prefer_cache(function, device)


@cache
def _prefer_cache(function: int, device: torch.device) -> None:
    """Once for each loaded kernel; it is a hint, so that what fails costs time alone."""
    carveout, percent = 9, 20  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of CUDA's driver API
    try:
        with torch.cuda.device(device):
            failed = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), carveout, percent)
    except (OSError, AttributeError) as error:
        failed = error
    if failed:
        log.warning("the driver divides cache and shared memory as it likes: cuFuncSetAttribute: %s", failed)
