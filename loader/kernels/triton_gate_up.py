"""The first grouped product of an MoE layer, with its gate.

Shapes: P pairs of token and slot, E slots of the stack, K slots of a token, D hidden size, F intermediate size of a
slot. Sizes of a layer are constants of its kernels, so that what they divide, and how its rows are aligned, is known
when they are compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_device import await_previous, kernel
from loader.kernels.triton_prepare import gated
from loader.kernels.triton_product import HALF_RUN, activations, add_product, first_run, no_sum
from loader.kernels.triton_walk import HALVED, block_of, is_half, place_of


@triton.jit
def _column(i, BLOCK_N: tl.constexpr, STREAMED: tl.constexpr):
    """The column of the intermediate that number i of a tile is: in order, or one stream of a tile after the other."""
    if STREAMED:
        return i % (BLOCK_N // 4) * 4 + i // (BLOCK_N // 4)
    else:
        return i


@triton.jit
def _place(begin_n, i, BLOCK_N: tl.constexpr, F: tl.constexpr, STREAMED: tl.constexpr):
    """Where number i of a tile goes in a row of `out`, said so that the compiler sees what lies side by side."""
    begin_n = tl.multiple_of(begin_n, BLOCK_N)
    if STREAMED:
        return i // (BLOCK_N // 4) * (F // 4) + begin_n // 4 + i % (BLOCK_N // 4)
    else:
        return begin_n + i


@kernel
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
    RUN: tl.constexpr,
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
        b, strip_n = place_of(tile // SPLITS, n, N_TILES, GROUP)
        halved = is_half(b, blocks, HALVES, BLOCK_M)
        for half in tl.static_range(HALVES + 1):
            if halved == (half == 1):
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
                    RUN,
                )


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
    RUN: tl.constexpr,
):
    """Of block b the columns from `begin_n` on, or the part of them that is `split`."""
    STREAMED: tl.constexpr = (FORMAT == "int4_g32" or FORMAT == "mxfp4") and SPLITS == 1
    STEPS: tl.constexpr = ((D + BLOCK_C - 1) // BLOCK_C + SPLITS - 1) // SPLITS
    EVEN: tl.constexpr = D % (BLOCK_C * SPLITS) == 0
    expert, place_M, pair_M, here_M = block_of(b, ids, order, blocks, E, PAIRWISE, BLOCK_M)
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
    elif FORMAT == "int4_g32" or FORMAT == "mxfp4":
        scale_row_N = first_run(expert, half_N * F + f_N, 2 * F, D, RUN)
    token_M = (pair_M // K).to(tl.int64)
    accumulator = no_sum(2 * BLOCK_N, BLOCK_M, TOKENS_LEFT)
    for step in range(split * STEPS, (split + 1) * STEPS):
        accumulator = add_product(
            accumulator,
            activations(x, x_scale, token_M, here_M, step, D, EVEN, FORMAT, BLOCK_C),
            weight,
            scale,
            row_N,
            scale_row_N,
            step,
            D,
            EVEN,
            FORMAT,
            ASSEMBLY,
            TOKENS_LEFT,
            UP,
            2 * F,
            RUN,
            BLOCK_C,
        )
    if BIASED:
        b_N = tl.load(bias + row_N).to(tl.float32)
        b_N = b_N if SPLITS == 1 else tl.where(split == 0, b_N, 0.0)
        accumulator += b_N[None, :] if TOKENS_LEFT else b_N[:, None]
    gate_MN, up_MN = _gate_and_up(accumulator, BLOCK_N, BLOCK_M, TOKENS_LEFT)
    i = tl.arange(0, BLOCK_N)
    mask = here_M[:, None]
    if F % BLOCK_N != 0:
        mask &= (begin_n + _column(i, BLOCK_N, STREAMED) < F)[None, :]
    place = _place(begin_n, i, BLOCK_N, F, STREAMED)
    if SPLITS == 1:
        h_MN = gated(gate_MN, up_MN, LIMIT, ALPHA, UP_OFFSET)
        tl.store(out + place_M[:, None].to(tl.int64) * F + place[None, :], h_MN.to(out.dtype.element_ty), mask=mask)
    else:
        at = out + (tl.cast(P, tl.int64) * split + place_M[:, None]) * (2 * F) + place[None, :]
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
