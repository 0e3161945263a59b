"""Our kernels as the bench calls them: the fused layout, with its router, and with the shared slots on their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from loader.bench.problem import Problem
from loader.errors import BenchError
from loader.kernels.configs import Config
from loader.kernels.triton_backend import apart
from loader.kernels.triton_layer import Launch, TritonExperts, launch
from loader.kernels.triton_router import TritonRouter
from loader.kernels.tuned import Table


def call(problem: Problem, config: Config, *, launch: Launch = launch) -> Callable[[], Tensor]:
    """All slots as one stack."""
    experts = TritonExperts(problem.experts, launch=launch)
    return lambda: experts(problem.x_TD, problem.topk_weights_TK, problem.topk_ids_TK, config=config)


def rerouted(problem: Problem) -> Problem:
    """The problem itself, or, where our router sends some token elsewhere than the reference does, as ours has it.

    A score that two sums make equal to another's may fall to either side, so that one token in a hundred may differ;
    raises `BenchError` where more do.
    """
    weights_TK, ids_TK = _router(problem)(problem.x_TD)
    differs_T = (ids_TK.sort(-1).values != problem.topk_ids_TK.sort(-1).values).any(-1)
    if (count := int(differs_T.sum())) > 1 + len(differs_T) // 100:
        raise BenchError(f"our router sends {count} of {len(differs_T)} tokens elsewhere than the reference")
    return replace(problem, topk_weights_TK=weights_TK, topk_ids_TK=ids_TK) if count else problem


def _router(problem: Problem) -> TritonRouter:
    return TritonRouter(problem.router, problem.model.n_shared)


def layer_call(problem: Problem, config: Config) -> Callable[[], Tensor]:
    """All slots as one stack, after the router that chooses them."""
    experts, router = TritonExperts(problem.experts), _router(problem)
    return lambda: experts(problem.x_TD, *router(problem.x_TD), config=config)


def apart_call(problem: Problem, table: Table | None) -> Callable[[], Tensor]:
    """The shared slots before the others, as a layer computes them from `dense_shared_from` tokens on."""
    experts, n_shared = TritonExperts(problem.experts), problem.model.n_shared
    return lambda: apart(experts, problem.x_TD, problem.topk_weights_TK, problem.topk_ids_TK, n_shared, table)
