"""Memory for a parameter."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_FROM_BYTES = 8 << 20


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on Linux large blocks of the CPU ask for huge pages.

    A first touch then costs one page fault in 2 MiB instead of 512, which is most of what a load from the page cache
    costs: https://docs.kernel.org/admin-guide/mm/transhuge.html. Only whole huge pages inside the block count, so
    none of it is more memory. Raises what `torch.empty` raises.
    """
    memory = torch.empty(shape, dtype=dtype, device=device)
    if memory.device.type == "cpu" and memory.nbytes >= HUGE_FROM_BYTES:
        first = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        whole_bytes = (memory.data_ptr() + memory.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        _advise()(first, whole_bytes)
    return memory


@functools.cache
def _advise() -> Callable[[int, int], None]:
    """``madvise(MADV_HUGEPAGE)`` where there is one; it is advice, so that being refused is no error."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return lambda _first, _bytes: None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda first, nbytes: madvise(first, nbytes, mmap.MADV_HUGEPAGE)
