"""The second grouped product of an MoE layer, and the sum over a token's slots.

Shapes: T tokens, K slots of a token, P = T * K pairs, E slots of the stack, D hidden size, F intermediate size of a
slot. Sizes of a layer are constants of its kernels, as in `triton_gate_up`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_device import await_previous, kernel
from loader.kernels.triton_product import activations, add_product, first_run, no_sum
from loader.kernels.triton_walk import HALVED, block_of, is_half, place_of


@kernel
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
    STRIPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RUN: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """``hidden @ down.T`` times the router's weight, ``(P, D)`` by pair in the dtype of `out`; `combine` sums it up.

    STRIPS above 1: a program has one block and as many strips of columns, and keeps the block's activations, of all
    steps, while tiles of weights pass by. Else WALKS: a program has neighbouring tiles and walks them in one loop of
    all their steps, for the few steps of a tile would end before the loads of the next could be under way. Otherwise a
    tile is a loop of its own, whose products overlap: nothing looks at their sum before its end.
    """
    N_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (F + BLOCK_C - 1) // BLOCK_C
    EVEN: tl.constexpr = F % BLOCK_C == 0
    HALVES: tl.constexpr = 1 if BLOCK_M >= HALVED and not PAIRWISE else 0
    await_previous(PDL)
    n = P if PAIRWISE else tl.load(n_blocks)
    if STRIPS > 1:
        PARTS: tl.constexpr = (N_TILES + STRIPS - 1) // STRIPS
        b = tl.program_id(0) // PARTS
        first = tl.program_id(0) % PARTS * STRIPS
        if b < n:
            halved = is_half(b, blocks, HALVES, BLOCK_M)
            for half in tl.static_range(HALVES + 1):
                if halved == (half == 1):
                    M: tl.constexpr = BLOCK_M >> half
                    expert, place_M, pair_M, here_M = block_of(b, ids, order, blocks, E, PAIRWISE, M)
                    place_M = place_M.to(tl.int64)
                    kept = ()
                    for step in tl.static_range(STEPS):
                        kept += (activations(hidden, hidden_scale, place_M, here_M, step, F, EVEN, FORMAT, BLOCK_C),)
                    factor_M = _factors(router_weights, pair_M, here_M)
                    for strip in range(first, tl.minimum(first + STRIPS, N_TILES)):
                        d, row_N, scale_row_N = _rows_of_down(expert, strip, D, F, FORMAT, TOKENS_LEFT, BLOCK_N, RUN)
                        accumulator = no_sum(BLOCK_N, M, TOKENS_LEFT)
                        for step in tl.static_range(STEPS):
                            accumulator = add_product(
                                accumulator,
                                kept[step],
                                weight,
                                scale,
                                row_N,
                                scale_row_N,
                                step,
                                F,
                                EVEN,
                                FORMAT,
                                ASSEMBLY,
                                TOKENS_LEFT,
                                0,
                                D,
                                RUN,
                                BLOCK_C,
                            )
                        _store_weighted(
                            accumulator, bias, row_N, factor_M, pair_M, here_M, out, d, D, BIASED, TOKENS_LEFT
                        )
    else:
        n_mine = tl.cdiv(n * N_TILES, tl.num_programs(0))
        first = tl.program_id(0) * n_mine
        last = tl.minimum(first + n_mine, n * N_TILES)
        if WALKS:
            accumulator = no_sum(BLOCK_N, BLOCK_M, TOKENS_LEFT)
            for at in range(first * STEPS, last * STEPS):
                step = at % STEPS
                b, strip = place_of(at // STEPS, n, N_TILES, GROUP)
                expert, place_M, pair_M, here_M = block_of(b, ids, order, blocks, E, PAIRWISE, BLOCK_M)
                place_M = place_M.to(tl.int64)
                d, row_N, scale_row_N = _rows_of_down(expert, strip, D, F, FORMAT, TOKENS_LEFT, BLOCK_N, RUN)
                accumulator = add_product(
                    accumulator,
                    activations(hidden, hidden_scale, place_M, here_M, step, F, EVEN, FORMAT, BLOCK_C),
                    weight,
                    scale,
                    row_N,
                    scale_row_N,
                    step,
                    F,
                    EVEN,
                    FORMAT,
                    ASSEMBLY,
                    TOKENS_LEFT,
                    0,
                    D,
                    RUN,
                    BLOCK_C,
                )
                if step == STEPS - 1:
                    factor_M = _factors(router_weights, pair_M, here_M)
                    _store_weighted(accumulator, bias, row_N, factor_M, pair_M, here_M, out, d, D, BIASED, TOKENS_LEFT)
                    accumulator = no_sum(BLOCK_N, BLOCK_M, TOKENS_LEFT)
        else:
            for tile in range(first, last):
                b, strip = place_of(tile, n, N_TILES, GROUP)
                halved = is_half(b, blocks, HALVES, BLOCK_M)
                for half in tl.static_range(HALVES + 1):
                    if halved == (half == 1):
                        M: tl.constexpr = BLOCK_M >> half
                        expert, place_M, pair_M, here_M = block_of(b, ids, order, blocks, E, PAIRWISE, M)
                        place_M = place_M.to(tl.int64)
                        d, row_N, scale_row_N = _rows_of_down(expert, strip, D, F, FORMAT, TOKENS_LEFT, BLOCK_N, RUN)
                        accumulator = no_sum(BLOCK_N, M, TOKENS_LEFT)
                        for step in range(STEPS):
                            accumulator = add_product(
                                accumulator,
                                activations(hidden, hidden_scale, place_M, here_M, step, F, EVEN, FORMAT, BLOCK_C),
                                weight,
                                scale,
                                row_N,
                                scale_row_N,
                                step,
                                F,
                                EVEN,
                                FORMAT,
                                ASSEMBLY,
                                TOKENS_LEFT,
                                0,
                                D,
                                RUN,
                                BLOCK_C,
                            )
                        factor_M = _factors(router_weights, pair_M, here_M)
                        _store_weighted(
                            accumulator, bias, row_N, factor_M, pair_M, here_M, out, d, D, BIASED, TOKENS_LEFT
                        )


@triton.jit
def _rows_of_down(
    expert,
    strip,
    D: tl.constexpr,
    F: tl.constexpr,
    FORMAT: tl.constexpr,
    TOKENS_LEFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUN: tl.constexpr,
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
    elif FORMAT == "int4_g32" or FORMAT == "mxfp4":
        return d, row_N, first_run(expert, d_N, D, F, RUN)
    else:
        return d, row_N, row_N


@triton.jit
def _factors(router_weights, pair_M, here_M):
    return tl.load(router_weights + pair_M, mask=here_M, other=0.0).to(tl.float32)


@triton.jit
def _store_weighted(
    y,
    bias,
    row_N,
    factor_M,
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
    y_MN *= factor_M[:, None]
    mask = here_M[:, None] & (d[None, :] < D)
    tl.store(out + pair_M[:, None].to(tl.int64) * D + d[None, :], y_MN.to(out.dtype.element_ty), mask=mask)


@kernel
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
