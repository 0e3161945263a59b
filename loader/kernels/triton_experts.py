"""The two grouped products of an MoE layer and what joins them, one template for all formats.

Shapes: T tokens, K slots of a token, P = T * K pairs, E slots of the stack, D hidden size, F intermediate size of a
slot, M pairs of one block, N rows of a weight tile, C columns of a step. Everything is accumulated in float32.

Weights are the left operand: a weight tile's rows fill the 64 rows of Hopper's ``wgmma`` whatever the number of tokens,
and numbers unpacked in registers (`triton_unpack`) go into it without a detour through shared memory. With TOKENS_LEFT
it is the other way round: of blocks of 64 pairs and more a thread then has a few, and so a few scales, and what it has
of a row lies side by side in the output. Packed formats have no such way. Sizes of a layer are constants of its
kernels, so that what they divide, and how its rows are aligned, is known when they are compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_device import INTERPRETED, await_previous
from loader.kernels.triton_unpack import e8m0, factors, streams

E4M3_MAX = tl.constexpr(448.0)
HALVED = tl.constexpr(128)
"""Pairs of a block from which on one that is half empty, as an expert's last can be, is computed half as high, save
where `down` walks."""
HALF_RUN = tl.constexpr(8)
"""Rows of gate, then rows of up, in turns within a tile: a thread's accumulators of ``wgmma`` are 8 rows apart."""


@triton.jit
def _dot(a, b, accumulator):
    # The interpreter's dot is wrong on bf16 operands (Triton 3.6).
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _product(w_NC, x_MC, accumulator, TOKENS_LEFT: tl.constexpr):
    """``accumulator + w @ x.T``, or its transpose."""
    if TOKENS_LEFT:
        return _dot(x_MC, w_NC.T, accumulator)
    else:
        return _dot(w_NC, x_MC.T, accumulator)


@triton.jit
def _no_sum(N: tl.constexpr, M: tl.constexpr, TOKENS_LEFT: tl.constexpr):
    """What a sum of N rows of weights by M pairs starts as: ``(N, M)``, or with TOKENS_LEFT ``(M, N)``."""
    return tl.zeros((M, N) if TOKENS_LEFT else (N, M), dtype=tl.float32)


