"""A kernel that does nothing but read: the floor of a memory-bound layer, in practice."""

from __future__ import annotations

import triton
import triton.language as tl

from loader.kernels.triton_device import await_previous


@triton.jit
def read_slots(a, b, c, d, slots, out, A, B, C, D, end_a, end_b, end_c, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """Read A words of int32 of each slot of `a`, and so forth; the largest of each tile keeps loads from being dropped.

    Tiles are those of `a` up to `end_a`, then of `b` up to `end_b`, of `c` up to `end_c`, and of `d`.
    """
    await_previous(PDL)
    tile, slot = tl.program_id(0), tl.load(slots + tl.program_id(1)).to(tl.int64)
    if tile < end_a:
        words = _words(a, slot, A, tile, BLOCK)
    elif tile < end_b:
        words = _words(b, slot, B, tile - end_a, BLOCK)
    elif tile < end_c:
        words = _words(c, slot, C, tile - end_b, BLOCK)
    else:
        words = _words(d, slot, D, tile - end_c, BLOCK)
    tl.store(out + tl.program_id(1) * tl.num_programs(0) + tile, tl.max(words, 0))


@triton.jit
def _words(source, slot, SIZE, tile, BLOCK: tl.constexpr):
    at = tile * BLOCK + tl.arange(0, BLOCK)
    return tl.load(source + slot * SIZE + at, mask=at < SIZE, other=0)
