"""One step of a grouped product, for all formats: C columns of a tile of weights by a block of activations.

Shapes: M pairs of a block, N rows of a weight tile, C columns of a step. Everything is accumulated in float32.

Weights are the left operand: a weight tile's rows fill the 64 rows of Hopper's ``wgmma`` whatever the number of tokens,
and numbers unpacked in registers (`triton_unpack`) go into it without a detour through shared memory. With TOKENS_LEFT
it is the other way round: of blocks of 64 pairs and more a thread then has a few, and so a few scales, and what it has
of a row lies side by side in the output. Packed formats have no such way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_device import INTERPRETED
from loader.kernels.triton_unpack import e8m0, factors, streams

HALF_RUN = tl.constexpr(8)
"""Rows of gate, then rows of up, in turns within a tile: a thread's accumulators of ``wgmma`` are 8 rows apart."""


@triton.jit
def dot(a, b, accumulator):
    # The interpreter's dot is wrong on bf16 operands (Triton 3.6).
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def first_run(expert, row_N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    """The first run of rows of an expert's matrix of ROWS by COLUMNS, among all of them; by rows a run is a row."""
    return expert.to(tl.int64) * (ROWS * (COLUMNS // 32 // RUN)) + row_N


@triton.jit
def _product(w_NC, x_MC, accumulator, TOKENS_LEFT: tl.constexpr):
    """``accumulator + w @ x.T``, or its transpose."""
    if TOKENS_LEFT:
        return dot(x_MC, w_NC.T, accumulator)
    else:
        return dot(w_NC, x_MC.T, accumulator)


@triton.jit
def no_sum(N: tl.constexpr, M: tl.constexpr, TOKENS_LEFT: tl.constexpr):
    """What a sum of N rows of weights by M pairs starts as: ``(N, M)``, or with TOKENS_LEFT ``(M, N)``."""
    return tl.zeros((M, N) if TOKENS_LEFT else (N, M), dtype=tl.float32)


@triton.jit
def activations(
    x,
    x_scale,
    place_M,
    here_M,
    step,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    FORMAT: tl.constexpr,
    C: tl.constexpr,
):
    """C columns of a block of x, of COLUMNS, from ``step * C`` on, as `add_product` takes them.

    `place` are rows of x ``(M,)``, not read where they are not `here_M`; EVEN: no step goes beyond COLUMNS. FORMAT:
    ``plain`` numbers, one tile ``(M, C)``; ``fp8_block``, with a factor of each row from `x_scale`, which has one to
    128 columns (float32 numbers have none); ``int4_g32`` or ``mxfp4``, for which x lies by streams (`prepare`), so that
    each is copied to shared memory as it lies: four tiles ``(M, C / 4)``.
    """
    if FORMAT == "plain" or FORMAT == "fp8_block":
        c = step * C + tl.arange(0, C)
        inside = here_M[:, None] if EVEN else here_M[:, None] & (c[None, :] < COLUMNS)
        x_MC = tl.load(x + place_M[:, None] * COLUMNS + c[None, :], mask=inside, other=0.0)
        if FORMAT == "plain" or x_MC.dtype == tl.float32:
            return (x_MC,)
        else:
            BLOCKS: tl.constexpr = (COLUMNS + 127) // 128
            inside_M = here_M if EVEN else here_M & (step < BLOCKS)
            return x_MC, tl.load(x_scale + place_M * BLOCKS + step, mask=inside_M, other=0.0)
    else:
        QUADS: tl.constexpr = COLUMNS // 4
        q = step * (C // 4) + tl.arange(0, C // 4)
        at = x + place_M[:, None] * COLUMNS + q[None, :]
        inside = here_M[:, None] if EVEN else here_M[:, None] & (q[None, :] < QUADS)
        return (
            tl.load(at, mask=inside, other=0.0),
            tl.load(at + QUADS, mask=inside, other=0.0),
            tl.load(at + 2 * QUADS, mask=inside, other=0.0),
            tl.load(at + 3 * QUADS, mask=inside, other=0.0),
        )


@triton.jit
def add_product(
    accumulator,
    x,
    weight,
    scale,
    row_N,
    scale_row_N,
    step,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    FORMAT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    UP: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    C: tl.constexpr,
):
    """``accumulator + weight[row, c] @ x[place, c].T`` over C columns c from ``step * C`` on, of matrices of COLUMNS.

    `x` are the `activations` of that step. With TOKENS_LEFT the accumulator is transposed. `scale_row_N` are the rows
    of scales that rows of weights have, with TOKENS_LEFT one for all, and one for those of up, where UP is not 0, as
    many rows further on. Packed formats have scales by RUN groups of each of a matrix's ROWS (`loader.runs`; GROUPS of
    them where they lie by rows), and `scale_row_N` is the first run of each row then.
    """
    M: tl.constexpr = x[0].shape[0]
    N: tl.constexpr = row_N.shape[0]
    if FORMAT == "plain" or FORMAT == "fp8_block":
        c = step * C + tl.arange(0, C)
        w_at = weight + row_N[:, None] * COLUMNS + c[None, :]
        w_NC = tl.load(w_at) if EVEN else tl.load(w_at, mask=c[None, :] < COLUMNS, other=0.0)
        if FORMAT == "plain":
            return _product(w_NC.to(x[0].dtype), x[0], accumulator, TOKENS_LEFT)
        else:
            tl.static_assert(C == 128, "a step of fp8_block is one block of 128 columns")
            BLOCKS: tl.constexpr = (COLUMNS + 127) // 128
            s_at = scale + scale_row_N * BLOCKS + step
            scale_N = _block_scale(s_at, step < BLOCKS, EVEN)
            if TOKENS_LEFT and UP != 0:
                is_gate_N = tl.arange(0, N) // HALF_RUN % 2 == 0
                scale_N = tl.where(is_gate_N, scale_N, _block_scale(s_at + UP * BLOCKS, step < BLOCKS, EVEN))
            elif TOKENS_LEFT:
                scale_N = tl.full((N,), 1.0, dtype=tl.float32) * scale_N
            zero = no_sum(N, M, TOKENS_LEFT)
            if x[0].dtype == tl.float32:
                part = _product(w_NC.to(tl.float32), x[0], zero, TOKENS_LEFT)
                return accumulator + part * (scale_N[None, :] if TOKENS_LEFT else scale_N[:, None])
            else:
                # Scales are multiplied after the product, so that they take no registers in it.
                part = _product(w_NC, x[0], zero, TOKENS_LEFT)
                if TOKENS_LEFT:
                    return accumulator + part * (x[1][:, None] * scale_N[None, :])
                else:
                    return accumulator + part * (scale_N[:, None] * x[1][None, :])
    else:
        QUADS: tl.constexpr = COLUMNS // 4
        GROUPS: tl.constexpr = COLUMNS // 32
        q = step * (C // 4) + tl.arange(0, C // 4)
        g = step * (C // 32) + tl.arange(0, C // 32)
        w_at = weight + row_N[:, None] * QUADS + q[None, :]
        if RUN == GROUPS:
            s_at = scale + scale_row_N[:, None] * RUN + g[None, :]
        else:
            s_at = scale + scale_row_N[:, None] * RUN + (g // RUN * (ROWS * RUN) + g % RUN)[None, :]
        quads = tl.load(w_at) if EVEN else tl.load(w_at, mask=q[None, :] < QUADS, other=0)
        group = tl.load(s_at) if EVEN else tl.load(s_at, mask=g[None, :] < GROUPS, other=0)
        factor = factors(group, FORMAT, ASSEMBLY)
        spread = tl.broadcast_to(factor[:, :, None], (N, C // 32, 8)).reshape(N, C // 4)
        w0, w1, w2, w3 = streams(quads, spread, FORMAT, x[0].dtype, ASSEMBLY)
        tl.static_assert(not TOKENS_LEFT, "what is unpacked in registers is the left operand")
        accumulator = dot(w0, x[0].T, accumulator)
        accumulator = dot(w1, x[1].T, accumulator)
        accumulator = dot(w2, x[2].T, accumulator)
        return dot(w3, x[3].T, accumulator)


@triton.jit
def _block_scale(at, inside, EVEN: tl.constexpr):
    """The scale of a block of FP8, E8M0 or a float; EVEN: it is inside."""
    scale = tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0)
    if scale.dtype == tl.uint8:
        scale = e8m0(scale, tl.float32)
    return scale.to(tl.float32)
