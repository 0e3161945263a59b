"""What is timed is right: outputs beside the reference, before they are timed and after a graph has run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loader.bench.problem import Problem
from loader.bench.timing import Captured
from loader.errors import BenchError
from loader.kernels.eager import eager

ACCURACY = {"fp8_block": 0.08}
"""How far ours may be from the reference, as ``|y - ref| / |ref|``: activations are E4M3 there."""
USUAL_ACCURACY = 0.02
CHECKED_TOKENS = 64
"""Rows that are compared with the reference, which takes an expert at a time."""


def accuracy(format_name: str) -> float:
    """How far ours may be off in this format."""
    return ACCURACY.get(format_name, USUAL_ACCURACY)


class Reference:
    """What the layer should give for one problem, in rows from the first to the last."""

    def __init__(self, problem: Problem) -> None:
        tokens = len(problem.x_TD)
        self.rows = (
            torch.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS), device=problem.x_TD.device).round().long()
        )
        x_RD, weights_RK, ids_RK = (
            each[self.rows] for each in (problem.x_TD, problem.topk_weights_TK, problem.topk_ids_TK)
        )
        self.expected = eager(x_RD.float(), weights_RK, ids_RK, problem.experts).double()

    def require(self, actual_TD: Tensor, allowed: float, who: str) -> float:
        """How far off it is; raises `BenchError` where that is more than is allowed, or not a number."""
        error = float((actual_TD[self.rows].double() - self.expected).norm() / self.expected.norm())
        if not error <= allowed:
            raise BenchError(f"{who} is {error:.3g} off the reference, allowed are {allowed}")
        return error


class References:
    """What a layer should give for several problems: compared with each call, and with the last of a graph."""

    def __init__(self, each: Sequence[Reference]) -> None:
        self.each = each

    def require(self, calls: Sequence[Callable[[], Tensor]], allowed: float, who: str) -> float:
        """Run each call of `who`, before they are captured; the largest error."""
        return max(one.require(call(), allowed, who) for one, call in zip(self.each, calls, strict=True))

    def require_last(self, captured: Captured, allowed: float, who: str) -> None:
        """After replays: launches overlap in a graph, and memory goes from call to call."""
        self.each[-1].require(captured.last, allowed, f"{who} in a graph")
