"""The two grouped products of an MoE layer and what joins them, one template for all formats.

Shapes: T tokens, K slots of a token, P = T * K pairs, E slots of the stack, D hidden size, F intermediate size of a
slot, M pairs of one block, N rows of a weight tile, C columns of a step. Everything is accumulated in float32.

Weights are the left operand: a weight tile's rows fill the 64 rows of Hopper's ``wgmma`` whatever the number of tokens,
and numbers unpacked in registers (`triton_unpack`) go into it without a detour through shared memory.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from loader.kernels.triton_unpack import e8m0, int4_streams, mxfp4_streams, scales_of

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
"""The interpreter's dot is wrong on bf16 operands (Triton 3.6), so that they are widened there."""
E4M3_MAX = tl.constexpr(448.0)
HALF_RUN = tl.constexpr(8)
"""Rows of gate, then rows of up, in turns within a tile: a thread's accumulators of ``wgmma`` are 8 rows apart."""


@triton.jit
def _dot(a, b, accumulator):
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _streams(x_C, M: tl.constexpr, C: tl.constexpr):
    """Every eighth column from 0, 1, ... 7 on, each as `_one_row` of ``(M, C / 8)``."""
    even, odd = x_C.reshape(C // 8, 2, 2, 2).split()
    x_0, x_2 = even.split()
    x_1, x_3 = odd.split()
    x0, x4 = x_0.split()
    x1, x5 = x_1.split()
    x2, x6 = x_2.split()
    x3, x7 = x_3.split()
    return (
        _one_row(x0, M),
        _one_row(x1, M),
        _one_row(x2, M),
        _one_row(x3, M),
        _one_row(x4, M),
        _one_row(x5, M),
        _one_row(x6, M),
        _one_row(x7, M),
    )


@triton.jit
def _add_product(
    accumulator_NM,
    source,
    place,
    here_M,
    weight,
    scale,
    row_N,
    scale_row_N,
    begin,
    columns,
    P,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EVEN: tl.constexpr,
    ONE_ROW: tl.constexpr,
    SPLITS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """``accumulator + weight[row, begin:begin + C] @ x.T``; `weight` and `scale` point at matrices of `columns`.

    x is what `_left` reads of `source`: of rows `place` ``(M, 1)``, or with ONE_ROW of the row `place` alone. EVEN:
    `columns` is a multiple of C. FORMAT: ``plain`` numbers of the dtype of x, ``fp8_block``, ``int4_g32`` or ``mxfp4``.
    SCALES: of groups of 32 columns in an element of `scale`, see `scales_of`. A packed format has its x by streams in
    memory (`to_streams`), so that each is copied to shared memory as it lies; one row is taken apart in registers.
    """
    if FORMAT == "plain" or FORMAT == "fp8_block":
        c = begin + tl.arange(0, C)
        if ONE_ROW:
            x_C = _left(source, place, c, c < columns, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
            x_MC = _one_row(x_C, M)
        else:
            inside = here_M[:, None] if EVEN else here_M[:, None] & (c[None, :] < columns)
            x_MC = _left(source, place, c[None, :], inside, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
        w_at = weight + row_N[:, None] * columns + c[None, :]
        w_NC = tl.load(w_at) if EVEN else tl.load(w_at, mask=c[None, :] < columns, other=0.0)
        if FORMAT == "plain":
            return _dot(w_NC.to(x_MC.dtype), x_MC.T, accumulator_NM)
        else:
            tl.static_assert(C == 128, "a step of fp8_block is one block of 128 columns")
            scale_N = tl.load(scale + scale_row_N * tl.cdiv(columns, 128) + begin // 128)
            if scale_N.dtype == tl.uint8:
                scale_N = e8m0(scale_N, tl.float32)
            scale_N = scale_N.to(tl.float32)
            zero = tl.zeros((N, M), dtype=tl.float32)
            if x_MC.dtype == tl.float32:
                return accumulator_NM + _dot(w_NC.to(tl.float32), x_MC.T, zero) * scale_N[:, None]
            else:
                # Activations to E4M3 by token and block, as DeepSeek-V3 computes: arXiv 2412.19437, section 3.3.
                wide_MC = x_MC.to(tl.float32)
                x_scale_M = tl.maximum(tl.max(tl.abs(wide_MC), 1), 1e-10) / E4M3_MAX
                q_MC = (wide_MC / x_scale_M[:, None]).to(tl.float8e4nv)
                return accumulator_NM + tl.dot(w_NC, q_MC.T, zero) * (scale_N[:, None] * x_scale_M[None, :])
    else:
        j = begin // 8 + tl.arange(0, C // 8)
        n_words = columns // 8
        w_at = weight + row_N[:, None] * n_words + j[None, :]
        words = tl.load(w_at) if EVEN else tl.load(w_at, mask=j[None, :] < n_words, other=0)
        g = begin // (32 * SCALES) + tl.arange(0, C // (32 * SCALES))
        n_groups = columns // (32 * SCALES)
        s_at = scale + row_N[:, None] * n_groups + g[None, :]
        group = tl.load(s_at) if EVEN else tl.load(s_at, mask=g[None, :] < n_groups, other=0)
        if ONE_ROW:
            c = begin + tl.arange(0, C)
            x_C = _left(source, place, c, c < columns, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
            x0, x1, x2, x3, x4, x5, x6, x7 = _streams(x_C, M, C)
        else:
            at = j[None, :]
            inside = here_M[:, None] if EVEN else here_M[:, None] & (at < n_words)
            x0 = _left(source, place, at, inside, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
            x1 = _left(source, place, at + n_words, inside, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
            x2 = _left(source, place, at + 2 * n_words, inside, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
            x3 = _left(source, place, at + 3 * n_words, inside, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
            x4 = _left(source, place, at + 4 * n_words, inside, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
            x5 = _left(source, place, at + 5 * n_words, inside, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
            x6 = _left(source, place, at + 6 * n_words, inside, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
            x7 = _left(source, place, at + 7 * n_words, inside, P, columns, SPLITS, LIMIT, ALPHA, UP_OFFSET, DTYPE)
        spread = tl.broadcast_to(scales_of(group, N, C // 32, SCALES)[:, :, None], (N, C // 32, 4)).reshape(N, C // 8)
        if FORMAT == "int4_g32":
            w0, w1, w2, w3, w4, w5, w6, w7 = int4_streams(words, spread, DTYPE, ASSEMBLY)
        else:
            w0, w1, w2, w3, w4, w5, w6, w7 = mxfp4_streams(words, spread, DTYPE, ASSEMBLY)
        accumulator_NM = _dot(w0, x0.T, accumulator_NM)
        accumulator_NM = _dot(w1, x1.T, accumulator_NM)
        accumulator_NM = _dot(w2, x2.T, accumulator_NM)
        accumulator_NM = _dot(w3, x3.T, accumulator_NM)
        accumulator_NM = _dot(w4, x4.T, accumulator_NM)
        accumulator_NM = _dot(w5, x5.T, accumulator_NM)
        accumulator_NM = _dot(w6, x6.T, accumulator_NM)
        return _dot(w7, x7.T, accumulator_NM)


@triton.jit
def _gated(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr, UP_OFFSET: tl.constexpr):
    """`loader.activation.ExpertConfig.gated` in float32, for silu."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate * tl.sigmoid(gate * ALPHA) * (up + UP_OFFSET)


@triton.jit
def _left(
    source,
    place,
    c,
    mask,
    P,
    F,
    SPLITS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The left side of a product, of row `place` and column `c` of `source`, which has F columns.

    With SPLITS above 1 it is summed up and gated here, from the parts of gate and up that a split `gate_up` left.
    """
    if SPLITS == 1:
        return tl.load(source + place * F + c, mask=mask, other=0.0)
    else:
        at = source + place * (2 * F) + c
        gate = tl.load(at, mask=mask, other=0.0)
        up = tl.load(at + F, mask=mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            part = at + tl.cast(P, tl.int64) * (2 * F) * split
            gate += tl.load(part, mask=mask, other=0.0)
            up += tl.load(part + F, mask=mask, other=0.0)
        return tl.where(mask, _gated(gate, up, LIMIT, ALPHA, UP_OFFSET), 0.0).to(DTYPE)


@triton.jit
def _one_row(x_C, M: tl.constexpr):
    """``(M, C)`` with `x_C` first and zeros below: products on tensor cores take no fewer."""
    return tl.where((tl.arange(0, M) == 0)[:, None], x_C[None, :], 0.0).to(x_C.dtype)


@triton.jit
def _column(i, BLOCK_N: tl.constexpr, STREAMED: tl.constexpr):
    """The column of the intermediate that number i of a tile is: in order, or one stream of a tile after the other."""
    if STREAMED:
        return i % (BLOCK_N // 8) * 8 + i // (BLOCK_N // 8)
    else:
        return i


@triton.jit
def to_streams(x, out, D, BLOCK_W: tl.constexpr):
    """``(T, D)`` to ``(T, 8, D / 8)``: every eighth column from 0 on, then from 1 on, as packed words have them."""
    token = tl.program_id(1).to(tl.int64)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.arange(0, 8)
    here = w[:, None] < D // 8
    x_WC = tl.load(x + token * D + w[:, None] * 8 + c[None, :], mask=here, other=0.0)
    tl.store(out + token * D + c[None, :] * (D // 8) + w[:, None], x_WC, mask=here)


@triton.jit
def _block(b, ids, order, blocks, E, K, PAIRWISE: tl.constexpr, M: tl.constexpr):
    """Expert, places, pairs and which of the M are there; PAIRWISE: block b is pair b, without any schedule."""
    m = tl.arange(0, M)
    if PAIRWISE:
        expert = tl.load(ids + b).to(tl.int32)
        # One that does not exist is computed as another and made NaN in the end.
        expert = tl.where((expert >= 0) & (expert < E), expert, 0)
        return expert, b + m, b + m, m == 0
    else:
        place_M = tl.load(blocks + 3 * b + 1) + m
        here_M = place_M < tl.load(blocks + 3 * b + 2)
        return tl.load(blocks + 3 * b), place_M, tl.load(order + place_M, mask=here_M, other=0), here_M


@triton.jit
def gate_up(
    x,
    weight,
    scale,
    bias,
    ids,
    order,
    blocks,
    n_blocks,
    out,
    P,
    E,
    D,
    F,
    K,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PAIRWISE: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``gated(x @ gate.T, x @ up.T)`` of all pairs, ``(P, F)`` by place, in the dtype of `out`.

    With SPLITS the columns of x are shared out and `out` is float32 ``(SPLITS, P, 2 * F)``: parts of gate, then of up,
    whose sum and gating `down` does. Programs walk tiles, GROUP blocks of pairs by all of one strip of columns at a
    time, so that an expert's blocks read its tile of weights while the cache holds it.

    A packed format has x by streams (`to_streams`), unless it is PAIRWISE, and leaves `out` in that order for `down`.
    """
    STREAMED: tl.constexpr = (FORMAT == "int4_g32" or FORMAT == "mxfp4") and not PAIRWISE
    n_tiles = tl.cdiv(F, BLOCK_N)
    n = P if PAIRWISE else tl.load(n_blocks)
    for tile in range(tl.program_id(0), n * n_tiles * SPLITS, tl.num_programs(0)):
        split = tile % SPLITS
        strip = tile // SPLITS // (GROUP * n_tiles)
        size = tl.minimum(n - strip * GROUP, GROUP)
        within = tile // SPLITS - strip * (GROUP * n_tiles)
        b = strip * GROUP + within % size
        begin_n = within // size * BLOCK_N
        expert, place_M, pair_M, here_M = _block(b, ids, order, blocks, E, K, PAIRWISE, BLOCK_M)
        r = tl.arange(0, 2 * BLOCK_N)
        # Rows beyond F are computed as the last one and never stored.
        i = r // (2 * HALF_RUN) * HALF_RUN + r % HALF_RUN
        f_N = tl.minimum(begin_n + _column(i, BLOCK_N, STREAMED), F - 1)
        half_N = r // HALF_RUN % 2
        row_N = expert.to(tl.int64) * (2 * F) + half_N * F + f_N
        scale_row_N = row_N
        if FORMAT == "fp8_block":
            scale_row_N = (expert.to(tl.int64) * 2 + half_N) * tl.cdiv(F, 128) + f_N // 128
        place = (b // K).to(tl.int64) if PAIRWISE else (pair_M // K).to(tl.int64)[:, None]
        steps = tl.cdiv(tl.cdiv(D, BLOCK_C), SPLITS)
        accumulator = tl.zeros((2 * BLOCK_N, BLOCK_M), dtype=tl.float32)
        for step in range(split * steps, (split + 1) * steps):
            accumulator = _add_product(
                accumulator,
                x,
                place,
                here_M,
                weight,
                scale,
                row_N,
                scale_row_N,
                step * BLOCK_C,
                D,
                P,
                FORMAT,
                SCALES,
                ASSEMBLY,
                EVEN,
                PAIRWISE,
                1,
                LIMIT,
                ALPHA,
                UP_OFFSET,
                DTYPE,
                BLOCK_M,
                2 * BLOCK_N,
                BLOCK_C,
            )
        if BIASED:
            b_N = tl.load(bias + row_N).to(tl.float32)
            accumulator += b_N[:, None] if SPLITS == 1 else tl.where(split == 0, b_N, 0.0)[:, None]
        pairs = accumulator.reshape(BLOCK_N // HALF_RUN, 2, HALF_RUN, BLOCK_M).permute(0, 2, 3, 1)
        gate, up = pairs.split()
        gate_MN, up_MN = gate.reshape(BLOCK_N, BLOCK_M).T, up.reshape(BLOCK_N, BLOCK_M).T
        i = tl.arange(0, BLOCK_N)
        f = begin_n + _column(i, BLOCK_N, STREAMED)
        mask = here_M[:, None] & (f[None, :] < F)
        if STREAMED:
            f = f % 8 * (F // 8) + f // 8
        if SPLITS == 1:
            h_MN = _gated(gate_MN, up_MN, LIMIT, ALPHA, UP_OFFSET)
            tl.store(out + place_M[:, None].to(tl.int64) * F + f[None, :], h_MN.to(out.dtype.element_ty), mask=mask)
        else:
            at = out + (tl.cast(P, tl.int64) * split + place_M[:, None]) * (2 * F) + f[None, :]
            tl.store(at, gate_MN, mask=mask)
            tl.store(at + F, up_MN, mask=mask)


@triton.jit
def down(
    hidden,
    weight,
    scale,
    bias,
    router_weights,
    order,
    blocks,
    n_blocks,
    out,
    P,
    E,
    D,
    F,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``hidden @ down.T`` times the router's weight, ``(P, D)`` by pair in the dtype of `out`; `combine` sums it up."""
    n_tiles = tl.cdiv(D, BLOCK_N)
    n = tl.load(n_blocks)
    for tile in range(tl.program_id(0), n * n_tiles, tl.num_programs(0)):
        strip = tile // (GROUP * n_tiles)
        size = tl.minimum(n - strip * GROUP, GROUP)
        within = tile - strip * (GROUP * n_tiles)
        b = strip * GROUP + within % size
        begin_n = within // size * BLOCK_N
        expert, place_M, pair_M, here_M = _block(b, order, order, blocks, E, 1, False, BLOCK_M)
        d = begin_n + tl.arange(0, BLOCK_N)
        d_N = tl.minimum(d, D - 1)
        row_N = expert.to(tl.int64) * D + d_N
        scale_row_N = row_N
        if FORMAT == "fp8_block":
            scale_row_N = expert.to(tl.int64) * tl.cdiv(D, 128) + d_N // 128
        place = place_M[:, None].to(tl.int64)
        accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for step in range(tl.cdiv(F, BLOCK_C)):
            accumulator = _add_product(
                accumulator,
                hidden,
                place,
                here_M,
                weight,
                scale,
                row_N,
                scale_row_N,
                step * BLOCK_C,
                F,
                P,
                FORMAT,
                SCALES,
                ASSEMBLY,
                EVEN,
                False,
                SPLITS,
                LIMIT,
                ALPHA,
                UP_OFFSET,
                DTYPE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_C,
            )
        if BIASED:
            accumulator += tl.load(bias + row_N).to(tl.float32)[:, None]
        accumulator *= tl.load(router_weights + pair_M, mask=here_M, other=0.0).to(tl.float32)[None, :]
        mask = here_M[:, None] & (d[None, :] < D)
        tl.store(out + pair_M[:, None].to(tl.int64) * D + d[None, :], accumulator.T.to(out.dtype.element_ty), mask=mask)


@triton.jit
def down_by_token(
    hidden,
    weight,
    scale,
    bias,
    router_weights,
    ids,
    out,
    P,
    E,
    D,
    F,
    K,
    FORMAT: tl.constexpr,
    SCALES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`down` and `combine` in one for a few tokens, ``(T, D)``: a program has some columns of one token, of all slots.

    `hidden` is by pair. An expert that several tokens chose is read for each of them, from the cache if all goes well.
    """
    token, begin_n = tl.program_id(1), tl.program_id(0) * BLOCK_N
    d = begin_n + tl.arange(0, BLOCK_N)
    d_N = tl.minimum(d, D - 1)
    first_M = tl.arange(0, BLOCK_M) == 0
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    steps = tl.cdiv(F, BLOCK_C)
    for step in range(K * steps):
        pair = token * K + step // steps
        begin = step % steps * BLOCK_C
        expert = tl.load(ids + pair).to(tl.int32)
        known = (expert >= 0) & (expert < E)
        expert = tl.where(known, expert, 0)
        factor = tl.load(router_weights + pair).to(tl.float32)
        row_N = expert.to(tl.int64) * D + d_N
        scale_row_N = row_N
        if FORMAT == "fp8_block":
            scale_row_N = expert.to(tl.int64) * tl.cdiv(D, 128) + d_N // 128
        part = _add_product(
            tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32),
            hidden,
            pair.to(tl.int64),
            first_M,
            weight,
            scale,
            row_N,
            scale_row_N,
            begin,
            F,
            P,
            FORMAT,
            SCALES,
            ASSEMBLY,
            EVEN,
            True,
            SPLITS,
            LIMIT,
            ALPHA,
            UP_OFFSET,
            DTYPE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_C,
        )
        if BIASED:
            part += tl.where(begin == 0, tl.load(bias + row_N).to(tl.float32), 0.0)[:, None]
        # What weighs nothing adds nothing, be it NaN; an expert that does not exist makes everything NaN.
        part = tl.where(factor == 0.0, 0.0, part * factor)
        total += tl.where(known, part, float("nan"))
    y_N = tl.sum(tl.where(first_M[None, :], total, 0.0), 1)
    tl.store(out + token.to(tl.int64) * D + d, y_N.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def combine(pairs, ids, router_weights, base, out, E, D, K, BASED: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum over a token's slots, in float32, ``(T, D)``; BASED: added to `base`, ``(T, D)`` too."""
    token, d = tl.program_id(1), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = d < D
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    at = token.to(tl.int64) * D + d
    if BASED:
        total += tl.load(base + at, mask=here, other=0.0).to(tl.float32)
    for k in range(K):
        pair = token * K + k
        expert = tl.load(ids + pair)
        known = (expert >= 0) & (expert < E)
        # What weighs nothing was not computed: there is nothing to read.
        computed = known & (tl.load(router_weights + pair) != 0.0)
        part = tl.load(pairs + pair.to(tl.int64) * D + d, mask=here & computed, other=0.0)
        total += tl.where(known, part.to(tl.float32), float("nan"))
    tl.store(out + at, total.to(out.dtype.element_ty), mask=here)
