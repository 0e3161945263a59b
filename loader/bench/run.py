"""Time one layer over numbers of tokens: the floor, ours, and peers; all of them checked before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loader.bench import ours
from loader.bench.peers import Peer, Unavailable
from loader.bench.problem import Model, Problem, problems, random_experts
from loader.bench.timing import Ceilings, microseconds, probe
from loader.kernels.configs import Shape, default
from loader.kernels.eager import eager
from loader.kernels.triton_backend import dense_shape, routed_shape
from loader.kernels.triton_layer import multiprocessors
from loader.kernels.tuned import Table
from loader.moe import Experts

ACCURACY = {"fp8_block": 0.08}
"""How far ours may be from the reference, as ``|y - ref| / |ref|``: activations are E4M3 there."""
USUAL_ACCURACY = 0.02
CHECKED_TOKENS = 64
"""Rows that are compared with the reference, which takes an expert at a time."""
TOUCHED_BYTES = 512 << 20
"""What the calls of one graph read together at least: ten times the cache of the largest device."""
MOST_LAYER_BYTES = 24 << 30


@dataclass(slots=True, kw_only=True)
class Point:
    """One shape, format and number of tokens."""

    shape: str
    tp: int
    format: str
    tokens: int
    floor_us: float
    """The larger of one pass over the touched weights and the arithmetic at the measured rate."""
    memory_us: float
    arithmetic_us: float
    ours_us: float
    """Fused layout, experts only."""
    ours_apart_us: float | None
    """Routed slots, with the shared ones computed before them; None without shared ones."""
    error: float
    """Of ours from the reference."""
    config: dict[str, Any]
    measured: bool
    """Whether the configuration is of a table; else it was counted."""
    peers: dict[str, float] = field(default_factory=dict)
    """Microseconds by name."""
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that did not run, and why."""

    @property
    def ours_over_floor(self) -> float:
        """Of the faster of the two ways."""
        return self.best_us / self.floor_us

    @property
    def best_us(self) -> float:
        """Of the faster of the two ways, which a layer takes by its number of tokens."""
        return min(self.ours_us, self.ours_apart_us or self.ours_us)

    def as_json(self) -> dict[str, Any]:
        """Flat, with each peer's time under its own name."""
        fields = ("shape", "tp", "format", "tokens", "ours_us", "floor_us", "ours_over_floor", "ours_apart_us", "error")
        answer = {name: _rounded(getattr(self, name)) for name in fields}
        answer |= {"memory_us": _rounded(self.memory_us), "arithmetic_us": _rounded(self.arithmetic_us)}
        answer |= {f"{name}_us": _rounded(value) for name, value in self.peers.items()}
        return answer | {"absent": self.absent, "config": self.config, "measured": self.measured}


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def layers_of(model: Model, device: str, seed: int) -> list[Experts]:
    """Several layers' weights, for the cache must not hold them from call to call."""
    first = random_experts(model, device, seed)
    nbytes = sum(parameter.nbytes for parameter in first.parameters())
    count = max(2, min(8, MOST_LAYER_BYTES // nbytes))
    return [first, *(random_experts(model, device, seed + n) for n in range(1, count))]


def problems_of(model: Model, layers: Sequence[Experts], tokens: int, seed: int) -> list[Problem]:
    """Enough different calls that together they read far more than the cache holds."""
    found = problems(model, layers, tokens, seed)
    touched = sum(touched_bytes(problem) for problem in found)
    while touched < TOUCHED_BYTES and len(found) < 64:
        more = problems(model, layers, tokens, seed + len(found))
        touched += sum(touched_bytes(problem) for problem in more)
        found += more
    return found


def touched_bytes(problem: Problem) -> int:
    """Weights and scales of the slots that some token chose."""
    slots = int(problem.topk_ids_TK.unique().numel())
    return sum(parameter.nbytes // len(parameter) for parameter in problem.experts.parameters()) * slots


def measure(
    model: Model,
    layers: Sequence[Experts],
    tokens: int,
    *,
    limits: Ceilings,
    table: Table | None,
    peers: Sequence[Peer] = (),
    seed: int = 0,
) -> Point:
    """One point; raises `ValueError` where ours is further from the reference than its format allows."""
    some = problems_of(model, layers, tokens, seed)
    device = some[0].x_TD.device
    processors = multiprocessors(device)

    def configured(shape: Shape) -> tuple[Any, bool]:
        found = None if table is None else table.config(shape, tokens)
        return found or default(shape, tokens, processors), found is not None

    config, measured = configured(model.shape)
    fused = [ours.call(problem, config) for problem in some]
    reference = _reference(some[0])
    allowed = ACCURACY.get(model.format, USUAL_ACCURACY)
    error = _require_close(fused[0](), reference, allowed, "ours")
    memory = microseconds([probe(list(p.experts.parameters()), p.topk_ids_TK.unique()) for p in some])
    rate = limits.fp8_flops if model.format == "fp8_block" else limits.bf16_flops
    k = model.top_k + model.n_shared
    arithmetic = 2 * tokens * k * 3 * model.hidden_size * model.width / rate * 1e6
    apart = None
    if model.n_shared:
        shape = model.shape
        routed, _ = configured(routed_shape(_with_top_k(shape, model.top_k), model.n_shared))
        shared, _ = configured(dense_shape(shape, model.n_shared))
        split = [ours.split_call(problem, routed, shared) for problem in some]
        _require_close(split[0](), reference, allowed, "ours, apart")
        apart = microseconds(split)
    from dataclasses import asdict

    point = Point(
        shape=model.name,
        tp=model.tp_size,
        format=model.format,
        tokens=tokens,
        floor_us=max(memory, arithmetic),
        memory_us=memory,
        arithmetic_us=arithmetic,
        ours_us=microseconds(fused),
        ours_apart_us=apart,
        error=error,
        config=asdict(config),
        measured=measured,
    )
    for peer in peers:
        try:
            calls = [peer(problem) for problem in some[: len(layers)]]
            _require_close(calls[0](), reference, peer.accuracy, peer.name)
            point.peers[peer.name] = microseconds(calls)
        except Unavailable as reason:
            point.absent[peer.name] = str(reason)
        except (RuntimeError, ValueError) as failure:
            point.absent[peer.name] = f"failed: {str(failure).splitlines()[0][:200]}"
            torch.cuda.synchronize()
    return point


def _with_top_k(shape: Shape, top_k: int) -> Shape:
    from dataclasses import replace

    return replace(shape, top_k=top_k)


def _reference(problem: Problem) -> Callable[[Tensor], float]:
    rows = slice(0, CHECKED_TOKENS)
    x_TD, weights, ids = problem.x_TD[rows].float(), problem.topk_weights_TK[rows], problem.topk_ids_TK[rows]
    expected = eager(x_TD, weights, ids, problem.experts).double()

    def error(actual: Tensor) -> float:
        return float((actual[rows].double() - expected).norm() / expected.norm())

    return error


def _require_close(actual: Tensor, error_of: Callable[[Tensor], float], allowed: float, who: str) -> float:
    error = error_of(actual)
    if not error <= allowed:
        raise ValueError(f"{who} is {error:.3g} off the reference, allowed are {allowed}")
    return error


def points(
    models: Sequence[Model],
    tokens: Sequence[int],
    *,
    limits: Ceilings,
    table: Table | None,
    peers: Sequence[Peer] = (),
    seed: int = 0,
) -> Iterator[Point]:
    """All points, each when it is there; weights are made once a model."""
    for model in models:
        layers = layers_of(model, "cuda", seed)
        for count in tokens:
            yield measure(model, layers, count, limits=limits, table=table, peers=peers, seed=seed)
        del layers
        torch.cuda.empty_cache()
