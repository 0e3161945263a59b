"""The search for settings and the table that it fills, with a clock of our own; nothing is run."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from loader.bench import cli
from loader.bench.candidates import candidates
from loader.bench.problem import Model, problems, random_experts
from loader.bench.shown import Shown, shown
from loader.bench.timing import Reading
from loader.bench.turn import Turn
from loader.errors import BenchError, TableError
from loader.kernels.configs import Config, Shape, Tiles, default
from loader.kernels.tuned import Measured, Table, file_name, read_table, to_change
from tests.loader.bench_fakes import model

pytestmark = pytest.mark.kernels
DEVICE = "NVIDIA H200"


class Clock:
    """Stands for a `Beside`: the time of a configuration is `cost` of it; it notes whom it was asked of.

    `again` stands for `in_turns`, of the few that are left.
    """

    def __init__(self, cost: Callable[[Config], float], *, again: Callable[[Config], float] | None = None) -> None:
        self.cost, self.asked = cost, []  # type: tuple[Callable[[Config], float], list[Config]]
        self.cost_again, self.finalists = again or cost, []  # type: tuple[Callable[[Config], float], list[Config]]

    def microseconds(self, calls: Any) -> float:
        (config,) = {call.config for call in calls}
        self.asked.append(config)
        return self.cost(config)

    def again(self, contenders: dict[Config, Any]) -> dict[Config, Reading]:
        self.finalists = list(contenders)
        return {config: Reading(self.cost_again(config), (0.0, 0.0)) for config in contenders}


class Call:
    """Stands for a call of a layer; `gives` is what it comes to."""

    def __init__(self, config: Config, gives: Callable[[Config], float]) -> None:
        self.config, self.gives = config, gives

    def __call__(self) -> float:
        return self.gives(self.config)


class Right:
    """Stands for `Reference`: 1 is right."""

    def __init__(self, problem: Any) -> None:
        pass

    def require(self, actual: float, allowed: float, who: str) -> float:
        if actual != 1.0:
            raise BenchError(f"{who} is {actual} off")
        return 0.0


def use(monkeypatch: pytest.MonkeyPatch, tune: Any, clock: Clock) -> Clock:
    monkeypatch.setattr(tune, "Beside", lambda: clock)
    monkeypatch.setattr(tune, "in_turns", clock.again)
    return clock


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`loader.bench.tune`, in which a call is its configuration, and compiling is nothing."""
    from loader.bench import tune

    monkeypatch.setattr(tune, "compile_all", list)
    monkeypatch.setattr(tune, "Reference", Right)
    monkeypatch.setattr(tune, "capture", lambda calls: SimpleNamespace(last=calls[-1]()))
    monkeypatch.setattr(tune.ours, "call", lambda problem, config: Call(config, lambda _: 1.0))
    return tune


def one_problem(tokens: int = 16, **other: Any) -> Any:
    of = model(**other)
    return problems(of, [random_experts(of, "cpu", 0)], tokens, 0)


def distance(config: Config, goal: Config) -> float:
    """Grows with each setting that is another than the goal's."""
    return (
        1.0
        + sum(
            abs(math.log2(getattr(a, name) / getattr(b, name)))
            for a, b in ((config.gate_up, goal.gate_up), (config.down, goal.down))
            for name in ("block_n", "block_c", "warps", "stages")
        )
        + 10 * abs(math.log2(config.block_m / goal.block_m))
        + abs(config.down.programs - goal.down.programs)
        + abs(config.down.strips - goal.down.strips)
    )


GOAL = Config(
    block_m=32,
    gate_up=Tiles(block_n=64, block_c=128, warps=8, stages=3),
    down=Tiles(block_n=128, block_c=64, warps=4, stages=2),
)
SHAPE = Shape(format="bf16", n_slots=385, hidden_size=7168, width=256, top_k=9)


