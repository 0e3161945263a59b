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
    starts,
    P,
    E,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The whole schedule in one program, for at most PAIRS pairs, a power of two; EXPERTS is one beyond E.

    `starts` is room for int32 ``(2, EXPERTS)``.
    """
    at = tl.arange(0, PAIRS)
    expert = _experts(ids, weights, at, P, E)
    count = tl.histogram(expert, EXPERTS)
    e = tl.arange(0, EXPERTS)
    count = tl.where(e < E, count, 0)
    n = (count + BLOCK_M - 1) // BLOCK_M
    first = tl.cumsum(count, 0) - count
    first_block = tl.cumsum(n, 0) - n
    tl.store(starts + e, first)
    tl.store(starts + EXPERTS + e, first_block)
    tl.store(n_blocks, tl.sum(n, 0))
    # The same program's threads read below what others of them wrote above.
    tl.debug_barrier()
    rank, total = tl.zeros((PAIRS,), dtype=tl.int32), tl.zeros((PAIRS,), dtype=tl.int32)
    for begin in range(0, P, CHUNK):
        other_at = begin + tl.arange(0, CHUNK)
        other = _experts(ids, weights, other_at, P, E)
        same = expert[:, None] == other[None, :]
        total += tl.sum(same.to(tl.int32), 1)
        rank += tl.sum((same & (other_at[None, :] < at[:, None])).to(tl.int32), 1)
    here = expert < E
    place = tl.load(starts + expert, mask=here, other=0) + rank
    tl.store(order + place, at, mask=here)
    block = tl.load(starts + EXPERTS + expert, mask=here, other=0) + rank // BLOCK_M
    opens = here & (rank % BLOCK_M == 0)
    tl.store(blocks + 3 * block, expert, mask=opens)
    tl.store(blocks + 3 * block + 1, place, mask=opens)
    # Whoever comes last in a block closes it: the next of the same expert would open another, or there is none.
    closes = here & ((rank % BLOCK_M == BLOCK_M - 1) | (rank == total - 1))
    tl.store(blocks + 3 * block + 2, place + 1, mask=closes)


@triton.jit
def sort_pairs(ids, weights, order, spans, P, E, CHUNK: tl.constexpr):
    """One program an expert: its pairs into their places in `order`, and ``spans`` ``(E, 2)``: first and end."""
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
def cut_blocks(spans, blocks, n_blocks, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """One program: the spans of `sort_pairs` cut into blocks of at most BLOCK_M."""
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
