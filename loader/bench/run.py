"""Time one layer over numbers of tokens: the floor, ours, and peers; all of them checked before they are timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict

import torch

from loader.bench import ours
from loader.bench.checks import Reference, References, accuracy
from loader.bench.compiling import compile_all
from loader.bench.peers import Peer, Unavailable
from loader.bench.problem import Model, Problem, problems, random_experts
from loader.bench.report import Point, first_line
from loader.bench.timing import Captured, Ceilings, capture, in_turns, probe, settle
from loader.bench.turn import Left
from loader.errors import BenchError
from loader.kernels.configs import Config
from loader.kernels.triton_backend import configuration
from loader.kernels.tuned import Table
from loader.moe import Experts

TOUCHED_BYTES = 512 << 20
"""What the calls of one graph read together at least: ten times the cache of the largest device."""
PROBE_BLOCKS = (1024, 2048, 8192)
"""Words that a program of the probe reads; the fastest one counts."""
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
    config, counted = configuration(shape, x_TD, table), configuration(shape, x_TD, None)
    allowed, right = accuracy(model.format), References([Reference(problem) for problem in some])
    slots = [(list(p.experts.parameters()), p.topk_ids_TK.unique()) for p in some]
    probes = [f"probe of {block} words" for block in PROBE_BLOCKS]
    contenders = {
        name: capture([probe(*each, block) for each in slots]) for name, block in zip(probes, PROBE_BLOCKS, strict=True)
    }
    fused = [ours.call(problem, config) for problem in some]
    error = right.require(fused, allowed, "ours")
    contenders["ours"] = capture(fused)
    layer, right_of_layer = [ours.layer_call(problem, config) for problem in some], _rerouted(some, right)
    right_of_layer.require(layer, allowed, "ours, with its router")
    contenders["layer"] = capture(layer)
    if counted != config:
        without_table = [ours.call(problem, counted) for problem in some]
        right.require(without_table, allowed, "ours, settings counted")
        contenders["counted"] = capture(without_table)
    if model.n_shared:
        apart = [ours.apart_call(problem, table) for problem in some]
        right.require(apart, allowed, "ours, apart")
        contenders["apart"] = capture(apart)
    captured, absent = _of_peers(peers, some, right)
    us = in_turns(contenders | captured)
    for name in ("ours", "counted", "apart"):
        if name in contenders:
            right.require_last(contenders[name], allowed, name)
    right_of_layer.require_last(contenders["layer"], allowed, "ours, with its router,")
    _drop_wrong(peers, captured, right, absent)
    memory = min(us[name].median for name in probes)
    rate = limits.fp8_flops if model.format == "fp8_block" else limits.bf16_flops
    k = model.top_k + model.n_shared
    arithmetic = 2 * tokens * k * 3 * model.hidden_size * model.width / rate * 1e6
    return Point(
        shape=model.name,
        tp=model.tp_size,
        format=model.format,
        tokens=tokens,
        floor_us=max(memory, arithmetic),
        memory_us=memory,
        arithmetic_us=arithmetic,
        touched_bytes=sum(map(touched_bytes, some)) // len(some),
        ours_us=us["ours"].median,
        ours_apart_us=us["apart"].median if "apart" in us else None,
        ours_counted_us=us.get("counted", us["ours"]).median,
        layer_us=us["layer"].median,
        spread=max(reading.spread for reading in us.values()),
        error=error,
        config=asdict(config),
        measured=table is not None and tokens in table.configs.get(shape, {}),
        peers={name: us[name].median for name in captured},
        absent=absent,
    )


def _configurations(problem: Problem, table: Table | None) -> list[tuple[Problem, Config]]:
    """What `measure` times of ours for this number of tokens, together and apart."""
    counted = configuration(problem.model.shape, problem.x_TD, None)
    parts = zip(problem.parts(), problem.model.stacks, strict=True)
    return [(problem, counted), *((part, configuration(stack, problem.x_TD, table)) for part, stack in parts)]


def _rerouted(some: Sequence[Problem], right: References) -> References:
    """What layers with our router should give, which may send tokens elsewhere than the reference's does."""
    rerouted = [ours.rerouted(problem) for problem in some]
    return References(
        [
            one if other is problem else Reference(other)
            for problem, other, one in zip(some, rerouted, right.each, strict=True)
        ]
    )


def _of_peers(
    peers: Sequence[Peer], some: Sequence[Problem], right: References
) -> tuple[dict[str, Captured], dict[str, str]]:
    """Those that compute what the reference does, and why the others are not among them."""
    captured: dict[str, Captured] = {}
    absent: dict[str, str] = {}
    for peer in peers:
        try:
            calls = [peer(problem) for problem in some]
            right.require(calls, peer.accuracy, peer.name)
            captured[peer.name] = capture(calls)
        except Unavailable as reason:
            absent[peer.name] = str(reason)
        except Exception as failure:  # noqa: BLE001  # theirs, which may raise anything and stops nobody else's run
            absent[peer.name] = f"failed: {first_line(failure)}"
            settle()
    return captured, absent


def _drop_wrong(
    peers: Sequence[Peer], captured: dict[str, Captured], right: References, absent: dict[str, str]
) -> None:
    for peer in peers:
        try:
            if peer.name in captured:
                right.require_last(captured[peer.name], peer.accuracy, peer.name)
        except BenchError as failure:
            del captured[peer.name]
            absent[peer.name] = f"failed: {first_line(failure)}"


def points(
    models: Sequence[Model],
    tokens: Sequence[int],
    *,
    limits: Ceilings,
    table: Table | None,
    peers: Sequence[Peer] = (),
    seed: int = 0,
    left: Left = nullcontext,
) -> Iterator[Point]:
    """All points, each when it is there; weights are made once a model, and ours compiled for all numbers of tokens.

    While that is compiled, others may have the device (`left`).
    """
    for model in models:
        layers = layers_of(model, "cuda", seed)
        calls = (problems(model, layers[:1], count, seed)[0] for count in tokens)
        wanted = [each for problem in calls for each in _configurations(problem, table)]
        with left():
            compile_all(wanted)
        del wanted
        for count in tokens:
            yield measure(model, layers, count, limits=limits, table=table, peers=peers, seed=seed)
        del layers
        torch.cuda.empty_cache()
