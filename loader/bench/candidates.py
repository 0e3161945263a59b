"""Which configurations are worth timing for a shape and a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from loader.kernels.configs import BY_TOKEN, Config, Shape, Tiles, default

MOST_BY_TOKEN = 2 * BY_TOKEN
SHARED_BYTES = 227 << 10
"""Shared memory of a thread block on Hopper."""


def candidates(shape: Shape, tokens: int, multiprocessors: int) -> list[Config]:
    """The counted one first, then all others; each step of a search changes gate_up or down (`halves`)."""
    found = dict.fromkeys([default(shape, tokens, multiprocessors), *_skeletons(shape, tokens, multiprocessors)])
    return list(found)


def _skeletons(shape: Shape, tokens: int, multiprocessors: int) -> Iterator[Config]:
    """Ways to walk the layer, each with tiles to start from."""
    start = default(shape, tokens, multiprocessors)
    if tokens <= MOST_BY_TOKEN:
        few = default(shape, min(tokens, BY_TOKEN), multiprocessors)
        for splits in (1, 2, 4, 8):
            yield replace(few, splits=splits)
    many = default(shape, max(tokens, BY_TOKEN + 1), multiprocessors)
    share = tokens * shape.top_k / shape.n_slots
    for block_m in (16, 32, 64, 128):
        if block_m <= max(16, 4 * share) and block_m * 8 >= share:
            yield replace(many, block_m=block_m)
    if tokens <= 64:
        for splits in (2, 4):
            yield replace(many, block_m=16, splits=splits)
    yield start


def tiles(shape: Shape, config: Config, half: str) -> list[Tiles]:
    """Tiles for gate_up or down of a skeleton that fit shared memory."""
    packed = shape.format in ("int4_g32", "mxfp4")
    inner = shape.hidden_size // config.splits if half == "gate_up" else shape.width
    rows = 2 if half == "gate_up" else 1
    large = config.block_m >= 64
    steps = [128] if shape.format == "fp8_block" else [128, 256] if packed else [64, 128, 256]
    found = []
    for block_n in (16, 32, 64, 128, 256):
        if not 32 <= block_n * rows <= 256 or (large and block_n * rows < 64):
            continue
        for step in steps:
            if step > max(inner, 64) and step != steps[0]:
                continue
            for stages in (2, 3, 4, 5):
                for warps in (4, 8):
                    if warps == 8 and block_n * rows < 128:
                        continue
                    if _bytes(shape, config.block_m, block_n * rows, step) * stages > SHARED_BYTES:
                        continue
                    # Registers: float32 accumulators of a thread, and as much again for operands and addresses.
                    if block_n * rows * config.block_m / (32 * warps) > 128:
                        continue
                    found += [
                        Tiles(block_n=block_n, block_c=step, warps=warps, stages=stages, group=group)
                        for group in ((1, 8) if large else (1,))
                    ]
    return found


def _bytes(shape: Shape, block_m: int, rows: int, step: int) -> float:
    """Shared memory of one stage."""
    weight = {"int4_g32": 0.5, "mxfp4": 0.5, "fp8_block": 1.0, "fp32": 4.0}.get(shape.format, 2.0)
    return rows * step * weight + block_m * step * 2.0
