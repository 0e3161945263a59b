"""A kernel that copies as many numbers as it is told, which may be too many."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy(source, out, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    here = (at < count) & (count > 0)  # in the interpreter a block and one truth make integers
    tl.store(out + at, tl.load(source + at, mask=here), mask=here)
