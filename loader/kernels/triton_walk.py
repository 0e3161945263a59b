"""Which tile a program of a grouped product is at: its block of pairs, and its strip of columns.

Blocks are those of a schedule (`triton_schedule`), or without one the pairs themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

HALVED = tl.constexpr(128)
"""Pairs of a block from which on one that is half empty, as an expert's last can be, is computed half as high, save
where `down` walks."""


@triton.jit
def block_of(b, ids, order, blocks, E, PAIRWISE: tl.constexpr, M: tl.constexpr):
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
def is_half(b, blocks, HALVES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether block b has so few pairs that half of its height will do."""
    if HALVES:
        return tl.load(blocks + 3 * b + 2) - tl.load(blocks + 3 * b + 1) <= BLOCK_M // 2
    else:
        return False


@triton.jit
def place_of(tile, n, N_TILES: tl.constexpr, GROUP: tl.constexpr):
    """The block of pairs and the strip of columns of tile number `tile`, of `n` blocks and N_TILES strips."""
    if GROUP == 1:
        return tile // N_TILES, tile % N_TILES
    else:
        first = tile // (GROUP * N_TILES) * GROUP
        within = tile % (GROUP * N_TILES)
        size = tl.minimum(n - first, GROUP)
        return first + within % size, within // size
