"""How the Triton kernels cut their work up: a table of what was measured, and a model where nothing was.

Shapes: T tokens, K slots of a token, E slots of the stack, D hidden size, F intermediate size of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a configuration depends on besides the device and the number of tokens."""

    format: str
    """``int4_g32``"""
    n_slots: int
    """Slots of the stack, the fused shared ones too: 385."""
    hidden_size: int
    """7168"""
    width: int
    """Intermediate size of a slot on this rank: 256."""
    top_k: int
    """Slots of a token, the fused shared ones too: 9."""

    def routed(self, n_shared: int) -> Shape:
        """The routed slots of this stack alone."""
        return replace(self, n_slots=self.n_slots - n_shared, top_k=self.top_k - n_shared)

    def shared(self, n_shared: int) -> Shape:
        """Its shared slots alone, to all of which each token goes."""
        return replace(self, n_slots=n_shared, top_k=n_shared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How one grouped product is cut up."""

    block_n: int
    """Columns of the intermediate (gate and up of each) or rows of down in a tile."""
    block_c: int
    """Columns of the product's inner axis in a step."""
    warps: int
    stages: int
    """Steps whose loads are under way at the same time."""
    group: int = 1
    """Blocks of tokens that share a strip of weight tiles."""
    programs: int = 0
    """Programs to a multiprocessor that walk along the tiles; 0: a program a tile."""
    tokens_left: bool = False
    """Whether tokens are the left operand, for blocks of 64 and more; never for packed formats."""
    strips: int = 1
    """Strips of columns that a program of down computes of its block, whose activations it keeps if these are several;
    then a program has no other tiles, and `programs` is 0."""
    registers: int = 0
    """What a thread may have at most, so that more thread blocks fit a multiprocessor; 0: what the compiler takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a layer runs for some number of tokens."""

    block_m: int
    """Pairs of token and slot in a tile."""
    gate_up: Tiles
    down: Tiles
    splits: int = 1
    """Programs that share one tile's inner axis in gate_up; their parts are summed up before `down`."""
    by_pair: bool = False
    """No schedule: a pair is a block, and an expert is read again for each token that chose it."""


PACKED = frozenset({"int4_g32", "mxfp4"})
"""Formats of four numbers to two bytes."""
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "bf16": "plain",
        "fp16": "plain",
        "fp32": "plain",
        "fp8_block": "fp8_block",
        **{name: name for name in sorted(PACKED)},
    }
)
"""What the kernels compute in, by the format of the checkpoint: all that they have."""
ON_TRITON = frozenset({"triton", "triton_untuned"})
"""Backends of these kernels, with the router and the order of scales too; the first has the device's table."""
LARGE = 64
"""Pairs of a block from which on products wait for their operands to come from the cache, and no longer from memory."""
MOST_KEPT = 512
"""Columns of the intermediate up to which `down` keeps them all; more were not tried."""
LEAST_STRIPS = 4
"""Strips of a program from which on keeping its activations is counted to pay, if there are several tokens."""
HOPPER_SHARED_BYTES = 227 << 10
"""Shared memory that one thread block may have, compute capability 9.0."""


