"""How the Triton kernels cut their work up: a table of what was measured, and a model where nothing was.

Shapes: T tokens, K slots of a token, E slots of the stack, D hidden size, F intermediate size of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a layer runs for some number of tokens."""

    block_m: int
    """Pairs of token and slot in a tile."""
    gate_up: Tiles
    down: Tiles
    splits: int = 1
    """Programs that share one tile's inner axis in gate_up; `down` sums their parts up."""
    by_token: bool = False
    """No schedule: pair by pair in gate_up, token by token in down, which sums up as well."""
    programs: int = 0
    """Programs to a multiprocessor that walk along the tiles; 0: a program a tile."""

    @property
    def needs_schedule(self) -> bool:
        """Whether pairs are sorted by expert."""
        return not self.by_token


BY_TOKEN = 4
"""Tokens up to which few enough choose the same expert that reading it again for each costs less than sorting."""


def default(shape: Shape, tokens: int, multiprocessors: int) -> Config:
    """A configuration from counting: tiles enough to fill the device, and steps of a few KB to a thread block.

    A memory-bound layer wants every multiprocessor to have loads under way from the first to the last microsecond, so
    that a product with few tiles is split along its inner axis; a compute-bound one wants tiles as large as registers
    allow, which are as high as an expert's share of the tokens.
    """
    pairs = tokens * shape.top_k
    share = pairs / min(shape.n_slots, max(pairs, 1)) if pairs else 1
    packed = shape.format in ("int4_g32", "mxfp4")
    step = 256 if packed else 128
    down_step = min(step, _power_of_two(shape.width, 128))
    if tokens <= BY_TOKEN:
        block_n = 32
        tiles = max(pairs, 1) * -(-shape.width // block_n)
        most = max(1, shape.hidden_size // (4 * step))
        splits = min(_power_of_two(-(-3 * multiprocessors // tiles), 1), most, 8)
        return Config(
            block_m=16,
            gate_up=Tiles(block_n=block_n, block_c=step, warps=4, stages=4),
            down=Tiles(block_n=64, block_c=down_step, warps=4, stages=3),
            splits=splits,
            by_token=True,
        )
    block_m = min(max(_power_of_two(share, 16), 16), 128)
    large = block_m >= 64
    return Config(
        block_m=block_m,
        gate_up=Tiles(
            block_n=64 if large else 32,
            block_c=128 if packed or shape.format == "fp8_block" else (64 if large else 128),
            warps=8 if large else 4,
            stages=3 if large else 4,
            group=8 if large else 1,
        ),
        down=Tiles(
            block_n=128 if large else 64,
            block_c=128 if packed or shape.format == "fp8_block" else (64 if large else down_step),
            warps=8 if large else 4,
            stages=3 if large else 4,
            group=8 if large else 1,
        ),
    )


def _power_of_two(number: float, least: int) -> int:
    """The least power of two, times `least`, that is not below `number`."""
    size = least
    while size < number:
        size *= 2
    return size