@pytest.mark.parametrize("strips", [1, 14])
def test_the_planted_best_is_found(bench: Any, monkeypatch: pytest.MonkeyPatch, strips: int) -> None:
    goal = replace(GOAL, down=replace(GOAL.down, strips=strips))
    clock = use(monkeypatch, bench, Clock(lambda config: distance(config, goal)))
    done: list[None] = []
    best = bench.search(one_problem(2048), SHAPE, most=1000, done=lambda: done.append(None))
    assert (best.config, best.microseconds) == (goal, 1.0)
    assert len(set(clock.asked)) == len(clock.asked) == best.tried == len(done)
    assert best.failed == 0


def test_a_start_is_tried_first_and_kept_where_nothing_is_better(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = replace(GOAL, gate_up=replace(GOAL.gate_up, block_n=512))  # no search would come upon it
    clock = use(monkeypatch, bench, Clock(lambda config: 1.0 if config == start else 2.0))
    best = bench.search(one_problem(2048), SHAPE, most=4, start=[start])
    assert clock.asked[0] == best.config == start
    assert clock.asked[1] == default(SHAPE, 2048, 1)
    assert len(clock.asked) <= 1 + 3 * 4


def test_a_lucky_reading_does_not_win(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the best few readings, what is best when they are timed side by side."""
    lucky = replace(GOAL, down=replace(GOAL.down, stages=3))
    clock = use(
        monkeypatch,
        bench,
        Clock(
            lambda config: 0.5 if config == lucky else distance(config, GOAL),
            again=lambda config: 1.25 * distance(config, GOAL),
        ),
    )
    best = bench.search(one_problem(2048), SHAPE, most=1000)
    assert clock.finalists[:2] == [lucky, GOAL]
    assert len(clock.finalists) == bench.FINALISTS
    assert (best.config, best.microseconds) == (GOAL, 1.25)


def test_what_a_search_starts_from_is_beside_the_best_at_the_end(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlucky when it was timed by itself, it stays; the other starts get no second chance."""
    first, second = (replace(GOAL, gate_up=replace(GOAL.gate_up, block_n=n)) for n in (512, 1024))
    slow = {first: 1000.0, second: 2000.0}
    clock = use(
        monkeypatch,
        bench,
        Clock(lambda config: slow.get(config) or distance(config, GOAL), again=lambda config: 1.0 + (config != first)),
    )
    best = bench.search(one_problem(2048), SHAPE, most=6, start=[first, second])
    assert best.config == first
    assert clock.finalists[bench.FINALISTS :] == [first]
    assert second not in clock.finalists


def test_what_it_starts_from_and_can_not_be_launched_is_not_timed_again(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = replace(GOAL, gate_up=replace(GOAL.gate_up, block_n=512))

    def cost(config: Config) -> float:
        if config == start:
            raise RuntimeError("out of resource: shared memory")
        return distance(config, GOAL)

    clock = use(monkeypatch, bench, Clock(cost))
    bench.search(one_problem(2048), SHAPE, most=6, start=[start])
    assert clock.asked[0] == start and start not in clock.finalists


def test_what_it_starts_from_stays_unless_it_is_beaten_by_more_than_luck(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = replace(GOAL, gate_up=replace(GOAL.gate_up, block_n=512))
    for us, stays in ((1.009, True), (1.02, False)):
        use(monkeypatch, bench, Clock(lambda config, us=us: us if config == start else 1.0))  # type: ignore[misc]
        best = bench.search(one_problem(2048), SHAPE, most=4, start=[start])
        assert (best.config == start) is stays


def test_what_computes_something_else_does_not_win(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The goal is fastest, and wrong."""
    monkeypatch.setattr(
        bench.ours, "call", lambda problem, config: Call(config, lambda config: 0.0 if config == GOAL else 1.0)
    )
    clock = use(monkeypatch, bench, Clock(lambda config: distance(config, GOAL)))
    best = bench.search(one_problem(2048), SHAPE, most=1000)
    assert GOAL not in clock.asked and best.config != GOAL and best.microseconds > 1.0
    assert best.failed == 1


def test_a_finalist_is_compared_in_all_its_calls(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The goal is right in its first call, and in that alone."""
    of = model()
    two = problems(of, [random_experts(of, "cpu", seed) for seed in (0, 1)], 2048, 0)

    def call(problem: Any, config: Config) -> Call:
        return Call(config, lambda config: 0.0 if config == GOAL and problem is two[1] else 1.0)

    monkeypatch.setattr(bench.ours, "call", call)
    clock = use(monkeypatch, bench, Clock(lambda config: distance(config, GOAL)))
    best = bench.search(two, SHAPE, most=1000)
    assert GOAL in clock.asked and best.config != GOAL
    assert best.failed == 1


def test_where_the_best_few_are_wrong_the_next_are_tried(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, bench, Clock(lambda config: distance(config, GOAL)))
    right = bench.search(one_problem(2048), SHAPE, most=1000)
    ranked: list[Config] = []

    def capture(calls: Any) -> Any:
        ranked.append(calls[0].config)
        return SimpleNamespace(last=0.0 if len(ranked) <= bench.FINALISTS else 1.0)

    monkeypatch.setattr(bench, "capture", capture)
    use(monkeypatch, bench, Clock(lambda config: distance(config, GOAL)))
    best = bench.search(one_problem(2048), SHAPE, most=1000)
    assert right.config == ranked[0] and best.config in ranked[bench.FINALISTS :]
    assert best.failed == bench.FINALISTS


def test_a_finalist_that_is_wrong_in_a_graph_does_not_win(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(calls: Any) -> Any:
        return SimpleNamespace(last=0.0 if calls[0].config in wrong else 1.0)

    monkeypatch.setattr(bench, "capture", capture)
    wrong = [GOAL]
    use(monkeypatch, bench, Clock(lambda config: distance(config, GOAL)))
    best = bench.search(one_problem(2048), SHAPE, most=1000)
    assert best.config != GOAL and best.microseconds > 1.0
    monkeypatch.setattr(bench, "capture", lambda calls: SimpleNamespace(last=0.0))
    with pytest.raises(BenchError, match=r"of \d+ configurations none is right for .* with 2048 tokens"):
        bench.search(one_problem(2048), SHAPE, most=4)


def test_a_search_is_the_same_each_time(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = []
    for seed in (0, 0, 1):
        clocks.append(use(monkeypatch, bench, Clock(lambda config: distance(config, GOAL))))
        bench.search(one_problem(2048), SHAPE, most=6, seed=seed)
    assert clocks[0].asked == clocks[1].asked != clocks[2].asked


def test_what_does_not_run_is_passed_over(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(config: Config) -> float:
        if config.block_m == GOAL.block_m and config.gate_up.stages > 2:
            raise RuntimeError("out of resource: shared memory")
        return distance(config, GOAL)

    clock = use(monkeypatch, bench, Clock(cost))
    best = bench.search(one_problem(2048), SHAPE, most=1000)
    assert math.isfinite(best.microseconds)
    assert best.failed > 0
    assert best.tried + best.failed == len(clock.asked)


def test_where_nothing_runs_is_an_error_with_the_reason(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Config) -> float:
        raise RuntimeError("out of resource: shared memory\nand so on")

    use(monkeypatch, bench, Clock(fail))
    says = r"of \d+ configurations none runs for Shape\(.*with 16 tokens: out of resource: shared memory$"
    with pytest.raises(BenchError, match=says):
        bench.search(one_problem(), model().shape, most=3)


def test_what_stops_the_program_is_not_passed_over(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(config: Config) -> float:
        raise KeyboardInterrupt

    use(monkeypatch, bench, Clock(stop))
    with pytest.raises(KeyboardInterrupt):
        bench.search(one_problem(), model().shape)


class Searches:
    """Stands for `search`: counts, and finds the first candidate; `failing` is the number of the one that fails."""

    def __init__(self, failing: int | None = None) -> None:
        self.of: list[tuple[Shape, int]] = []
        self.starts: list[list[Config]] = []
        self.asked: list[tuple[int, int]] = []
        self.saved: list[int] = []
        self.failing = failing
        self.path = Path()

    def __call__(
        self,
        some: Any,
        shape: Shape,
        *,
        most: int,
        start: list[Config],
        seed: int,
        done: Callable[[], None],
        left: Any,
    ) -> Any:
        from loader.bench.tune import Best

        if self.path.exists():
            self.saved.append(sum(len(each) for each in read_table(self.path).configs.values()))
        if len(self.of) == self.failing:
            raise BenchError("of 3 configurations none runs")
        tokens = len(some[0].x_TD)
        assert some[0].topk_ids_TK.shape[1] == shape.top_k
        self.of.append((shape, tokens))
        self.starts.append(start)
        self.asked.append((most, seed))
        found = candidates(shape, tokens, 132)[seed]
        return Best(config=found, microseconds=10.0 * tokens + len(self.of), tried=most, failed=0)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """`tune` of small models on the CPU, with searches that find at once; what it said and what they did."""
    from loader.bench import tuning

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: DEVICE)
    monkeypatch.setattr(tuning, "layers_of", lambda of, device, seed: [random_experts(of, "cpu", seed)])
    monkeypatch.setattr(tuning, "problems_of", problems)
    monkeypatch.setattr(tuning, "capture", len)
    readings = {"fused": Reading(20.5, (20.0, 21.0)), "apart": Reading(25.5, (25.0, 26.0))}
    monkeypatch.setattr(tuning, "in_turns", lambda contenders: readings)

    def go(
        models: list[Model], tokens: list[int], *, failing: int | None = None, **options: Any
    ) -> tuple[bool, list[str], Searches]:
        said: list[str] = []
        searches = Searches(failing)
        lines = Shown()
        monkeypatch.setattr(lines, "say", said.append)
        searches.path = tmp_path / file_name(DEVICE)
        monkeypatch.setattr(tuning, "search", searches)
        done = tuning.tune(models, tokens, folder=tmp_path, most=9, shown=lines, **{"until": None, **options})
        return done, said, searches

    return go


def table(folder: Path) -> Table:
    return read_table(folder / file_name(DEVICE), DEVICE)


def test_a_table_gets_the_stack_and_its_halves(run: Callable[..., Any], tmp_path: Path) -> None:
    of = model("mxfp4")
    done, said, searches = run([of], [1, 16])
    assert done
    routed, shared = replace(of.shape, n_slots=6, top_k=2), replace(of.shape, n_slots=1, top_k=1)
    assert searches.of == [(shape, tokens) for tokens in (1, 16) for shape in (of.shape, routed, shared)]
    assert searches.starts[0] == []
    assert searches.starts[1] == searches.starts[2] == [table(tmp_path).configs[of.shape][1].config]
    found = table(tmp_path)
    assert found.configs.keys() == {of.shape, routed, shared}
    assert found.configs[of.shape][16].microseconds == 20.5
    assert found.configs[routed][16].microseconds == 165.0
    assert found.configs[of.shape][16].apart_microseconds == 25.5
    assert found.configs[routed][16].apart_microseconds is None
    assert found.versions.keys() == {"torch", "triton"}
    assert said == [
        "small tp 1 mxfp4, 1 tokens: 20.5 us, 25.5 with the shared slots on their own",
        "small tp 1 mxfp4, 16 tokens: 20.5 us, 25.5 with the shared slots on their own",
    ]


def test_plain_shared_experts_are_torchs_products_and_have_no_settings(run: Callable[..., Any], tmp_path: Path) -> None:
    of = model("bf16")
    _, said, searches = run([of], [16])
    assert [shape for shape, _ in searches.of] == [of.shape, of.shape.routed(1)]
    assert table(tmp_path).configs[of.shape][16].apart_microseconds == 25.5
    assert said == ["small tp 1 bf16, 16 tokens: 20.5 us, 25.5 with the shared slots on their own"]
    assert run([of], [16])[2].of == []


def test_stacks_most_alike_come_first_and_no_more_than_asked(run: Callable[..., Any], tmp_path: Path) -> None:
    others = [model(n_shared=0, n_routed=12 + n) for n in range(12)]
    run([model(n_shared=0, width=64), *reversed(others)], [16])
    some = read_table(tmp_path / file_name(DEVICE))
    for n, each in enumerate(others):  # else all of them have won with the same
        known = some.configs[each.shape][16]
        gate_up = replace(known.config.gate_up, group=1 + n)
        some.configs[each.shape][16] = replace(known, config=replace(known.config, gate_up=gate_up))
    some.save(tmp_path / file_name(DEVICE))
    of = model(n_shared=0)
    _, _, searches = run([of], [16])
    assert searches.starts == [[some.configs[each.shape][16].config for each in others[:9]]]


def test_packed_formats_learn_from_each_other_their_own_first(run: Callable[..., Any], tmp_path: Path) -> None:
    int4, mxfp4, bf16 = (model(name, n_shared=0) for name in ("int4_g32", "mxfp4", "bf16"))
    run([int4, mxfp4, bf16], [16], seed=1)
    some = read_table(tmp_path / file_name(DEVICE))
    known = some.configs[int4.shape][16]
    other = replace(known.config, gate_up=replace(known.config.gate_up, warps=8))
    some.configs[int4.shape][16] = replace(known, config=other)
    some.save(tmp_path / file_name(DEVICE))
    _, _, searches = run([mxfp4, bf16], [16], again=True)
    assert searches.starts == [[some.configs[mxfp4.shape][16].config, other], [some.configs[bf16.shape][16].config]]


def test_a_full_gpu_is_no_fault_of_a_setting(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, bench, Clock(lambda config: 1.0))

    def full(_: Config) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench.ours, "call", lambda problem, config: Call(config, full))
    with pytest.raises(torch.OutOfMemoryError):
        bench.search(one_problem(2048), SHAPE, most=6)


def test_others_have_the_device_while_a_search_compiles(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, bench, Clock(lambda config: 1.0))
    is_left = [False]

    @contextmanager
    def left() -> Iterator[None]:
        is_left[0] = True
        yield
        is_left[0] = False

    def compile_all(wanted: Any) -> None:
        assert is_left[0]
        compiled.extend(config for _, config in wanted)

    def called(problem: Any, config: Config) -> Call:
        assert not is_left[0]
        assert config in compiled
        return Call(config, lambda _: 1.0)

    compiled: list[Config] = []
    monkeypatch.setattr(bench, "compile_all", compile_all)
    monkeypatch.setattr(bench.ours, "call", called)
    best = bench.search(one_problem(2048), SHAPE, most=6, left=left)
    assert best.tried == len(compiled)


def test_a_model_without_shared_experts_is_one_stack(run: Callable[..., Any], tmp_path: Path) -> None:
    _, said, searches = run([model(n_shared=0)], [16])
    assert searches.of == [(model(n_shared=0).shape, 16)]
    assert said == ["small tp 1 bf16, 16 tokens: 161.0 us"]
    assert table(tmp_path).configs[model(n_shared=0).shape][16].apart_microseconds is None


def test_each_find_is_saved_before_the_next_search(run: Callable[..., Any]) -> None:
    _, _, searches = run([model("mxfp4")], [1, 16])
    assert searches.saved == [1, 2, 3, 4, 5]


def test_what_is_there_is_not_measured_again(run: Callable[..., Any], tmp_path: Path) -> None:
    run([model()], [1])
    before = table(tmp_path).configs[model().shape][1]
    done, said, searches = run([model()], [1])
    assert done and searches.of == []
    assert said == [f"small tp 1 bf16: all of it is in {tmp_path / file_name(DEVICE)}"]
    _, _, searches = run([model()], [1, 4])
    assert {tokens for _, tokens in searches.of} == {4}
    assert table(tmp_path).configs[model().shape][1] == before


def test_again_starts_at_what_is_there(run: Callable[..., Any], tmp_path: Path) -> None:
    of = model()
    run([of], [1, 16])
    before = table(tmp_path).configs
    _, said, searches = run([of], [16], again=True, seed=1)
    assert [tokens for _, tokens in searches.of] == [16, 16]
    own = [before[shape][16].config for shape in (of.shape, of.shape.routed(1))]
    assert [start[0] for start in searches.starts] == own
    assert searches.asked == [(4, 1), (4, 1)]  # a third, and four at least
    assert said == ["small tp 1 bf16, 16 tokens: 20.5 us, 25.5 with the shared slots on their own"]
    after = table(tmp_path).configs
    assert after[of.shape][16].config == candidates(of.shape, 16, 132)[1] != own[0]
    assert after[of.shape][1] == before[of.shape][1]


def test_what_won_for_the_next_fewer_and_more_tokens_is_tried(run: Callable[..., Any], tmp_path: Path) -> None:
    """That makes no search shorter."""
    of = model(n_shared=0)
    path = tmp_path / file_name(DEVICE)
    configs = {
        n: replace(default(of.shape, 16, 132), splits=splits) for n, splits in ((1, 1), (4, 2), (64, 4), (256, 8))
    }
    found = {n: Measured(tokens=n, microseconds=5.0, config=config) for n, config in configs.items()}
    Table(device=DEVICE, versions={}, configs={of.shape: found}).save(path)
    _, _, searches = run([of], [16])
    assert searches.starts == [[configs[4], configs[64]]]
    assert searches.asked == [(9, 0)]


def test_again_does_not_go_on_where_it_was(run: Callable[..., Any], tmp_path: Path) -> None:
    run([model()], [1])
    done, said, searches = run([model()], [1], until=time.monotonic() - 1, again=True)
    assert not done and searches.of == []
    assert said == [f"the time is up; what was found is in {tmp_path / file_name(DEVICE)}"]


def test_what_another_process_finds_meanwhile_stays(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loader.bench import tuning

    one = Measured(tokens=16, microseconds=5.0, config=default(SHAPE, 16, 132))

    def meanwhile(of: Model, device: str, seed: int) -> list[Any]:
        with to_change(tmp_path / file_name(DEVICE), DEVICE) as others:
            others.configs[SHAPE] = {16: one}
        return [random_experts(of, "cpu", seed)]

    monkeypatch.setattr(tuning, "layers_of", meanwhile)
    run([model(n_shared=0)], [1])
    assert table(tmp_path).configs.keys() == {SHAPE, model(n_shared=0).shape}
    assert table(tmp_path).configs[SHAPE] == {16: one}


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_a_run_that_was_cut_short_goes_on_where_it_was(run: Callable[..., Any], tmp_path: Path, failing: int) -> None:
    with pytest.raises(BenchError):
        run([model("mxfp4")], [1, 16], failing=failing)
    done, _, searches = run([model("mxfp4")], [1, 16])
    assert done
    assert len(searches.of) == 6 - failing
    assert all(one.apart_microseconds is not None for one in table(tmp_path).configs[model("mxfp4").shape].values())


def test_what_only_lacks_the_comparison_gets_it(run: Callable[..., Any], tmp_path: Path) -> None:
    run([model()], [1])
    cut = table(tmp_path)
    cut.configs[model().shape][1] = replace(cut.configs[model().shape][1], apart_microseconds=None)
    cut.save(tmp_path / file_name(DEVICE))
    _, said, searches = run([model()], [1])
    assert searches.of == []
    assert said == ["small tp 1 bf16, 1 tokens: 20.5 us, 25.5 with the shared slots on their own"]
    assert table(tmp_path).configs[model().shape][1].apart_microseconds == 25.5


def test_a_wide_stack_starts_at_no_setting_of_a_narrow_one_that_it_can_not_have(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Where `down` keeps activations; it does so up to 512 columns."""
    kept, walks = (replace(default(SHAPE, 16, 132), down=replace(GOAL.down, strips=n)) for n in (4, 1))
    one = {SHAPE: {16: Measured(tokens=16, microseconds=5.0, config=kept)}}
    one[replace(SHAPE, n_slots=257)] = {16: Measured(tokens=16, microseconds=5.0, config=walks)}
    Table(device=DEVICE, versions={}, configs=one).save(tmp_path / file_name(DEVICE))
    _, _, searches = run([model(n_shared=0)], [16])
    assert {kept, walks} == set(searches.starts[0])
    _, _, searches = run([model(n_shared=0, width=768)], [16])
    assert kept not in searches.starts[0] and walks in searches.starts[0]


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_table_of_other_versions_is_not_added_to(run: Callable[..., Any], tmp_path: Path, name: str) -> None:
    run([model()], [1])
    made = table(tmp_path)
    made.versions = {**made.versions, name: "1.0"}
    made.save(tmp_path / file_name(DEVICE))
    with pytest.raises(TableError, match=rf"was measured with .*{name} 1.0.*, here are .*another folder with --tables"):
        run([model()], [1, 4])
    assert table(tmp_path).configs == made.configs


def test_other_stacks_of_the_table_stay(run: Callable[..., Any], tmp_path: Path) -> None:
    one = Measured(tokens=16, microseconds=5.0, config=default(SHAPE, 16, 132))
    Table(device=DEVICE, versions={"driver": "570"}, configs={SHAPE: {16: one}}).save(tmp_path / file_name(DEVICE))
    run([model(n_shared=0)], [1])
    assert table(tmp_path).configs[SHAPE] == {16: one}
    assert table(tmp_path).versions["driver"] == "570"


def test_the_end_of_the_time_is_said(run: Callable[..., Any], tmp_path: Path) -> None:
    done, said, searches = run([model()], [1, 16], until=time.monotonic() - 1)
    assert not done and searches.of == []
    assert said == [
        f"the time is up; what was found is in {tmp_path / file_name(DEVICE)}, and the same command goes on from there"
    ]
    assert run([model()], [1], until=time.monotonic() + 60)[0]
    # What is complete needs no time.
    assert run([model()], [1], until=time.monotonic() - 1)[0]


def test_a_torn_table_is_refused_and_left_as_it_is(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / file_name(DEVICE)
    path.write_text('{"version": 3, "dev')
    with pytest.raises(TableError, match="is torn"):
        run([model()], [1])
    assert path.read_text() == '{"version": 3, "dev'


@pytest.mark.parametrize(("complete", "code"), [(True, 0), (False, 3)])
def test_the_command_says_by_its_status_whether_it_was_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, complete: bool, code: int
) -> None:
    from loader.bench import tuning

    asked: dict[str, Any] = {}

    def tune(models: list[Model], tokens: list[int], *, shown: Shown, **options: Any) -> bool:
        asked.update(options, models=[one.format for one in models], tokens=tokens)
        shown.say("found it")
        return complete

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(cli, "_require_gpu", lambda: None)
    turn = Turn(tmp_path / "lock")
    monkeypatch.setattr(Turn, "of_device", lambda **_: turn)
    arguments = ["--shape", "kimi-k2.5", "--tp", "8", "--format", "bf16,mxfp4", "--tokens", "1, 16"]
    done = CliRunner().invoke(
        cli.tune_command,
        [*arguments, "--tables", str(tmp_path), "--most", "5", "--seconds", "60", "--again", "--seed", "3"],
    )
    assert done.exit_code == code
    assert done.output == "found it\n"
    assert (asked["models"], asked["tokens"], asked["most"]) == (["bf16", "mxfp4"], [1, 16], 5)
    assert (asked["folder"], asked["again"], asked["seed"], asked["left"]) == (tmp_path, True, 3, turn.left)
    assert 50 < asked["until"] - time.monotonic() <= 60


def test_a_person_at_a_terminal_sees_where_the_search_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown(2) as bar:
        bar.point("kimi-k2.5 tp 8 bf16, 16 tokens")
        for _ in range(3):
            bar.tried()
        bar._bar.refresh()
        bar.say("kimi-k2.5 tp 8 bf16, 16 tokens: 289 us")
        bar.found()
        bar._bar.refresh()
    out, err = capsys.readouterr()
    assert out == "kimi-k2.5 tp 8 bf16, 16 tokens: 289 us\n"
    seen = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", err)
    assert "bf16, 16 tokens" in seen and "0/2 3 settings timed" in seen and "1/2" in seen


def test_without_a_terminal_there_are_only_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(2) as quiet:
        quiet.point("a")
        quiet.tried()
        quiet.say("found")
        quiet.found()
    assert capsys.readouterr() == ("found\n", "")
