"""How long calls take on the device, and what the device can do at all."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)

REPLAYS = 10
"""Of each contender, at least."""
AHEAD_CYCLES = 1_000_000
"""What the device waits before a replay, half a millisecond: so long that the processor has launched it by then."""
GRAPH_MILLISECONDS = 1.0
"""What one replay should last at least, so that starting it costs nothing."""
MOST_REPEATS = 16


@dataclass(frozen=True, slots=True)
class Captured:
    """Calls in one CUDA graph."""

    replay: Callable[[], object]
    calls: Sequence[Callable[[], object]]
    """Held, for the graph reads and writes what they hold."""
    repeats: int
    """How often the graph has each of them."""
    last: Any
    """What the last of these calls gives, written by each replay."""


def capture(calls: Sequence[Callable[[], object]]) -> Captured:
    """All of `calls`, again and again for about a millisecond; raises what they raise.

    Give calls on so much memory that the cache does not hold it from one replay to the next.
    """
    for call in calls[:2]:
        call()
    once, last = _graph(calls, 1)
    repeats = max(1, min(MOST_REPEATS, math.ceil(GRAPH_MILLISECONDS / max(_elapsed(once), 1e-3))))
    if repeats > 1:
        once, last = _graph(calls, repeats)
    return Captured(once, calls, repeats, last)


def _graph(calls: Sequence[Callable[[], object]], repeats: int) -> tuple[Callable[[], object], object]:
    """Replays them, and what the last of them gives; it was replayed once."""
    torch.cuda.synchronize()
    graph, last = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                last = call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, last


def in_turns(contenders: Mapping[Key, Captured], replays: int = REPLAYS) -> dict[Key, Reading]:
    """What one call of each takes; one replay of each, then the next, in whole rounds of `_order`.

    A device's clock changes with its load, by several percent within seconds: what is compared must share it.
    """
    times: dict[Key, list[float]] = {name: [] for name in contenders}
    for turn in range(_whole_rounds(replays, len(contenders))):
        for name in _order([*contenders], turn):
            times[name].append(_elapsed(contenders[name].replay))
    return {
        name: Reading.of([each / (one.repeats * len(one.calls)) * 1e3 for each in times[name]])
        for name, one in contenders.items()
    }


@dataclass(frozen=True, slots=True)
class Reading:
    """Microseconds of one call."""

    median: float
    quartiles: tuple[float, float]

    @classmethod
    def of(cls, times: Sequence[float]) -> Reading:
        """Of two replays or more."""
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, (low, high))

    @property
    def spread(self) -> float:
        """Within which half of the replays were, as a share of the median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.median


class Beside:
    """Times one after the other, each in turns with the first, and so as if the clock had never changed."""

    def __init__(self, replays: int = 4) -> None:
        self.replays = replays
        self._first: Captured | None = None
        self._us = 0.0

    def microseconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Of one of these calls; raises what they raise."""
        captured = capture(calls)
        if self._first is None:
            self._first, self._us = captured, in_turns({0: captured}, self.replays)[0].median
            return self._us
        found = in_turns({0: self._first, 1: captured}, self.replays)
        return self._us * found[1].median / found[0].median


def _whole_rounds(replays: int, contenders: int) -> int:
    """As many turns as make the orders balanced, and `replays` at least."""
    return -(-replays // (2 * contenders)) * 2 * contenders


def _order(names: Sequence[Key], turn: int) -> Sequence[Key]:
    """Who comes when; within turns, twice as many as there are names, each comes behind each other one equally often.

    Whoever comes behind a light one finds a cooler device. Source: E. J. Williams, "Experimental designs balanced for
    the estimation of residual effects of treatments", Australian Journal of Scientific Research 2 (1949).
    """
    n = len(names)
    zigzag = [at // 2 if at % 2 == 0 else n - 1 - at // 2 for at in range(n)]  # 0, n - 1, 1, n - 2, …
    order = [names[(at + turn // 2) % n] for at in zigzag]
    return order[::-1] if turn % 2 else order


def settle() -> None:
    """Wait for the device, so that what failed there is over; nothing where there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _elapsed(call: Callable[[], object]) -> float:
    """Milliseconds by the device's clock, none of them for the launch."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(AHEAD_CYCLES)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What this device reached in this run, which is what floors are counted from."""

    copy_bytes_per_second: float
    """Read plus written, by torch's copy of 2 GiB."""
    bf16_flops: float
    """Of a product of two 8192 x 8192 matrices of random numbers."""
    fp8_flops: float
    """The same of E4M3 numbers, the faster of both ways to accumulate; twice bf16's where torch has no such product."""


def ceilings() -> Ceilings:
    """Measure them; half a second."""
    copy = _copy_milliseconds()
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    bf16 = _median(lambda: a @ b)
    try:
        q, r = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")
        fp8 = min(
            _median(partial(torch._scaled_mm, q, r, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast))
            for fast in (False, True)
        )
    except RuntimeError:
        fp8 = bf16 / 2
    return Ceilings(
        copy_bytes_per_second=2 * 2**31 / copy * 1e3,
        bf16_flops=2 * n**3 / bf16 * 1e3,
        fp8_flops=2 * n**3 / fp8 * 1e3,
    )


def _copy_milliseconds() -> float:
    data = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    other = torch.empty_like(data)
    return _median(lambda: other.copy_(data))


def _median(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    return statistics.median(_elapsed(call) for _ in range(10))


def probe(parameters: Sequence[Tensor], slots: Tensor, block: int = 8192) -> Callable[[], Tensor]:
    """A call that reads all of these slots of these parameters once, in one launch: what a pass over memory costs.

    It gives the largest word of each tile, as int32.

    `parameters`, four at most, are stacked ``(E, ...)``, with whole words of 4 bytes to a slot; `slots` are distinct,
    int64; a program reads `block` words.
    """
    from loader.bench.probe import read_slots
    from loader.kernels.triton_layer import launch

    words = [parameter.view(torch.uint8).view(len(parameter), -1).view(torch.int32) for parameter in parameters]
    sizes = [one.shape[1] for one in words] + [0] * (4 - len(words))
    words += words[:1] * (4 - len(words))  # of which nothing is read
    ends = list(itertools.accumulate(-(-size // block) for size in sizes))
    out = torch.empty(ends[-1] * len(slots), dtype=torch.int32, device=slots.device)
    ids = slots.int()

    def read() -> Tensor:
        warps = 8 if block >= 8192 else 4
        launch(read_slots, (ends[-1], len(ids)), *words, ids, out, *sizes, *ends[:-1], BLOCK=block, num_warps=warps)
        return out

    return read
