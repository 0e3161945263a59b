"""Compile what is going to be timed, side by side: one after the other it takes longer than the timing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loader.bench import ours
from loader.bench.problem import Problem
from loader.kernels.configs import Config

COMPILERS = max(1, min(16, (os.cpu_count() or 1) - 2))
"""Threads that compile; ptxas is a process of its own and LLVM lets go of the interpreter's lock. Two processors are
left to whoever times something meanwhile."""


def compile_all(wanted: Sequence[tuple[Problem, Config]]) -> None:
    """Into Triton's cache, the experts of each problem; what fails here fails again, one by one, when it is called."""
    import triton

    from loader.kernels.triton_device import overlapping

    def warm_up(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        kernel.warmup(*arguments, grid=grid, **options, **overlapping(arguments[0].device))

    with (
        ThreadPoolExecutor(COMPILERS) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for problem, config in wanted:
            ours.call(problem, config, launch=warm_up)()
