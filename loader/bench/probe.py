"""A kernel that does nothing but read: the floor of a memory-bound layer, in practice."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_slots(first, second, slots, out, FIRST, SECOND, tiles, BLOCK: tl.constexpr):
    """Read FIRST and SECOND int32 words of each slot; the largest of each tile keeps the loads from being dropped."""
    tile, slot = tl.program_id(0), tl.load(slots + tl.program_id(1)).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if tile < tiles:
        at += tile * BLOCK
        words = tl.load(first + slot * FIRST + at, mask=at < FIRST, other=0)
    else:
        at += (tile - tiles) * BLOCK
        words = tl.load(second + slot * SECOND + at, mask=at < SECOND, other=0)
    tl.store(out + tl.program_id(1) * tl.num_programs(0) + tile, tl.max(words, 0))
