"""Find configurations by timing them: how to walk the layer, the tiles of each product by itself, their registers."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from loader.bench import ours
from loader.bench.candidates import candidates, fewer_registers, some_tiles, with_tiles
from loader.bench.checks import Reference, References, accuracy
from loader.bench.compiling import compile_all
from loader.bench.problem import Problem
from loader.bench.report import first_line
from loader.bench.timing import Beside, capture, in_turns, settle
from loader.bench.turn import Left
from loader.errors import BenchError
from loader.kernels.configs import Config, Shape
from loader.kernels.triton_device import is_nvidia
from loader.kernels.triton_layer import least_pairs, multiprocessors
from loader.kernels.tuned import LUCK

log = logging.getLogger(__name__)
FINALISTS = 4
"""Configurations that are timed again at the end, in turns: of many single readings the least is too good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """What a search came to."""

    config: Config
    microseconds: float
    tried: int
    """Configurations that ran."""
    failed: int
    """Those that can't be compiled or launched (too much shared memory, most of them), or compute something else."""


def search(
    problems: Sequence[Problem],
    shape: Shape,
    *,
    most: int = 24,
    start: Sequence[Config] = (),
    seed: int = 0,
    done: Callable[[], None] = lambda: None,
    left: Left = nullcontext,
) -> Best:
    """The fastest configuration for these problems, all of one shape and one number of tokens.

    `start` is tried before all others; `most` configurations are tried in each of three rounds: skeletons, tiles of
    gate_up, tiles of down, the latter two drawn where there are more (`some_tiles`). A few with fewer registers follow.
    The first call of each is compared with the reference; `done` is called after each. The best are then timed again,
    side by side, all their calls compared, and the first of `start` with them, which stays unless beaten by `LUCK`.
    While it compiles, others may have the device (`left`). Raises `BenchError` where none runs, or none is right.
    """
    device, tokens = problems[0].x_TD.device, len(problems[0].x_TD)
    draw = random.Random(seed)
    times: dict[Config, float] = {}
    reason, timer, right = "", Beside(), References([Reference(problem) for problem in problems])
    allowed = accuracy(shape.format)

    def round_of(configs: Iterable[Config]) -> Config:
        nonlocal reason
        fresh = [config for config in dict.fromkeys(configs) if config not in times]
        if fresh:
            with left():
                compile_all([(problems[0], config) for config in fresh])
        for config in fresh:
            try:
                calls = [ours.call(problem, config) for problem in problems]
                right.each[0].require(calls[0](), allowed, "it")
                times[config] = timer.microseconds(calls)
            except torch.OutOfMemoryError:
                raise  # no fault of the setting
            except Exception as error:  # noqa: BLE001  # Triton has one for each way a kernel can be too large
                log.debug("%s does not run: %s", config, error)
                times[config], reason = math.inf, first_line(error)
                settle()
            done()
        return min(times, key=lambda config: times[config])

    best = round_of([*start, *candidates(shape, tokens, multiprocessors(device), least_pairs(device))[:most]])
    for half in ("gate_up", "down"):
        best = round_of([with_tiles(best, half, each) for each in some_tiles(shape, best, half, most, draw)])
    for half in ("gate_up", "down") if is_nvidia(device) else ():  # others' compilers take no bound
        best = round_of([with_tiles(best, half, each) for each in fewer_registers(shape, best, half)])
    if math.isinf(times[best]):
        raise BenchError(f"of {len(times)} configurations none runs for {shape} with {tokens} tokens: {reason}")
    finals: dict[Config, float] = {}
    while not finals:
        ran = sorted((config for config in times if math.isfinite(times[config])), key=lambda config: times[config])
        if not ran:
            raise BenchError(f"of {len(times)} configurations none is right for {shape} with {tokens} tokens")
        finalists = dict.fromkeys([*ran[:FINALISTS], *(config for config in start[:1] if config in ran)])
        finals = _finals(problems, right, finalists, allowed)
        times |= dict.fromkeys(finalists.keys() - finals.keys(), math.inf)
    best = min(finals, key=lambda config: finals[config])
    if start and start[0] in finals and finals[start[0]] <= finals[best] * (1 + LUCK):
        best = start[0]
    failed = sum(map(math.isinf, times.values()))
    return Best(config=best, microseconds=finals[best], tried=len(times) - failed, failed=failed)


def _finals(
    problems: Sequence[Problem], right: References, finalists: Iterable[Config], allowed: float
) -> dict[Config, float]:
    """Microseconds, side by side, of those that are right in all calls and in the last of a graph after its replays."""
    captured = {}
    for config in finalists:
        calls = [ours.call(problem, config) for problem in problems]
        if _passes(right.require, calls, allowed, str(config)):
            captured[config] = capture(calls)
    readings = in_turns(captured) if captured else {}
    return {
        config: readings[config].median
        for config in captured
        if _passes(right.require_last, captured[config], allowed, str(config))
    }


def _passes(require: Callable[..., object], *given: Any) -> bool:
    try:
        require(*given)
    except BenchError as error:
        log.warning("%s", error)
        return False
    return True
