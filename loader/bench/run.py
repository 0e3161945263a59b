"""Time one layer over numbers of tokens: the floor, ours, and peers; all of them checked before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from loader.bench import ours
from loader.bench.peers import Peer, Unavailable
from loader.bench.problem import Model, Problem, problems, random_experts
from loader.bench.report import Point, first_line
from loader.bench.timing import Captured, Ceilings, capture, in_turns, probe, settle
from loader.errors import BenchError
from loader.kernels.eager import eager
from loader.kernels.triton_backend import configuration
from loader.kernels.tuned import Table
from loader.moe import Experts

ACCURACY = {"fp8_block": 0.08}
"""How far ours may be from the reference, as ``|y - ref| / |ref|``: activations are E4M3 there."""
USUAL_ACCURACY = 0.02
CHECKED_TOKENS = 64
"""Rows that are compared with the reference, which takes an expert at a time."""
TOUCHED_BYTES = 512 << 20
"""What the calls of one graph read together at least: ten times the cache of the largest device."""
PROBE_BLOCKS = (2048, 8192)
"""Words that a program of the probe reads; the faster one counts."""
MOST_LAYER_BYTES = 24 << 30


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
    """One point; raises `BenchError` where ours is further from the reference than its format allows."""
    some = problems_of(model, layers, tokens, seed)
    shape, x_TD = model.shape, some[0].x_TD
    config = configuration(shape, x_TD, table)
    fused = [ours.call(problem, config) for problem in some]
    reference = _reference(some[0])
    allowed = ACCURACY.get(model.format, USUAL_ACCURACY)
    error = _require_close(fused[0](), reference, allowed, "ours")
    layer = [ours.layer_call(problem, config) for problem in some]
    rerouted = ours.rerouted(some[0])
    of_router = reference if rerouted is some[0] else _reference(rerouted)
    _require_close(layer[0](), of_router, allowed, "ours, with its router")
    rate = limits.fp8_flops if model.format == "fp8_block" else limits.bf16_flops
    k = model.top_k + model.n_shared
    arithmetic = 2 * tokens * k * 3 * model.hidden_size * model.width / rate * 1e6
    slots = [(list(p.experts.parameters()), p.topk_ids_TK.unique()) for p in some]
    probes = [f"probe of {block} words" for block in PROBE_BLOCKS]
    contenders = {
        name: capture([probe(*each, block) for each in slots]) for name, block in zip(probes, PROBE_BLOCKS, strict=True)
    }
    contenders |= {"ours": capture(fused), "layer": capture(layer)}
    if (counted := configuration(shape, x_TD, None)) != config:
        without_table = [ours.call(problem, counted) for problem in some]
        _require_close(without_table[0](), reference, allowed, "ours, settings counted")
        contenders["counted"] = capture(without_table)
    if model.n_shared:
        apart = [ours.apart_call(problem, table) for problem in some]
        _require_close(apart[0](), reference, allowed, "ours, apart")
        contenders["apart"] = capture(apart)
    captured, absent = _of_peers(peers, some, reference)
    us = in_turns(contenders | captured)
    memory = min(us[name] for name in probes)
    return Point(
        shape=model.name,
        tp=model.tp_size,
        format=model.format,
        tokens=tokens,
        floor_us=max(memory, arithmetic),
        memory_us=memory,
        arithmetic_us=arithmetic,
        ours_us=us["ours"],
        ours_apart_us=us.get("apart"),
        ours_counted_us=us.get("counted", us["ours"]),
        layer_us=us["layer"],
        error=error,
        config=asdict(config),
        measured=table is not None and table.config(shape, tokens) is not None,
        peers={name: us[name] for name in captured},
        absent=absent,
    )


def _of_peers(
    peers: Sequence[Peer], some: Sequence[Problem], reference: Callable[[Tensor], float]
) -> tuple[dict[str, Captured], dict[str, str]]:
    """Those that compute what the reference does, and why the others are not among them."""
    captured: dict[str, Captured] = {}
    absent: dict[str, str] = {}
    for peer in peers:
        try:
            calls = [peer(problem) for problem in some]
            _require_close(calls[0](), reference, peer.accuracy, peer.name)
            captured[peer.name] = capture(calls)
        except Unavailable as reason:
            absent[peer.name] = str(reason)
        except Exception as failure:  # noqa: BLE001  # theirs, which may raise anything and stops nobody else's run
            absent[peer.name] = f"failed: {first_line(failure)}"
            settle()
    return captured, absent


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
        raise BenchError(f"{who} is {error:.3g} off the reference, allowed are {allowed}")
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
