"""Which pairs of token and slot go to which expert, sorted: what the grouped products walk along (`triton_walk`).

Shapes: T tokens, K slots of a token, P = T * K pairs (pair ``t * K + k``), E slots of the stack. The schedule is

- ``order``, int32 ``(P,)``: pairs sorted by expert, each expert's in rising order, so that results do not depend on it;
- ``blocks``, int32 ``(B, 3)``: expert, first place in `order`, and the place behind the last, at most BLOCK_M apart;
- ``n_blocks``, int32 ``(1,)``: how many of them there are, known on the device alone.

A pair that weighs nothing is not computed, nor is one whose expert does not exist; `combine` makes the latter NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_device import await_previous, kernel


@triton.jit
def _experts(ids, weights, at, P, E):
    """The expert of each pair; E for a pair that is not computed."""
    here = at < P
    expert = tl.load(ids + at, mask=here, other=-1)
    weight = tl.load(weights + at, mask=here, other=0.0)
    return tl.where((expert >= 0) & (expert < E) & (weight != 0.0), expert, E).to(tl.int32)


@kernel
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
    first_block = tl.sum(blocks_before, 1)
    _note(order, blocks, at, expert, place, rank, count, first_block, here, BLOCK_M)


@triton.jit
def _note(order, blocks, at, expert, place, rank, count, first_block, here, BLOCK_M: tl.constexpr):
    """Pairs `at` into their places, and what each says of its block: `rank` of `count` pairs of `expert` it is."""
    tl.store(order + place, at, mask=here)
    block = first_block + rank // BLOCK_M
    opens = here & (rank % BLOCK_M == 0)
    tl.store(blocks + 3 * block, expert, mask=opens)
    tl.store(blocks + 3 * block + 1, place, mask=opens)
    # Whoever comes last in a block closes it: the next of the same expert would open another, or there is none.
    closes = here & ((rank % BLOCK_M == BLOCK_M - 1) | (rank == count - 1))
    tl.store(blocks + 3 * block + 2, place + 1, mask=closes)


@kernel
def count_pairs(ids, weights, counts, P, E, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr = False):
    """One program a chunk: how many of its pairs each expert has, int32 ``(chunks, EXPERTS)``.

    EXPERTS is a power of two beyond E; number E counts pairs that are not computed.
    """
    await_previous(PDL)
    chunk = tl.program_id(0)
    expert = _experts(ids, weights, chunk * CHUNK + tl.arange(0, CHUNK), P, E)
    tl.store(counts + chunk * EXPERTS + tl.arange(0, EXPERTS), tl.histogram(expert, EXPERTS))


@kernel
def sum_counts(
    counts, CHUNKS, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr = False
):
    """What `count_pairs` counted, in place: how many pairs an expert has in the chunks before; in row CHUNKS, in all.

    A program has COLUMNS of the EXPERTS and reads ROWS chunks at a time.
    """
    await_previous(PDL)
    e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total_E = tl.zeros((COLUMNS,), tl.int32)
    for begin in range(0, CHUNKS, ROWS):
        c = begin + tl.arange(0, ROWS)
        at = counts + c[:, None] * EXPERTS + e[None, :]
        count = tl.load(at, mask=c[:, None] < CHUNKS, other=0)
        tl.store(at, total_E[None, :] + tl.cumsum(count, 0) - count, mask=c[:, None] < CHUNKS)
        total_E += tl.sum(count, 0)
    tl.store(counts + CHUNKS * EXPERTS + e, total_E)


@kernel
def sort_pairs(
    ids,
    weights,
    counts,
    order,
    blocks,
    n_blocks,
    P,
    E,
    CHUNKS,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """The whole schedule from what `sum_counts` left, one program a chunk.

    COLUMNS pairs of the chunk at a time are compared with all of it.
    """
    await_previous(PDL)
    chunk = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    before_E = tl.load(counts + chunk * EXPERTS + e, mask=e < E, other=0)
    count_E = tl.load(counts + CHUNKS * EXPERTS + e, mask=e < E, other=0)
    blocks_E = (count_E + BLOCK_M - 1) // BLOCK_M
    if chunk == 0:
        tl.store(n_blocks, tl.sum(blocks_E, 0))
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _experts(ids, weights, at, P, E)
    equal = tl.zeros((CHUNK, COLUMNS), tl.int32)
    for begin in range(0, CHUNK, COLUMNS):
        other_at = chunk * CHUNK + begin + tl.arange(0, COLUMNS)
        other = _experts(ids, weights, other_at, P, E)
        equal += ((expert[:, None] == other[None, :]) & (other_at[None, :] < at[:, None])).to(tl.int32)
    rank = tl.gather(before_E, expert, 0) + tl.sum(equal, 1)
    place = tl.gather(tl.cumsum(count_E, 0) - count_E, expert, 0) + rank
    first_block = tl.gather(tl.cumsum(blocks_E, 0) - blocks_E, expert, 0)
    _note(order, blocks, at, expert, place, rank, tl.gather(count_E, expert, 0), first_block, expert < E, BLOCK_M)
