"""Which configurations are worth timing for a shape and a number of tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

from loader.kernels.configs import (
    HOPPER_SHARED_BYTES,
    LARGE,
    PACKED,
    Config,
    Shape,
    Tiles,
    accumulators,
    default,
    misfit,
    shared_bytes,
    stage_bytes,
    stage_columns,
)

MOST_BY_PAIR = 8
"""Tokens up to which few enough choose the same expert that reading it again for each may cost less than sorting."""
MOST_ACCUMULATORS = 128
"""Registers of a thread, which has as many again for operands and addresses."""

REGISTERS = (80, 96, 128, 168)
"""Of a thread: six, five, four and three thread blocks of four warps to a multiprocessor."""


def candidates(shape: Shape, tokens: int, multiprocessors: int, least: int = 8) -> list[Config]:
    """The counted one, then those without and with a schedule in turns; a search then changes both products' `tiles`.

    `least`: pairs of the smallest block (`triton_layer.least_pairs`).
    """
    counted = default(shape, tokens, multiprocessors, least=least)
    found = [c for c in dict.fromkeys(_skeletons(shape, tokens, multiprocessors)) if c.block_m >= least]
    kinds = ([c for c in found if c.by_pair is kind] for kind in (True, False))
    in_turns = (c for each in itertools.zip_longest(*kinds) for c in each if c is not None)
    return list(dict.fromkeys([counted, *in_turns]))


def _skeletons(shape: Shape, tokens: int, multiprocessors: int) -> Iterator[Config]:
    """Ways to walk the layer, each with tiles to start from."""
    if tokens <= MOST_BY_PAIR:
        for block_m in (8, 16):
            pairwise = replace(default(shape, tokens, multiprocessors, block_m=block_m), by_pair=True)
            for splits in dict.fromkeys((pairwise.splits, 1, 2, 4, 8)):
                yield replace(pairwise, splits=splits)
    share = tokens * shape.top_k / shape.n_slots
    # Few slots are counted with lower blocks than their share.
    least = min(share, 4 * default(shape, tokens, multiprocessors).block_m) / 8
    heights = [
        default(shape, tokens, multiprocessors, block_m=block_m)
        for block_m in (8, 16, 32, 64, 128)
        if least <= block_m <= max(16, 4 * share)
    ]
    yield from heights
    for one in heights:
        gate_up, down = (replace(half, tokens_left=False) for half in (one.gate_up, one.down))
        yield replace(one, gate_up=gate_up, down=down)
    if tokens <= 64:
        for block_m, splits in itertools.product((8, 16), (2, 4)):
            yield replace(default(shape, tokens, multiprocessors, block_m=block_m), splits=splits)


def tiles(shape: Shape, config: Config, half: str) -> list[Tiles]:
    """Tiles for gate_up or down of a skeleton that fit shared memory."""
    inner = shape.hidden_size // config.splits if half == "gate_up" else shape.width
    rows = 2 if half == "gate_up" else 1
    large = config.block_m >= LARGE
    steps = [128] if shape.format == "fp8_block" else [128, 256, 512] if shape.format in PACKED else [64, 128, 256]
    found = []
    for block_n in (16, 32, 64, 128, 256):
        if not 32 <= block_n * rows <= 256 or (large and block_n * rows < 64):
            continue
        for step in steps:
            if step > max(inner, 64) and step != steps[0]:
                continue
            for stages, warps in itertools.product((2, 3, 4, 5), (4, 8)):
                one = Tiles(block_n=block_n, block_c=step, warps=warps, stages=stages)
                if accumulators(shape, config.block_m, rows, one) <= MOST_ACCUMULATORS:
                    found += [each for each in _ways(shape, config, half, one) if _fits(shape, config, half, each)]
    return found


def _ways(shape: Shape, config: Config, half: str, one: Tiles) -> Iterator[Tiles]:
    """The same tiles walked in each order, by each side, and of down with activations kept."""
    packed, large = shape.format in PACKED, config.block_m >= LARGE
    lefts = (False, True) if large and not packed else (False,)
    if half == "gate_up":
        programs = (0, 2) if large and not packed else (0,)
    else:  # what is large would wait for each step of a walk
        programs = (0,) if large else (0, 4)
    for group, left, count in itertools.product((1, 8) if large else (1,), lefts, programs):
        yield replace(one, group=group, tokens_left=left, programs=count)
    if half == "down":
        strips = -(-shape.hidden_size // one.block_n)
        for each in dict.fromkeys([config.down.strips, *(-(-strips // parts) for parts in (2, 4, 8, 16))]):
            yield from (replace(one, tokens_left=left, strips=each) for left in lefts if each > 1)


def _fits(shape: Shape, config: Config, half: str, one: Tiles) -> bool:
    """Whether a kernel can have these tiles, and eight warps enough rows of an operand."""
    rows = 2 if half == "gate_up" else 1
    filled = max(one.block_n * rows, config.block_m if one.tokens_left else 0)
    return (
        (one.warps == 4 or filled >= 128)
        and shared_bytes(shape, config.block_m, rows, one) <= HOPPER_SHARED_BYTES
        and not misfit(with_tiles(config, half, one), shape)
    )


def fewer_registers(shape: Shape, config: Config, half: str) -> list[Tiles]:
    """The tiles of a half again, of which more thread blocks fit a multiprocessor.

    What is unpacked waits for its own instructions, and so for others to have some between; there registers are short.
    """
    if shape.format not in PACKED or config.block_m >= LARGE:
        return []
    return [replace(getattr(config, half), registers=count) for count in REGISTERS]


def with_tiles(config: Config, half: str, cut: Tiles) -> Config:
    """This configuration with other tiles of ``gate_up`` or ``down``."""
    return replace(config, gate_up=cut) if half == "gate_up" else replace(config, down=cut)


def some_tiles(shape: Shape, config: Config, half: str, most: int, draw: random.Random) -> list[Tiles]:
    """At most so many of `tiles`, drawn; of large blocks half of them among those that move the fewest bytes."""
    found = tiles(shape, config, half)
    found = draw.sample(found, len(found))
    if config.block_m < LARGE:
        return found[:most]
    rows = 2 if half == "gate_up" else 1

    def bytes_moved(one: Tiles) -> float:
        return stage_bytes(shape, config.block_m, rows, one) / (one.block_n * stage_columns(shape, one))

    fewest = sorted(found, key=bytes_moved)[: most // 2]
    return list(dict.fromkeys([*fewest, *found]))[:most]
