"""Rows of activations in the form that a product reads them, and the gate between the two products."""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_device import INTERPRETED, await_previous, kernel

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def gated(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr, UP_OFFSET: tl.constexpr):
    """`loader.activation.ExpertConfig.gated` in float32, for silu."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate * tl.sigmoid(gate * ALPHA) * (up + UP_OFFSET)


@triton.jit
def _fit_for_e4m3(value):
    """`value`, which the interpreter gets rounded to E4M3's numbers already.

    Its cast makes 64 of 127.6, for it drops the carry of what rounds up to a power of two (Triton 3.6).
    """
    if INTERPRETED:
        wide = value * (2.0**20 + 1)  # its difference from that of `value` has the first 4 of 24 bits, rounded
        few = (value + 1.5 * 2.0**14) - 1.5 * 2.0**14  # subnormal numbers are multiples of 2 ** -9
        return tl.where(tl.abs(value) < 2.0**-6, few, wide - (wide - value))
    else:
        return value


@kernel
def prepare(
    source,
    out,
    scales,
    P,
    COLUMNS: tl.constexpr,
    FORM: tl.constexpr,
    SPLITS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Rows ``(P, COLUMNS)`` in the form that a product reads, into `out`; a program has BLOCK columns of ROWS of them.

    With SPLITS, `source` is what a split `gate_up` left, float32 ``(SPLITS, P, 2 * COLUMNS)``, summed up and gated
    here; with 0 it has the rows themselves. FORM: ``plain``; ``streams``, every fourth column from 0 on, then from 1 on
    and so forth, as quads of packed numbers have them; ``fp8``, E4M3 with a float32 scale to each 128 columns, in
    `scales` ``(P, COLUMNS / 128)``, as DeepSeek-V3 computes (arXiv 2412.19437, section 3.3).
    """
    await_previous(PDL)
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * BLOCK
    c = begin + tl.arange(0, BLOCK)
    here = (row_R < P)[:, None] & (c < COLUMNS)[None, :]
    if SPLITS == 0:
        value = tl.load(source + row_R[:, None] * COLUMNS + c[None, :], mask=here, other=0.0)
    else:
        at = source + row_R[:, None] * (2 * COLUMNS) + c[None, :]
        gate = tl.load(at, mask=here, other=0.0)
        up = tl.load(at + COLUMNS, mask=here, other=0.0)
        for split in tl.static_range(1, SPLITS):
            part = at + tl.cast(P, tl.int64) * (2 * COLUMNS) * split
            gate += tl.load(part, mask=here, other=0.0)
            up += tl.load(part + COLUMNS, mask=here, other=0.0)
        value = tl.where(here, gated(gate, up, LIMIT, ALPHA, UP_OFFSET), 0.0)
    if FORM == "fp8":
        BLOCKS: tl.constexpr = (COLUMNS + 127) // 128
        wide = value.to(tl.float32).reshape(ROWS, BLOCK // 128, 128)
        # As integers without their signs, among which NaN is the largest: casts to E4M3 need not know of it.
        largest = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2).to(tl.float32, bitcast=True)
        scale = tl.maximum(largest, 1e-10, propagate_nan=tl.PropagateNan.ALL) / E4M3_MAX
        value = _fit_for_e4m3((wide / scale[:, :, None]).reshape(ROWS, BLOCK))
        b = begin // 128 + tl.arange(0, BLOCK // 128)
        inside = (row_R < P)[:, None] & (b < BLOCKS)[None, :]
        tl.store(scales + row_R[:, None] * BLOCKS + b[None, :], scale, mask=inside)
    if FORM == "streams":
        # Stream by stream, so that a thread writes what lies side by side.
        QUADS: tl.constexpr = COLUMNS // 4
        value = value.reshape(ROWS, BLOCK // 4, 4).permute(0, 2, 1).reshape(ROWS * 4, BLOCK // 4)
        stream = tl.arange(0, ROWS * 4)
        q = begin // 4 + tl.arange(0, BLOCK // 4)
        row = tl.program_id(0).to(tl.int64) * ROWS + stream // 4
        at = out + (row * COLUMNS + stream % 4 * QUADS)[:, None] + q[None, :]
        tl.store(at, value.to(out.dtype.element_ty), mask=(row < P)[:, None] & (q < QUADS)[None, :])
    else:
        tl.store(out + row_R[:, None] * COLUMNS + c[None, :], value.to(out.dtype.element_ty), mask=here)
