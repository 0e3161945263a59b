"""Which pairs of token and slot go to which expert, sorted: what the grouped products of `triton_experts` walk along.

Shapes: T tokens, K slots of a token, P = T * K pairs (pair ``t * K + k``), E slots of the stack. The schedule is

- ``order``, int32 ``(P,)``: pairs sorted by expert, each expert's in rising order, so that results do not depend on it;
- ``blocks``, int32 ``(B, 3)``: expert, first place in `order`, and the place behind the last, at most BLOCK_M apart;
- ``n_blocks``, int32 ``(1,)``: how many of them there are, known on the device alone.

A pair that weighs nothing is not computed, nor is one whose expert does not exist; `combine` makes the latter NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_device import await_previous


@triton.jit
def _experts(ids, weights, at, P, E):
    """The expert of each pair; E for a pair that is not computed."""
    here = at < P
    expert = tl.load(ids + at, mask=here, other=-1)
    weight = tl.load(weights + at, mask=here, other=0.0)
    return tl.where((expert >= 0) & (expert < E) & (weight != 0.0), expert, E).to(tl.int32)


@triton.jit
def schedule_small(
    ids,
    weights,
    order,
    blocks,
    n_blocks,
    opened,
    P,
    E,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """The whole schedule in one program, for at most PAIRS pairs, a power of two, each compared with each other.

    `opened` is room for int32 ``(PAIRS,)``: the blocks of a pair's expert with its first pair, 0 with the others.
    """
    await_previous(PDL)
    at = tl.arange(0, PAIRS)
    expert = _experts(ids, weights, at, P, E)
    here = expert < E
    # How many stand before a pair, how many of these have its expert, and how many have it in all, in ten bits each;
    # summed up over the chunks only in the end, for a sum along an axis goes from thread to thread.
    tl.static_assert(PAIRS < 1024)
    key = expert * PAIRS + at
    counts = tl.zeros((PAIRS, CHUNK), tl.int32)
    for begin in range(0, P, CHUNK):
        other_at = begin + tl.arange(0, CHUNK)
        other = _experts(ids, weights, other_at, P, E)
        equal = expert[:, None] == other[None, :]
        is_before = (other * PAIRS + other_at)[None, :] < key[:, None]
        counts += tl.where(equal, tl.where(is_before, (1 << 20) + (1 << 10) + 1, 1 << 20), is_before.to(tl.int32))
    counts_P = tl.sum(counts, 1)
    place, rank, count = counts_P & 1023, (counts_P >> 10) & 1023, counts_P >> 20
    opens = tl.where(here & (rank == 0), (count + BLOCK_M - 1) // BLOCK_M, 0)
    tl.store(opened + at, opens)
    tl.store(n_blocks, tl.sum(opens, 0))
    # The same program's threads read below what others of them wrote above.
    tl.debug_barrier()
    blocks_before = tl.zeros((PAIRS, CHUNK), tl.int32)
    for begin in range(0, P, CHUNK):
        other_at = begin + tl.arange(0, CHUNK)
        other = _experts(ids, weights, other_at, P, E)
        theirs = tl.load(opened + other_at)
        blocks_before += tl.where(other[None, :] < expert[:, None], theirs[None, :], 0)
    block = tl.sum(blocks_before, 1) + rank // BLOCK_M
    tl.store(order + place, at, mask=here)
    opens = here & (rank % BLOCK_M == 0)
    tl.store(blocks + 3 * block, expert, mask=opens)
    tl.store(blocks + 3 * block + 1, place, mask=opens)
    # Whoever comes last in a block closes it: the next of the same expert would open another, or there is none.
    closes = here & ((rank % BLOCK_M == BLOCK_M - 1) | (rank == count - 1))
    tl.store(blocks + 3 * block + 2, place + 1, mask=closes)


@triton.jit
def sort_pairs(ids, weights, order, spans, P, E, CHUNK: tl.constexpr, PDL: tl.constexpr = False):
    """One program an expert: its pairs into their places in `order`, and ``spans`` ``(E, 2)``: first and end."""
    await_previous(PDL)
    mine = tl.program_id(0)
    before = tl.zeros((CHUNK,), dtype=tl.int32)
    for begin in range(0, P, CHUNK):
        expert = _experts(ids, weights, begin + tl.arange(0, CHUNK), P, E)
        before += (expert < mine).to(tl.int32)
    first = tl.sum(before, 0)
    place = first
    for begin in range(0, P, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        is_mine = _experts(ids, weights, at, P, E) == mine
        flag = is_mine.to(tl.int32)
        tl.store(order + place + tl.cumsum(flag, 0) - flag, at, mask=is_mine)
        place += tl.sum(flag, 0)
    tl.store(spans + 2 * mine, first)
    tl.store(spans + 2 * mine + 1, place)


@triton.jit
def cut_blocks(spans, blocks, n_blocks, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr = False):
    """One program: the spans of `sort_pairs` cut into blocks of at most BLOCK_M."""
    await_previous(PDL)
    e = tl.arange(0, EXPERTS)
    here = e < E
    first = tl.load(spans + 2 * e, mask=here, other=0)
    end = tl.load(spans + 2 * e + 1, mask=here, other=0)
    n = (end - first + BLOCK_M - 1) // BLOCK_M
    block = tl.cumsum(n, 0) - n
    tl.store(n_blocks, tl.sum(n, 0))
    for j in range(tl.max(n, 0)):
        opens = j < n
        tl.store(blocks + 3 * (block + j), e, mask=opens)
        tl.store(blocks + 3 * (block + j) + 1, first + j * BLOCK_M, mask=opens)
        tl.store(blocks + 3 * (block + j) + 2, tl.minimum(first + (j + 1) * BLOCK_M, end), mask=opens)
