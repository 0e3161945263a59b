"""Pages of memory that was never written, made many at a time and not one fault after the other.

A load writes as much new memory as its weights have, and a fault for each 4 KiB of it costs more than the bytes do.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache

from torch import Tensor

POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE`` of Linux 5.14: writable pages for all of a range, whose content stays as it is."""
LEAST_BYTES = 1 << 16
"""What is worth a call."""


def populate(memory: Tensor) -> None:
    """Have the pages of a contiguous tensor on the CPU, which is written next; where that can't be, faults make them.

    Pages of its neighbours at both ends are made too, if they share them.
    """
    if memory.nbytes < LEAST_BYTES or (madvise := _madvise()) is None:
        return
    first, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    start = first // mmap.PAGESIZE * mmap.PAGESIZE
    # Where there is no memory left this fails, and so will the write, as it would have without.
    madvise(start, end - start, POPULATE_WRITE)


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The call of libc; None where the system doesn't know such advice, which it says of a page."""
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        there = ctypes.c_char.from_buffer(page)
        knows = call(ctypes.addressof(there), mmap.PAGESIZE, POPULATE_WRITE) == 0
        del there  # the page can't be closed while somebody has its address
    return call if knows else None
