"""A kernel that writes down what the kernels' helpers unpack; importable where Triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_unpack import factors, streams


@triton.jit
def show_unpacked(
    quads,
    scale,
    out,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    ASSEMBLY: tl.constexpr = 0,
):
    """All of one matrix ``(ROWS, C)``, in the dtype of `out`."""
    n = tl.arange(0, ROWS)
    q = tl.arange(0, C // 4)
    g = tl.arange(0, C // 32)
    w = tl.load(quads + n[:, None] * (C // 4) + q[None, :])
    s = factors(tl.load(scale + n[:, None] * (C // 32) + g[None, :]), FORMAT, ASSEMBLY)
    s = tl.broadcast_to(s[:, :, None], (ROWS, C // 32, 8)).reshape(ROWS, C // 4)
    w0, w1, w2, w3 = streams(w, s, FORMAT, out.dtype.element_ty, ASSEMBLY)
    at = out + n[:, None] * C + 4 * q[None, :]
    tl.store(at, w0)
    tl.store(at + 1, w1)
    tl.store(at + 2, w2)
    tl.store(at + 3, w3)
