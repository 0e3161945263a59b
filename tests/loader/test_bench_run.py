"""A point of the bench under Triton's interpreter, with a clock of our own: what is compared before it is timed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from loader.bench import checks
from loader.bench.peers import Unavailable, peers_of
from loader.bench.problem import Problem, random_experts
from loader.bench.timing import Reading
from loader.errors import BenchError
from loader.kernels.configs import default
from loader.kernels.tuned import Measured, Table
from tests.loader.bench_fakes import CEILINGS, model

pytestmark = pytest.mark.kernels


@dataclass
class Graph:
    """Stands for `Captured`, without a graph: the calls, and what the last of them gives."""

    calls: Sequence[Callable[[], Tensor | None]]

    @property
    def last(self) -> Tensor | None:
        return self.calls[-1]()


class Clock:
    """Stands for `in_turns`: 10 for the first, 20 for the second, half of the first one's replays 1 apart."""

    def __init__(self) -> None:
        self.asked: dict[str, Graph] = {}

    def __call__(self, contenders: dict[str, Graph]) -> dict[str, Reading]:
        self.asked = contenders
        return {
            name: Reading(10.0 * place, (10.0 * place, 10.0 * place + 1)) for place, name in enumerate(contenders, 1)
        }


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`loader.bench.run` with two problems a point, on the CPU."""
    from loader.bench import run

    monkeypatch.setattr(run, "TOUCHED_BYTES", 1)
    monkeypatch.setattr(run, "capture", Graph)
    monkeypatch.setattr(run, "in_turns", Clock())
    # As test_kernels.py has it: the layers are small.
    monkeypatch.setattr(checks, "ACCURACY", {"fp8_block": 0.12})
    monkeypatch.setattr(run, "probe", lambda parameters, slots, block: None)
    monkeypatch.setattr(run, "PROBE_BLOCKS", (2048,))  # one place in the turns for the floor
    return run


def of_point(**other: Any) -> tuple[Any, Any]:
    of = model(**other)
    return of, [random_experts(of, "cpu", seed) for seed in (0, 1)]


def measure(bench: Any, tokens: int = 3, *, table: Table | None = None, peers: Any = (), **other: Any) -> Any:
    return bench.measure(*of_point(**other), tokens, limits=CEILINGS, table=table, peers=peers)


class Stub:
    """A peer that does what it is told."""

    name, accuracy = "stub", 0.02

    def __init__(self, prepare: Callable[[Problem], Callable[[], Tensor]]) -> None:
        self.prepare = prepare

    def __call__(self, problem: Problem) -> Callable[[], Tensor]:
        return self.prepare(problem)


@pytest.mark.parametrize("format_name", ["bf16", "fp8_block", "int4_g32", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_point_of_each_format(bench: Any, format_name: str, tokens: int) -> None:
    found = measure(bench, tokens, format_name=format_name)
    assert found.error <= (0.12 if format_name == "fp8_block" else 0.02)
    assert [len(graph.calls) for graph in bench.in_turns.asked.values()] == [2, 2, 2, 2]
    assert found.spread == 0.1
    assert (
        found.touched_bytes
        == sum(map(bench.touched_bytes, bench.problems_of(*of_point(format_name=format_name), tokens, 0))) // 2
    )
    assert (found.memory_us, found.ours_us, found.layer_us, found.ours_apart_us) == (10.0, 20.0, 30.0, 40.0)
    assert (found.floor_us, found.ours_over_floor) == (10.0, 2.0)
    assert not found.measured
    assert found.ours_counted_us == found.ours_us
    rate = CEILINGS.fp8_flops if format_name == "fp8_block" else CEILINGS.bf16_flops
    assert found.arithmetic_us == pytest.approx(2 * tokens * 3 * 3 * 64 * 32 / rate * 1e6)


def test_a_layer_without_shared_experts_goes_one_way(bench: Any) -> None:
    found = measure(bench, n_shared=0)
    assert found.ours_apart_us is None
    assert (found.floor_us, found.ours_us, found.ours_over_floor) == (10.0, 20.0, 2.0)


def test_settings_of_a_table_are_used_and_said(bench: Any) -> None:
    shape = model().shape
    config = replace(default(shape, 3, 1), splits=2)
    table = Table(device="NVIDIA H200", versions={})
    table.configs[shape] = {4: Measured(tokens=4, microseconds=1.0, config=config)}
    found = measure(bench, 4, table=table)
    assert found.measured
    assert not measure(bench, 3, table=table).measured  # with the same settings
    assert found.config == asdict(config)
    assert [*bench.in_turns.asked][1:] == ["ours", "layer", "counted", "apart"]
    assert (found.ours_us, found.ours_counted_us, found.ours_apart_us) == (20.0, 40.0, 50.0)


@pytest.mark.parametrize("half", ["call", "apart_call", "layer_call"])
def test_a_wrong_kernel_is_refused_before_it_is_timed(bench: Any, monkeypatch: pytest.MonkeyPatch, half: str) -> None:
    right = getattr(bench.ours, half)

    def wrong(problem: Problem, *configs: Any) -> Callable[[], Tensor]:
        return lambda: right(problem, *configs)() * 1.1

    monkeypatch.setattr(bench.ours, half, wrong)
    with pytest.raises(BenchError, match=r"^ours.* is 0\.\d+ off the reference, allowed are"):
        measure(bench)
    assert not bench.in_turns.asked


def test_counted_settings_that_are_wrong_are_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right, shape = bench.ours.call, model().shape
    table = Table(device="NVIDIA H200", versions={})
    config = replace(default(shape, 3, 1), splits=2)
    table.configs[shape] = {4: Measured(tokens=4, microseconds=1.0, config=config)}

    def wrong(problem: Problem, used: Any) -> Callable[[], Tensor]:
        return lambda: right(problem, used)() * (1.0 if used == config else 1.1)

    monkeypatch.setattr(bench.ours, "call", wrong)
    with pytest.raises(BenchError, match=r"^ours, settings counted is 0\.\d+ off the reference"):
        measure(bench, table=table)


@pytest.mark.parametrize("who", ["ours", "stub"])
@pytest.mark.parametrize(("problem_number", "row"), [(0, 99), (1, 0)])
def test_each_call_is_compared_to_its_last_row(
    bench: Any, monkeypatch: pytest.MonkeyPatch, who: str, problem_number: int, row: int
) -> None:
    """Not only the first call, and not only rows that are in the first blocks."""
    (peer,) = peers_of(["torch-grouped_mm"])
    right: Any = bench.ours.call if who == "ours" else peer
    seen: list[Tensor] = []

    def wrong(problem: Problem, *config: Any) -> Callable[[], Tensor]:
        call = right(problem, *config)
        if not any(x is problem.x_TD for x in seen):
            seen.append(problem.x_TD)
        bad = next(n for n, x in enumerate(seen) if x is problem.x_TD) == problem_number

        def broken() -> Tensor:
            y: Tensor = call().clone()
            if bad:
                y[row] = torch.nan
            return y

        return broken

    if who == "ours":
        monkeypatch.setattr(bench.ours, "call", wrong)
        with pytest.raises(BenchError, match=r"^ours is nan off the reference"):
            measure(bench, 100)
    else:
        found = measure(bench, 100, peers=[Stub(wrong)])
        assert found.peers == {} and found.absent == {"stub": "failed: stub is nan off the reference, allowed are 0.02"}


@pytest.mark.parametrize(
    ("number", "who"),
    [(0, "ours in a graph"), (1, "ours, with its router, in a graph"), (2, "counted in a graph"),
     (3, "apart in a graph"), (4, "stub in a graph")],
)  # fmt: skip
def test_what_only_a_graph_gets_wrong_is_seen(
    bench: Any, monkeypatch: pytest.MonkeyPatch, number: int, who: str
) -> None:
    """Of each contender by itself; they are captured in this order, behind the probe."""
    (right,) = peers_of(["torch-grouped_mm"])
    shape, captured = model().shape, itertools.count(-1)
    table = Table(device="NVIDIA H200", versions={})
    config = replace(default(shape, 3, 1), splits=2)
    table.configs[shape] = {3: Measured(tokens=3, microseconds=1.0, config=config)}

    def capture(calls: Any) -> Graph:
        if next(captured) == number:
            return Graph([lambda call=call: call() * 1.1 for call in calls])  # type: ignore[misc]
        return Graph(calls)

    monkeypatch.setattr(bench, "capture", capture)
    if number < 4:
        with pytest.raises(BenchError, match=rf"^{who} is 0\.\d+ off"):
            measure(bench, table=table, peers=[Stub(right)])
    else:
        found = measure(bench, table=table, peers=[Stub(right)])
        assert found.peers == {} and found.absent["stub"].startswith(f"failed: {who} is 0.")


def test_a_router_may_differ_in_a_near_tie_and_not_in_more(bench: Any) -> None:
    (problem,) = bench.problems_of(model(), [random_experts(model(), "cpu", 0)], 4, 0)[:1]
    assert bench.ours.rerouted(problem) is problem
    ids = problem.topk_ids_TK
    elsewhere = torch.cat([(ids[:, :2] + 1) % 6, ids[:, 2:]], 1)
    once = replace(problem, topk_ids_TK=torch.cat([elsewhere[:1], ids[1:]]))
    assert torch.equal(bench.ours.rerouted(once).topk_ids_TK.sort(-1).values, ids.sort(-1).values)
    with pytest.raises(BenchError, match="our router sends 4 of 4 tokens elsewhere than the reference"):
        bench.ours.rerouted(replace(problem, topk_ids_TK=elsewhere))


def test_a_kernel_that_gives_no_numbers_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.ours, "call", lambda problem, config: lambda: torch.full_like(problem.x_TD, torch.nan))
    with pytest.raises(BenchError, match="ours is nan off the reference"):
        measure(bench)


def test_a_peer_that_is_right_is_timed_on_as_many_layers(bench: Any) -> None:
    found = measure(bench, peers=peers_of(["torch-grouped_mm"]))
    assert found.peers == {"torch-grouped_mm": 50.0}
    assert found.absent == {}


def test_a_peer_that_is_wrong_is_listed_and_not_timed(bench: Any) -> None:
    (right,) = peers_of(["torch-grouped_mm"])

    def wrong(problem: Problem) -> Callable[[], Tensor]:
        call = right(problem)
        return lambda: call() * 1.1

    found = measure(bench, peers=[Stub(wrong)])
    assert found.peers == {}
    assert found.absent["stub"].startswith("failed: stub is 0.")
    assert len(bench.in_turns.asked) == 4


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (Unavailable("needs sm80"), "needs sm80"),
        (RuntimeError("out of memory\nmore"), "failed: out of memory"),
        (RuntimeError(), "failed: RuntimeError"),
        (AssertionError("hidden size"), "failed: hidden size"),
        (KeyError("w13"), "failed: 'w13'"),
    ],
)
def test_a_peer_that_fails_is_listed_and_the_others_go_on(bench: Any, error: Exception, says: str) -> None:
    def fail(problem: Problem) -> Callable[[], Tensor]:
        raise error

    found = measure(bench, peers=[Stub(fail), *peers_of(["torch-grouped_mm"])])
    assert found.absent == {"stub": says}
    assert found.peers.keys() == {"torch-grouped_mm"}


def test_calls_are_made_until_they_read_more_than_a_cache_holds(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of = model()
    layers = [random_experts(of, "cpu", seed) for seed in (0, 1)]
    slot = 3 * 64 * 32 * 2
    one = bench.problems_of(of, layers, 1, 0)
    assert len(one) == 2
    assert [bench.touched_bytes(problem) for problem in one] == [3 * slot] * 2
    monkeypatch.setattr(bench, "TOUCHED_BYTES", 7 * 3 * slot)
    more = bench.problems_of(of, layers, 1, 0)
    assert len(more) == 8
    assert len({tuple(problem.topk_ids_TK.flatten().tolist()) for problem in more}) > 2
    monkeypatch.setattr(bench, "TOUCHED_BYTES", 1 << 60)
    assert len(bench.problems_of(of, layers, 1, 0)) == 64


def test_the_probe_reads_what_is_touched() -> None:
    """Every word of the chosen slots, and none of another."""
    from loader.bench.timing import probe

    sizes = [(5, 11), (3, 7000), (1, 1), (2, 8192)]
    for count in (1, 2, 3, 4):
        some = [torch.zeros(4, *size, dtype=torch.int32) for size in sizes[:count]]
        for number, one in enumerate(some, 1):
            one[2, -1, -1], one[1, 0, 0] = number, 99
        found = probe(some, torch.tensor([0, 2]))()
        assert sorted(found.tolist())[-count - 1 :] == list(range(count + 1))


def test_contenders_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from loader.bench import timing

    run: list[str] = []
    taking = {"a": iter([9.0, 1.0, 2.0, 2.0]), "b": iter([4.0, 40.0, 8.0, 8.0])}
    monkeypatch.setattr(timing, "_elapsed", lambda replay: next(taking[replay()]))
    contenders = {
        name: timing.Captured(lambda name=name: run.append(name) or name, [lambda: None] * count, 2, None)  # type: ignore[misc]
        for name, count in (("a", 1), ("b", 4))
    }
    assert {name: reading.median for name, reading in timing.in_turns(contenders, 3).items()} == {"a": 1e3, "b": 1e3}
    assert [run[:2], run[2:4], run[4:6], run[6:]] == [["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]]


def test_a_clock_that_slows_down_makes_nobody_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    from loader.bench import timing

    clock = itertools.count(1)
    monkeypatch.setattr(timing, "capture", lambda calls: calls)
    monkeypatch.setattr(
        timing,
        "in_turns",
        lambda some, _: {
            n: timing.Reading(calls[0]() * slow, (0, 0)) for slow in [next(clock)] for n, calls in some.items()
        },
    )
    timer = timing.Beside()
    assert [timer.microseconds([lambda us=us: us]) for us in (8.0, 4.0, 16.0)] == [8.0, 4.0, 16.0]  # type: ignore[misc]


def test_half_of_the_replays_is_within_the_quartiles() -> None:
    from loader.bench.timing import Reading

    reading = Reading.of([10.0, 12.0, 11.0, 30.0, 10.0])
    assert (reading.median, reading.quartiles) == (11.0, (10.0, 12.0))
    assert reading.spread == pytest.approx(2 / 11)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7])
def test_each_contender_comes_behind_each_other_one_equally_often(n: int) -> None:
    from loader.bench import timing

    rounds = [timing._order(range(n), turn) for turn in range(2 * n)]
    assert all(sorted(each) == list(range(n)) for each in rounds)
    behind = Counter(pair for each in rounds for pair in pairwise(each))
    assert len(behind) == n * (n - 1) and set(behind.values()) <= {2}


@pytest.mark.parametrize("format_name", ["bf16", "mxfp4"])
@pytest.mark.parametrize("n_shared", [0, 1])
def test_what_is_compiled_ahead_is_what_is_timed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, format_name: str, n_shared: int
) -> None:
    from loader.kernels.triton_layer import TritonExperts

    called = set()
    real = TritonExperts.__call__

    def noted(self: Any, x: Tensor, weights: Tensor, ids: Tensor, **how: Any) -> Tensor:
        called.add((ids.shape[1], how["config"]))
        return real(self, x, weights, ids, **how)

    of, layers = of_point(format_name=format_name, n_shared=n_shared)
    (problem,) = bench.problems(of, layers[:1], 3, 0)
    counted = bench.configuration(of.shape, problem.x_TD, None)
    table = Table(device="", versions={})
    measured = Measured(tokens=3, microseconds=1.0, config=replace(counted, block_m=2 * counted.block_m))
    table.configs[of.shape] = {3: measured}
    monkeypatch.setattr(TritonExperts, "__call__", noted)
    bench.measure(of, layers, 3, limits=CEILINGS, table=table)
    wanted = {(part.topk_ids_TK.shape[1], config) for part, config in bench._configurations(problem, table)}
    assert called == wanted
    assert len(wanted) == 2 + n_shared * (1 if format_name == "bf16" else 2)