@triton.jit
def _add_product(
    accumulator,
    x,
    x_scale,
    place_M,
    here_M,
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
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """``accumulator + weight[row, c] @ x[place, c].T`` over C columns c from ``step * C`` on, of matrices of COLUMNS.

    With TOKENS_LEFT the accumulator is transposed. `place` are rows of x ``(M,)``, 0 where they are not `here_M`; EVEN:
    no step goes beyond COLUMNS. `scale_row_N` are the rows of scales that rows of weights have, with TOKENS_LEFT one
    for all, and one for those of up, where UP is not 0, as many rows further on. FORMAT: ``plain``
    numbers of the dtype of x; ``fp8_block``, for which x is FP8 with an `x_scale` to 128 columns, or float32 without;
    ``int4_g32`` or ``mxfp4``, for which x lies by streams (`prepare`), so that each is copied to shared memory as it
    lies.
    """
    if FORMAT == "plain" or FORMAT == "fp8_block":
        c = step * C + tl.arange(0, C)
        inside = here_M[:, None] if EVEN else here_M[:, None] & (c[None, :] < COLUMNS)
        x_MC = tl.load(x + place_M[:, None] * COLUMNS + c[None, :], mask=inside, other=0.0)
        w_at = weight + row_N[:, None] * COLUMNS + c[None, :]
        w_NC = tl.load(w_at) if EVEN else tl.load(w_at, mask=c[None, :] < COLUMNS, other=0.0)
        if FORMAT == "plain":
            return _product(w_NC.to(x_MC.dtype), x_MC, accumulator, TOKENS_LEFT)
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
            zero = _no_sum(N, M, TOKENS_LEFT)
            if x_MC.dtype == tl.float32:
                part = _product(w_NC.to(tl.float32), x_MC, zero, TOKENS_LEFT)
                return accumulator + part * (scale_N[None, :] if TOKENS_LEFT else scale_N[:, None])
            else:
                x_scale_M = tl.load(x_scale + place_M * BLOCKS + step, mask=here_M & (step < BLOCKS), other=0.0)
                # Scales are multiplied after the product, so that they take no registers in it.
                part = _product(w_NC, x_MC, zero, TOKENS_LEFT)
                if TOKENS_LEFT:
                    return accumulator + part * (x_scale_M[:, None] * scale_N[None, :])
                else:
                    return accumulator + part * (scale_N[:, None] * x_scale_M[None, :])
    else:
        QUADS: tl.constexpr = COLUMNS // 4
        GROUPS: tl.constexpr = COLUMNS // 32
        q = step * (C // 4) + tl.arange(0, C // 4)
        g = step * (C // 32) + tl.arange(0, C // 32)
        w_at = weight + row_N[:, None] * QUADS + q[None, :]
        s_at = scale + row_N[:, None] * GROUPS + g[None, :]
        quads = tl.load(w_at) if EVEN else tl.load(w_at, mask=q[None, :] < QUADS, other=0)
        group = tl.load(s_at) if EVEN else tl.load(s_at, mask=g[None, :] < GROUPS, other=0)
        at = x + place_M[:, None] * COLUMNS + q[None, :]
        inside = here_M[:, None] if EVEN else here_M[:, None] & (q[None, :] < QUADS)
        x0 = tl.load(at, mask=inside, other=0.0)
        x1 = tl.load(at + QUADS, mask=inside, other=0.0)
        x2 = tl.load(at + 2 * QUADS, mask=inside, other=0.0)
        x3 = tl.load(at + 3 * QUADS, mask=inside, other=0.0)
        factor = factors(group, FORMAT, ASSEMBLY)
        spread = tl.broadcast_to(factor[:, :, None], (N, C // 32, 8)).reshape(N, C // 4)
        w0, w1, w2, w3 = streams(quads, spread, FORMAT, x.dtype.element_ty, ASSEMBLY)
        tl.static_assert(not TOKENS_LEFT, "what is unpacked in registers is the left operand")
        accumulator = _dot(w0, x0.T, accumulator)
        accumulator = _dot(w1, x1.T, accumulator)
        accumulator = _dot(w2, x2.T, accumulator)
        return _dot(w3, x3.T, accumulator)


@triton.jit
def _block_scale(at, inside, EVEN: tl.constexpr):
    """The scale of a block of FP8, E8M0 or a float; EVEN: it is inside."""
    scale = tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0)
    if scale.dtype == tl.uint8:
        scale = e8m0(scale, tl.float32)
    return scale.to(tl.float32)


@triton.jit
def _gated(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr, UP_OFFSET: tl.constexpr):
    """`loader.activation.ExpertConfig.gated` in float32, for silu."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate * tl.sigmoid(gate * ALPHA) * (up + UP_OFFSET)


@triton.jit
def _column(i, BLOCK_N: tl.constexpr, STREAMED: tl.constexpr):
    """The column of the intermediate that number i of a tile is: in order, or one stream of a tile after the other."""
    if STREAMED:
        return i % (BLOCK_N // 4) * 4 + i // (BLOCK_N // 4)
    else:
        return i


@triton.jit
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
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Rows ``(P, COLUMNS)`` in the form that a product reads, into `out`.

    With SPLITS, `source` is what a split `gate_up` left, float32 ``(SPLITS, P, 2 * COLUMNS)``, summed up and gated
    here; with 0 it has the rows themselves. FORM: ``plain``; ``streams``, every fourth column from 0 on, then from 1 on
    and so forth, as quads of packed numbers have them; ``fp8``, E4M3 with a float32 scale to each 128 columns, in
    `scales` ``(P, COLUMNS / 128)``, as DeepSeek-V3 computes (arXiv 2412.19437, section 3.3).
    """
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = c < COLUMNS
    if SPLITS == 0:
        value = tl.load(source + row * COLUMNS + c, mask=here, other=0.0)
    else:
        at = source + row * (2 * COLUMNS) + c
        gate = tl.load(at, mask=here, other=0.0)
        up = tl.load(at + COLUMNS, mask=here, other=0.0)
        for split in tl.static_range(1, SPLITS):
            part = at + tl.cast(P, tl.int64) * (2 * COLUMNS) * split
            gate += tl.load(part, mask=here, other=0.0)
            up += tl.load(part + COLUMNS, mask=here, other=0.0)
        value = tl.where(here, _gated(gate, up, LIMIT, ALPHA, UP_OFFSET), 0.0)
    if FORM == "fp8":
        wide = value.to(tl.float32).reshape(BLOCK // 128, 128)
        scale = tl.maximum(tl.max(tl.abs(wide), 1), 1e-10) / E4M3_MAX
        value = (wide / scale[:, None]).reshape(BLOCK)
        b = tl.program_id(1) * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
        BLOCKS: tl.constexpr = (COLUMNS + 127) // 128
        tl.store(scales + row * BLOCKS + b, scale, mask=b < BLOCKS)
    if FORM == "streams":
        c = c % 4 * (COLUMNS // 4) + c // 4
    tl.store(out + row * COLUMNS + c, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _block(b, ids, order, blocks, E, PAIRWISE: tl.constexpr, M: tl.constexpr):
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
    x_scale,
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
    K,
    D: tl.constexpr,
    F: tl.constexpr,
    FORMAT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PAIRWISE: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """``gated(x @ gate.T, x @ up.T)`` of all pairs, ``(P, F)`` by place, in the dtype of `out`.

    With SPLITS the columns of x are shared out and `out` is float32 ``(SPLITS, P, 2 * F)``: parts of gate, then of up,
    whose sum and gating `prepare` does. Programs walk tiles, GROUP blocks of pairs by all of one strip of columns at a
    time, so that an expert's blocks read its tile of weights while the cache holds it.

    A packed format has x by streams (`prepare`), and leaves `out` in that order for `down`.
    """
    N_TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    HALVES: tl.constexpr = 1 if BLOCK_M >= HALVED and not PAIRWISE else 0
    await_previous(PDL)
    n = P if PAIRWISE else tl.load(n_blocks)
    for tile in range(tl.program_id(0), n * N_TILES * SPLITS, tl.num_programs(0)):
        b, strip_n = _place_of(tile // SPLITS, n, N_TILES, GROUP)
        is_half = _is_half(b, blocks, HALVES, BLOCK_M)
        for half in tl.static_range(HALVES + 1):
            if is_half == (half == 1):
                _tile_of_gate_up(
                    b,
                    strip_n * BLOCK_N,
                    tile % SPLITS,
                    x,
                    x_scale,
                    weight,
                    scale,
                    bias,
                    ids,
                    order,
                    blocks,
                    out,
                    P,
                    E,
                    K,
                    D,
                    F,
                    FORMAT,
                    ASSEMBLY,
                    PAIRWISE,
                    LIMIT,
                    ALPHA,
                    UP_OFFSET,
                    BIASED,
                    SPLITS,
                    TOKENS_LEFT,
                    BLOCK_M >> half,
                    BLOCK_N,
                    BLOCK_C,
                )


@triton.jit
def _is_half(b, blocks, HALVES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether block b has so few pairs that half of its height will do."""
    if HALVES:
        return tl.load(blocks + 3 * b + 2) - tl.load(blocks + 3 * b + 1) <= BLOCK_M // 2
    else:
        return False


@triton.jit
def _tile_of_gate_up(
    b,
    begin_n,
    split,
    x,
    x_scale,
    weight,
    scale,
    bias,
    ids,
    order,
    blocks,
    out,
    P,
    E,
    K,
    D: tl.constexpr,
    F: tl.constexpr,
    FORMAT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PAIRWISE: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of block b the columns from `begin_n` on, or the part of them that is `split`."""
    STREAMED: tl.constexpr = (FORMAT == "int4_g32" or FORMAT == "mxfp4") and SPLITS == 1
    STEPS: tl.constexpr = ((D + BLOCK_C - 1) // BLOCK_C + SPLITS - 1) // SPLITS
    expert, place_M, pair_M, here_M = _block(b, ids, order, blocks, E, PAIRWISE, BLOCK_M)
    r = tl.arange(0, 2 * BLOCK_N)
    # Rows beyond F are computed as the last one and never stored.
    i = r // (2 * HALF_RUN) * HALF_RUN + r % HALF_RUN
    f_N = tl.minimum(begin_n + _column(i, BLOCK_N, STREAMED), F - 1)
    half_N = r // HALF_RUN % 2
    row_N = expert.to(tl.int64) * (2 * F) + half_N * F + f_N
    scale_row_N = row_N
    UP: tl.constexpr = (F + 127) // 128
    if FORMAT == "fp8_block" and TOKENS_LEFT:
        tl.static_assert(BLOCK_N <= 128, "a tile's rows of gate have one scale")
        scale_row_N = expert.to(tl.int64) * (2 * UP) + begin_n // 128
    elif FORMAT == "fp8_block":
        scale_row_N = (expert.to(tl.int64) * 2 + half_N) * UP + f_N // 128
    accumulator = _no_sum(2 * BLOCK_N, BLOCK_M, TOKENS_LEFT)
    for step in range(split * STEPS, (split + 1) * STEPS):
        accumulator = _add_product(
            accumulator,
            x,
            x_scale,
            (pair_M // K).to(tl.int64),
            here_M,
            weight,
            scale,
            row_N,
            scale_row_N,
            step,
            D,
            D % (BLOCK_C * SPLITS) == 0,
            FORMAT,
            ASSEMBLY,
            TOKENS_LEFT,
            UP,
            BLOCK_M,
            2 * BLOCK_N,
            BLOCK_C,
        )
    if BIASED:
        b_N = tl.load(bias + row_N).to(tl.float32)
        b_N = b_N if SPLITS == 1 else tl.where(split == 0, b_N, 0.0)
        accumulator += b_N[None, :] if TOKENS_LEFT else b_N[:, None]
    gate_MN, up_MN = _gate_and_up(accumulator, BLOCK_N, BLOCK_M, TOKENS_LEFT)
    f = begin_n + _column(tl.arange(0, BLOCK_N), BLOCK_N, STREAMED)
    mask = here_M[:, None] & (f[None, :] < F)
    if STREAMED:
        f = f % 4 * (F // 4) + f // 4
    if SPLITS == 1:
        h_MN = _gated(gate_MN, up_MN, LIMIT, ALPHA, UP_OFFSET)
        tl.store(out + place_M[:, None].to(tl.int64) * F + f[None, :], h_MN.to(out.dtype.element_ty), mask=mask)
    else:
        at = out + (tl.cast(P, tl.int64) * split + place_M[:, None]) * (2 * F) + f[None, :]
        tl.store(at, gate_MN, mask=mask)
        tl.store(at + F, up_MN, mask=mask)


@triton.jit
def _gate_and_up(accumulator, N: tl.constexpr, M: tl.constexpr, TOKENS_LEFT: tl.constexpr):
    """Both halves of a tile, ``(M, N)`` each."""
    if TOKENS_LEFT:
        gate, up = accumulator.reshape(M, N // HALF_RUN, 2, HALF_RUN).permute(0, 1, 3, 2).split()
        return gate.reshape(M, N), up.reshape(M, N)
    else:
        gate, up = accumulator.reshape(N // HALF_RUN, 2, HALF_RUN, M).permute(0, 2, 3, 1).split()
        return gate.reshape(N, M).T, up.reshape(N, M).T


@triton.jit
def _place_of(tile, n, N_TILES: tl.constexpr, GROUP: tl.constexpr):
    """The block of pairs and the strip of columns of tile number `tile`, of `n` blocks and N_TILES strips."""
    if GROUP == 1:
        return tile // N_TILES, tile % N_TILES
    else:
        first = tile // (GROUP * N_TILES) * GROUP
        within = tile % (GROUP * N_TILES)
        size = tl.minimum(n - first, GROUP)
        return first + within % size, within // size


@triton.jit
def down(
    hidden,
    hidden_scale,
    weight,
    scale,
    bias,
    router_weights,
    ids,
    order,
    blocks,
    n_blocks,
    out,
    P,
    E,
    D: tl.constexpr,
    F: tl.constexpr,
    FORMAT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PAIRWISE: tl.constexpr,
    BIASED: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    WALKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """``hidden @ down.T`` times the router's weight, ``(P, D)`` by pair in the dtype of `out`; `combine` sums it up.

    WALKS: a program has neighbouring tiles and walks them in one loop of all their steps, for the few steps of a tile
    would end before the loads of the next could be under way. Otherwise a tile is a loop of its own, whose products
    overlap: nothing looks at their sum before its end.
    """
    N_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (F + BLOCK_C - 1) // BLOCK_C
    HALVES: tl.constexpr = 1 if BLOCK_M >= HALVED and not PAIRWISE else 0
    await_previous(PDL)
    n = P if PAIRWISE else tl.load(n_blocks)
    n_mine = tl.cdiv(n * N_TILES, tl.num_programs(0))
    first = tl.program_id(0) * n_mine
    last = tl.minimum(first + n_mine, n * N_TILES)
    if WALKS:
        accumulator = _no_sum(BLOCK_N, BLOCK_M, TOKENS_LEFT)
        for at in range(first * STEPS, last * STEPS):
            step = at % STEPS
            b, strip = _place_of(at // STEPS, n, N_TILES, GROUP)
            place_M, pair_M, here_M, d, row_N, scale_row_N = _tile_of_down(
                b, strip, ids, order, blocks, E, D, FORMAT, PAIRWISE, TOKENS_LEFT, BLOCK_M, BLOCK_N
            )
            accumulator = _add_product(
                accumulator,
                hidden,
                hidden_scale,
                place_M.to(tl.int64),
                here_M,
                weight,
                scale,
                row_N,
                scale_row_N,
                step,
                F,
                F % BLOCK_C == 0,
                FORMAT,
                ASSEMBLY,
                TOKENS_LEFT,
                0,
                BLOCK_M,
                BLOCK_N,
                BLOCK_C,
            )
            if step == STEPS - 1:
                _store_weighted(
                    accumulator, bias, row_N, router_weights, pair_M, here_M, out, d, D, BIASED, TOKENS_LEFT
                )
                accumulator = _no_sum(BLOCK_N, BLOCK_M, TOKENS_LEFT)
    else:
        for tile in range(first, last):
            b, strip = _place_of(tile, n, N_TILES, GROUP)
            is_half = _is_half(b, blocks, HALVES, BLOCK_M)
            for half in tl.static_range(HALVES + 1):
                if is_half == (half == 1):
                    M: tl.constexpr = BLOCK_M >> half
                    place_M, pair_M, here_M, d, row_N, scale_row_N = _tile_of_down(
                        b, strip, ids, order, blocks, E, D, FORMAT, PAIRWISE, TOKENS_LEFT, M, BLOCK_N
                    )
                    accumulator = _no_sum(BLOCK_N, M, TOKENS_LEFT)
                    for step in range(STEPS):
                        accumulator = _add_product(
                            accumulator,
                            hidden,
                            hidden_scale,
                            place_M.to(tl.int64),
                            here_M,
                            weight,
                            scale,
                            row_N,
                            scale_row_N,
                            step,
                            F,
                            F % BLOCK_C == 0,
                            FORMAT,
                            ASSEMBLY,
                            TOKENS_LEFT,
                            0,
                            M,
                            BLOCK_N,
                            BLOCK_C,
                        )
                    _store_weighted(
                        accumulator, bias, row_N, router_weights, pair_M, here_M, out, d, D, BIASED, TOKENS_LEFT
                    )


@triton.jit
def _tile_of_down(
    b,
    strip,
    ids,
    order,
    blocks,
    E,
    D: tl.constexpr,
    FORMAT: tl.constexpr,
    PAIRWISE: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of a strip of block b: places and pairs of its rows, which are there, and `_rows_of_down`."""
    expert, place_M, pair_M, here_M = _block(b, ids, order, blocks, E, PAIRWISE, BLOCK_M)
    d, row_N, scale_row_N = _rows_of_down(expert, strip, D, FORMAT, TOKENS_LEFT, BLOCK_N)
    return place_M, pair_M, here_M, d, row_N, scale_row_N


@triton.jit
def _rows_of_down(
    expert, strip, D: tl.constexpr, FORMAT: tl.constexpr, TOKENS_LEFT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Columns of the output of a strip, the rows of the stack that they are, and those of its scales."""
    d = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    d_N = tl.minimum(d, D - 1)
    row_N = expert.to(tl.int64) * D + d_N
    if FORMAT == "fp8_block" and TOKENS_LEFT:
        tl.static_assert(BLOCK_N <= 128, "a tile's rows have one scale")
        return d, row_N, expert.to(tl.int64) * ((D + 127) // 128) + strip * BLOCK_N // 128
    elif FORMAT == "fp8_block":
        return d, row_N, expert.to(tl.int64) * ((D + 127) // 128) + d_N // 128
    else:
        return d, row_N, row_N


@triton.jit
def _store_weighted(
    y,
    bias,
    row_N,
    router_weights,
    pair_M,
    here_M,
    out,
    d,
    D: tl.constexpr,
    BIASED: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
):
    y_MN = y if TOKENS_LEFT else y.T
    if BIASED:
        y_MN += tl.load(bias + row_N).to(tl.float32)[None, :]
    y_MN *= tl.load(router_weights + pair_M, mask=here_M, other=0.0).to(tl.float32)[:, None]
    mask = here_M[:, None] & (d[None, :] < D)
    tl.store(out + pair_M[:, None].to(tl.int64) * D + d[None, :], y_MN.to(out.dtype.element_ty), mask=mask)


@triton.jit
def down_by_token(
    hidden,
    hidden_scale,
    weight,
    scale,
    bias,
    router_weights,
    ids,
    out,
    E,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """`down` and `combine` in one for a few tokens, ``(T, D)``: a program has some columns of one token, of all slots.

    `hidden` is by pair. An expert that several tokens chose is read for each of them, from the cache if all goes well.
    """
    STEPS: tl.constexpr = (F + BLOCK_C - 1) // BLOCK_C
    await_previous(PDL)
    token = tl.program_id(1)
    first_M = tl.arange(0, BLOCK_M) == 0
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for at in range(K * STEPS):
        pair = token * K + at // STEPS
        step = at % STEPS
        expert = tl.load(ids + pair).to(tl.int32)
        known = (expert >= 0) & (expert < E)
        expert = tl.where(known, expert, 0)
        factor = tl.load(router_weights + pair).to(tl.float32)
        _, row_N, scale_row_N = _rows_of_down(expert, tl.program_id(0), D, FORMAT, False, BLOCK_N)
        part = _add_product(
            tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32),
            hidden,
            hidden_scale,
            (pair + tl.arange(0, BLOCK_M)).to(tl.int64),
            first_M,
            weight,
            scale,
            row_N,
            scale_row_N,
            step,
            F,
            F % BLOCK_C == 0,
            FORMAT,
            ASSEMBLY,
            False,
            0,
            BLOCK_M,
            BLOCK_N,
            BLOCK_C,
        )
        if BIASED:
            part += tl.where(step == 0, tl.load(bias + row_N).to(tl.float32), 0.0)[:, None]
        # What weighs nothing adds nothing, be it NaN; an expert that does not exist makes everything NaN.
        part = tl.where(factor == 0.0, 0.0, part * factor)
        total += tl.where(known, part, float("nan"))
    y_N = tl.sum(tl.where(first_M[None, :], total, 0.0), 1)
    d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out + token.to(tl.int64) * D + d, y_N.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def combine(
    pairs,
    ids,
    router_weights,
    base,
    out,
    E,
    D: tl.constexpr,
    K: tl.constexpr,
    BASED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """The sum over a token's slots, in float32, ``(T, D)``; BASED: added to `base`, ``(T, D)`` too."""
    await_previous(PDL)
    token, d = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = d < D
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    at = token.to(tl.int64) * D + d
    if BASED:
        total += tl.load(base + at, mask=here, other=0.0).to(tl.float32)
    for k in tl.static_range(K):  # unrolled, so that all slots are under way at once
        pair = token * K + k
        expert = tl.load(ids + pair)
        known = (expert >= 0) & (expert < E)
        # What weighs nothing was not computed: there is nothing to read.
        computed = known & (tl.load(router_weights + pair) != 0.0)
        part = tl.load(pairs + pair.to(tl.int64) * D + d, mask=here & computed, other=0.0)
        total += tl.where(known, part.to(tl.float32), float("nan"))
    tl.store(out + at, total.to(out.dtype.element_ty), mask=here)