def default(
    shape: Shape,
    tokens: int,
    multiprocessors: int,
    limit: int = HOPPER_SHARED_BYTES,
    *,
    block_m: int | None = None,
    least: int = 8,
    x_bytes: int = 2,
) -> Config:
    """A configuration from counting: tiles enough to fill the device, and steps of a few KB to a thread block.

    A memory-bound layer wants every multiprocessor to have loads under way from the first to the last microsecond, so
    that a product with few tiles is split along its inner axis; a compute-bound one wants tiles as large as registers
    allow, which are as high as an expert's share of the tokens. Where counting left a choice, what a first search on an
    H200 liked better (benchmarks/README.md). `limit` are what one thread block may have; `block_m` is counted
    where it is not given, and else what the tiles are cut for; `least` is that of the device's smallest product of bf16
    (8 with NVIDIA's ``mma.sync``). `x_bytes` are those of an activation, 4 for float32.
    """
    alone = block_m is None and tokens <= 1  # no two tokens share an expert
    pairs = max(tokens * shape.top_k, 1)
    block_m = block_m or _block_m(shape, pairs, multiprocessors, least, x_bytes)
    blocks = max(min(shape.n_slots, pairs), pairs // block_m)
    wide = x_bytes > 2
    gate_up = _tiles(shape, block_m, rows=2, wide=wide)
    down = _keeping(shape, block_m, blocks, multiprocessors)
    room = limit if not wide and shape.width <= MOST_KEPT else 0
    # With few strips to a program walks are better, but for one token, which has too few tiles for them.
    is_short = down.strips < LEAST_STRIPS and not alone
    if is_short or shared_bytes(shape, block_m, 1, replace(down, stages=2), x_bytes) > room:
        down = _tiles(shape, block_m, rows=1, wide=wide)
        broad = replace(down, block_n=256, stages=4, group=1)
        fits = shared_bytes(shape, block_m, 1, broad, x_bytes) <= limit and not wide
        if KINDS[shape.format] == "plain" and block_m > LARGE and shape.width > MOST_KEPT and fits:
            down = broad  # so that activations are read half as often
    if block_m >= LARGE and blocks * shape.width < multiprocessors * gate_up.block_n:
        gate_up = replace(gate_up, block_n=gate_up.block_n // 2)
    tiles = blocks * -(-shape.width // gate_up.block_n)
    steps = -(-shape.hidden_size // gate_up.block_c)
    # Where activations are prepared anyway, summing up the parts costs no launch.
    wanted = (1.5 if KINDS[shape.format] == "plain" else 2.25) * multiprocessors / tiles if block_m < LARGE else 1
    config = Config(
        block_m=block_m,
        gate_up=gate_up,
        down=down,
        # At most 8 parts, all of as many steps, and of four at least.
        splits=max(n for n in range(1, min(power_of_two(wanted), max(1, steps // 4), 8) + 1) if steps % n == 0),
        by_pair=alone,
    )
    return fitting(config, shape, limit, x_bytes)


def _block_m(shape: Shape, pairs: int, multiprocessors: int, least: int, x_bytes: int) -> int:
    share = pairs / min(shape.n_slots, pairs)
    # What is unpacked takes long enough for `mma.sync` to keep up, and shared memory to be short: half as high is read
    # half as often.
    least = least if shape.format in PACKED and x_bytes <= 2 else 16
    # With float32, operands of FP8 are widened in shared memory, and unpacked ones go through it: no room for more.
    heights = {"plain": (128, 128), "fp8_block": (64, 32)}.get(KINDS[shape.format], (128, 32))
    most = heights[x_bytes > 2]
    # Few slots, as a shared expert alone, have few tiles unless these are low; to unpack numbers again costs more.
    low = 32 if shape.format in PACKED else least
    for_all = pairs * (shape.width / 64) / (1.5 * multiprocessors)
    return min(power_of_two(share, least), most, power_of_two(for_all + 1, low))


def accumulators(shape: Shape, block_m: int, rows: int, tiles: Tiles) -> float:
    """Registers of a thread, which has at most 255, for sums in float32: with FP8 those of a step are not yet scaled
    and stand beside those of the tile.
    """
    sums = 2 if shape.format == "fp8_block" else 1
    return sums * tiles.block_n * rows * block_m / (32 * tiles.warps)


def stage_columns(shape: Shape, tiles: Tiles) -> int:
    """Columns of the inner axis in a stage: those of a step, or of all steps where activations are kept."""
    return -(-shape.width // tiles.block_c) * tiles.block_c if tiles.strips > 1 else tiles.block_c


def stage_bytes(shape: Shape, block_m: int, rows: int, tiles: Tiles, x_bytes: int = 2) -> float:
    """Shared memory of one stage: a tile of weights, `rows` to each of its columns, and one of activations that are not
    kept.
    """
    weight = {"int4_g32": 0.5625, "mxfp4": 0.5313, "fp8_block": 1.0, "fp32": 4.0}.get(shape.format, 2.0)
    activations = 0 if tiles.strips > 1 else block_m * x_bytes
    return (tiles.block_n * rows * weight + activations) * stage_columns(shape, tiles)


def shared_bytes(shape: Shape, block_m: int, rows: int, tiles: Tiles, x_bytes: int = 2) -> float:
    """Shared memory of a thread block: its stages, and where it keeps activations these and a tile of the output."""
    kept = block_m * x_bytes * (stage_columns(shape, tiles) + tiles.block_n) if tiles.strips > 1 else 0
    return kept + tiles.stages * stage_bytes(shape, block_m, rows, tiles, x_bytes)


def misfit(config: Config, shape: Shape) -> str | None:
    """Why no kernel for this shape has such a configuration; None where one has."""
    if config.gate_up.strips > 1:
        return "gate_up keeps no activations, so its strips must be 1"
    if config.down.strips > 1:
        ways = {"programs": config.down.programs, "group": config.down.group > 1}
        if others := [name for name, given in ways.items() if given]:
            return f"a program of down keeps one block's activations or walks; with {others[0]} its strips must be 1"
        if shape.width > MOST_KEPT:
            return f"down keeps at most {MOST_KEPT} columns of the intermediate, not {shape.width}; strips must be 1"
    for half in ("gate_up", "down"):
        tiles: Tiles = getattr(config, half)
        if tiles.tokens_left and shape.format in PACKED:
            return f"{shape.format} is unpacked into the left operand, so tokens_left of {half} must be false"
        if tiles.tokens_left and shape.format == "fp8_block" and tiles.block_n > 128:
            return f"with tokens_left a tile of {half} has one scale, so block_n is 128 at most, not {tiles.block_n}"
        if shape.format == "fp8_block" and tiles.block_c != 128:
            return f"a step of fp8_block is one block, so block_c of {half} is 128, not {tiles.block_c}"
        if shape.format in PACKED and tiles.block_c < 64:
            return f"a step of {shape.format} is four streams of 16 columns, so block_c of {half} is 64 at least"
    return None


def fitting(config: Config, shape: Shape, limit: int, x_bytes: int = 2) -> Config:
    """This configuration with as many of its stages as there is room for: `limit` bytes of a thread block."""

    def fit(tiles: Tiles, rows: int) -> Tiles:
        fewer = (replace(tiles, stages=stages) for stages in range(tiles.stages, 1, -1))
        fits = (each for each in fewer if shared_bytes(shape, config.block_m, rows, each, x_bytes) <= limit)
        return next(fits, replace(tiles, stages=1))

    return replace(config, gate_up=fit(config.gate_up, 2), down=fit(config.down, 1))


def _tiles(shape: Shape, block_m: int, *, rows: int, wide: bool) -> Tiles:
    """Of gate_up, which has two `rows` of weights to a column of the intermediate, or of down; `wide`: x is float32."""
    inner = shape.hidden_size if rows == 2 else shape.width
    walks = 0 if rows == 2 else 4  # few steps make a tile of down, so that programs walk along several
    if shape.format == "fp8_block" and block_m >= LARGE:
        warps = block_m // 16
        return Tiles(block_n=128 // rows, block_c=128, warps=warps, stages=4, group=8, tokens_left=True)
    if shape.format == "fp8_block":
        broad = block_m == 32 and rows == 1
        return Tiles(block_n=256 if broad else 128 // rows, block_c=128, warps=4, stages=4 - broad, programs=walks)
    if shape.format in PACKED and wide:  # what is unpacked goes through shared memory too
        return Tiles(block_n=64 // rows, block_c=128, warps=4, stages=2)
    if shape.format in PACKED and block_m >= LARGE:
        # Of int4's `down` two stages leave shared memory for a second thread block, which unpacks while one multiplies.
        stages = 2 if rows == 1 and shape.format == "int4_g32" else 3
        return Tiles(block_n=128, block_c=128, warps=4 * rows, stages=stages, group=8)
    if shape.format in PACKED:
        block_n, stages = (128, 5) if rows == 1 else (32 if block_m <= 16 else 64, 3)
        return Tiles(block_n=block_n, block_c=256 if inner >= 256 else 128, warps=4, stages=stages, programs=walks)
    if block_m >= LARGE:
        return Tiles(block_n=128, block_c=64, warps=8, stages=3, group=8, tokens_left=True)
    if shape.format == "fp32":  # tiles twice as wide in memory
        return Tiles(block_n=64 // rows, block_c=64, warps=4, stages=3)
    return (
        Tiles(block_n=32, block_c=128, warps=4, stages=4)
        if rows == 2
        else Tiles(block_n=128, block_c=64, warps=4, stages=3)
    )


def _keeping(shape: Shape, block_m: int, blocks: int, multiprocessors: int) -> Tiles:
    """Of down, in programs that keep their block's activations: eight to a block, more where `blocks` are few, so that
    one strip may be left to each.
    """
    block_n = 128 if shape.format in PACKED and block_m <= 16 else 64
    parts = power_of_two(4 * multiprocessors / blocks, 8)
    plain = KINDS[shape.format] == "plain"
    return Tiles(
        block_n=block_n,
        block_c=128 if shape.format == "fp8_block" or shape.width < 256 else 256,
        warps=8 if plain and block_m > LARGE else 4,
        stages=4 if plain and block_m >= LARGE else 3,
        tokens_left=shape.format not in PACKED and block_m >= LARGE,
        strips=-(-shape.hidden_size // (block_n * parts)),
    )


def power_of_two(number: float, least: int = 1) -> int:
    """The least power of two, times `least`, that is not below `number`."""
    size = least
    while size < number:
        size *= 2
    return size
