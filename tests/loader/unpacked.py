"""A kernel that writes down what the kernels' helpers unpack; importable where Triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_unpack import int4_streams, mxfp4_streams


@triton.jit
def show_unpacked(
    words, scale, out, FORMAT: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, ASSEMBLY: tl.constexpr = False
):
    """All of one matrix ``(ROWS, C)``, in the dtype of `out`."""
    n = tl.arange(0, ROWS)
    j = tl.arange(0, C // 8)
    g = tl.arange(0, C // 32)
    w = tl.load(words + n[:, None] * (C // 8) + j[None, :])
    s = tl.load(scale + n[:, None] * (C // 32) + g[None, :])
    s = tl.broadcast_to(s[:, :, None], (ROWS, C // 32, 4)).reshape(ROWS, C // 8)
    if FORMAT == "int4_g32":
        w0, w1, w2, w3, w4, w5, w6, w7 = int4_streams(w, s, out.dtype.element_ty, ASSEMBLY)
    else:
        w0, w1, w2, w3, w4, w5, w6, w7 = mxfp4_streams(w, s, out.dtype.element_ty, ASSEMBLY)
    at = out + n[:, None] * C + 8 * j[None, :]
    tl.store(at, w0)
    tl.store(at + 1, w1)
    tl.store(at + 2, w2)
    tl.store(at + 3, w3)
    tl.store(at + 4, w4)
    tl.store(at + 5, w5)
    tl.store(at + 6, w6)
    tl.store(at + 7, w7)
