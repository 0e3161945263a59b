"""Whether a condition can hold: what is said is checked against every value of a wide grid."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekeeper.analysis import cases
from gatekeeper.analysis.cases import can_hold
from gatekeeper.compile import compile_condition
from gatekeeper.conditions import Condition, ConditionParser, facts_of
from gatekeeper.errors import Fault
from gatekeeper.source import parse_yaml
from gatekeeper.values import ABSENT, Arch, Version
from tests.small import rules

CATALOGUE = rules().catalogue


def parsed(text: str) -> Condition:
    faults: list[Fault] = []
    document = parse_yaml(text, "x.yaml")
    condition = ConditionParser(CATALOGUE, {}, faults).parse(document, document.data, ())
    assert faults == []
    return condition


@pytest.mark.parametrize(
    ("condition", "answer"),
    [
        ("{}", True),
        ("{model.n: 3}", True),
        ("{model.n: 0}", False),  # its minimum is 1
        ("{model.n: {lt: 1}}", False),
        ("{model.n: {gt: 3, lt: 4}}", False),
        ("{model.n: {gt: 3, lt: 5}}", True),
        ("{model.rate: {gt: 3, lt: 4}}", True),
        ("{model.n: {divisible_by: 128}, not: {model.n: {divisible_by: 64}}}", False),
        ("{model.n: {divisible_by: 64}, not: {model.n: {divisible_by: 128}}}", True),
        ("{model.n: {divisible_by: 6, gt: 12, lt: 18}}", False),
        ("{model.n: {divisible_by: 6, ge: 12, lt: 18}}", True),
        ("{model.rate: {divisible_by: 2}}", None),
        ("{model.n: {absent: true}}", True),
        ("{model.m: {absent: true}}", False),  # it has a default
        ("{model.n: {absent: true, ne: 3}}", True),
        ("{model.n: {absent: true, eq: 3}}", False),
        ("{model.runner: [target, draft]}", True),
        ("{not: {model.runner: [target, draft]}, model.runner: {absent: false}}", False),
        ("{all: [{model.family: a}, {model.family: b}]}", False),
        ("{model.family: {not_in: [a, b]}}", True),
        ("{any: [{model.n: 0}, {model.m: 2}]}", True),
        ("{model.n: {lt: {fact: model.m}}, model.m: {lt: {fact: model.n}}}", False),
        ("{model.n: {lt: {fact: model.m}}, model.m: {lt: 3}}", True),
        ("{model.n: {lt: {fact: model.m}}, model.m: {lt: 2}}", False),
        ("{model.n: {fact: model.m}, all: [{model.n: 3}, {model.m: 4}]}", False),
        ("{library.torch: {ge: '2.10', lt: '2.10.1'}}", True),
        ("{library.torch: {gt: '2.10', lt: '2.9'}}", False),
        ("{library.torch: {eq: '2.10.0', ne: '2.10'}}", False),
        ("{platform.arch: {ge: sm90, lt: sm100}, not: {platform.arch: [sm90, sm91]}}", True),
        ("{platform.arch: {gt: sm90, lt: sm91}}", False),
        ("{platform.arch: {ge: sm90}, all: [{platform.arch: gfx942}]}", False),
        ("{platform.arch: {ge: gfx942}}", None),
        ("{model.double: 3}", None),  # the search does not follow what it is derived from
        ("{model.double: {gt: 3, lt: 4}}", False),
        ("{model.tags: {contains: a}}", None),
        ("{model.tags: {contains: a, absent: true}}", False),
        ("{all: [{model.tags: {contains: a}}, {not: {model.tags: {contains: a}}}]}", False),
        ("{model.sizes: {every_item: {eq: {fact: model.n}}}, model.n: {absent: true}}", None),
        ("{model.family: {matches: 'a.*'}, all: [{model.family: {absent: true}}]}", False),
        ("{layer.one: {fact: layer.two}, all: [{layer.one.format: a}, {layer.two.format: b}]}", False),
        ("{layer.one: {fact: layer.two}, layer.one.format: a}", True),
        ("{layer.one: {absent: true}, layer.one.format: a}", False),
        ("{every_layer: {that: {layer.size: {gt: 3, lt: 4}}}}", False),
        ("{any_layer: {where: {layer.role: mtp}, that: {layer.role: main}}}", False),
        ("{any_layer: {that: {layer.size: 3}}}", None),
    ],
)
def test_what_can_hold(condition: str, answer: bool | None) -> None:
    assert can_hold(parsed(condition), CATALOGUE) is answer


def test_a_search_that_takes_too_long_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    condition = parsed("{model.n: {gt: 3, lt: 4}}")
    assert can_hold(condition, CATALOGUE) is False
    monkeypatch.setattr(cases, "MAX_STEPS", 1)
    assert can_hold(condition, CATALOGUE) is None
    wide = ", ".join(f"{{model.n: {{divisible_by: {prime}}}}}" for prime in (101, 103, 107, 109, 113, 127, 131))
    assert can_hold(parsed(f"{{all: [{wide}], model.n: {{lt: 9}}}}"), CATALOGUE) is None


# A condition of these facts and constants is judged by all the values below, which lie within, between and beyond.
_TESTS: dict[str, list[Any]] = {
    "model.n": [2, 5, {"gt": 2}, {"lt": 5}, {"ge": 4}, {"divisible_by": 2}, {"divisible_by": 3}, {"absent": True}],
    "model.m": [{"fact": "model.n"}, {"gt": {"fact": "model.n"}}, {"le": 3}, [1, 4], {"ne": 4}],
    "model.rate": [{"ge": 2.5}, {"lt": {"fact": "model.n"}}, 4, {"absent": False}],
    "model.family": ["a", ["a", "b"], {"ne": "b"}, {"fact": "quant.method"}, {"matches": "*"}],
    "quant.method": ["b", {"not_in": ["a", "c"]}],
    "library.torch": [{"ge": "2.10"}, {"lt": "2.11"}, "2.10.1"],
    "platform.arch": [["sm90", "sm100"], {"ge": "sm90"}, {"lt": "sm100"}, {"gt": "gfx942"}],
    "server.force": [True, {"ne": True}],
}
_VALUES: dict[str, list[Any]] = {
    "model.n": [1, 2, 3, 4, 5, 6, 7, 12, 13, ABSENT],
    "model.m": [-1, 0, 1, 2, 3, 4, 5, 6, 8, 14],
    "model.rate": [-0.5, 2.5, 2.6, 3, 4, 4.5, 99.5, ABSENT],
    "model.family": ["a", "b", "c", "other", "other.one", ABSENT],
    "quant.method": ["a", "b", "c", "other"],
    "library.torch": [*map(Version, ["0", "2.9", "2.10", "2.10.0.1", "2.10.1", "2.10.9", "2.11", "3"]), ABSENT],
    "platform.arch": [*map(Arch, ["sm89", "sm90", "sm90a", "sm95", "sm100", "sm120", "gfx942", "gfx950"]), ABSENT],
    "server.force": [True, False],
}
_ATOMS = [{fact: test} for fact, tests in _TESTS.items() for test in tests]
_conditions = st.recursive(
    st.sampled_from(_ATOMS),
    lambda inner: st.one_of(
        st.builds(lambda parts: {"all": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda parts: {"any": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda part: {"not": part}, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(data=st.data(), raw=_conditions)
def test_what_is_said_never_to_hold_never_holds(data: st.DataObject, raw: dict[str, Any]) -> None:
    condition = parsed(json.dumps(raw))
    if can_hold(condition, CATALOGUE) is False:
        closure = compile_condition(condition, CATALOGUE)
        for _ in range(40):
            values = {name: data.draw(st.sampled_from(_VALUES[name])) for name in sorted(facts_of(condition))}
            assert closure(values) is not True, values


@settings(max_examples=300)
@given(
    raw=st.lists(st.sampled_from([{f: t} for f in ("model.n", "model.m", "model.rate") for t in _TESTS[f]]), max_size=4)
)
def test_on_numbers_the_search_finds_what_a_grid_finds(raw: list[dict[str, Any]]) -> None:
    condition = parsed(json.dumps({"all": raw}))
    closure = compile_condition(condition, CATALOGUE)
    grid = [
        {"model.n": n, "model.m": m, "model.rate": rate}
        for n in _VALUES["model.n"]
        for m in _VALUES["model.m"]
        for rate in _VALUES["model.rate"]
    ]
    assert can_hold(condition, CATALOGUE) is any(closure(values) for values in grid)
