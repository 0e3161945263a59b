"""Generated functions: three-valued meaning on small cases, the lean call beside `decide`, how they are made."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatekeeper import ABSENT, UNKNOWN, decide, from_record, load_rules, parse_rule_set
from gatekeeper.compile import compile_condition
from gatekeeper.compile_gate import compile_truths, formula
from gatekeeper.conditions import All, Any_, Condition, FactRef, Not
from gatekeeper.conditions import Test as Atom
from gatekeeper.decide import decide_again
from gatekeeper.feature_facts import came_to
from gatekeeper.lean import CompiledFeature
from gatekeeper.log import quiet
from gatekeeper.rules import RuleSet
from gatekeeper.values import Arch, Version
from tests.small import decision, files, rules

SMALL = rules()
ROOT = Path(__file__).resolve().parent.parent
WHERE = SMALL.features["fused"].where
VALUES: dict[str, list[Any]] = {"model.n": [4, ABSENT, None], "model.m": [4, 5, ABSENT, None]}


def atom(fact: str, operator: str, operand: Any) -> Atom:
    return Atom(fact, operator, operand, WHERE, (operand.name,) if isinstance(operand, FactRef) else ())


ATOMS = [
    atom("model.n", "eq", 4),
    atom("model.n", "ne", 4),
    atom("model.n", "in", (3, 4)),
    atom("model.n", "not_in", (3, 5)),
    atom("model.n", "ge", 4),
    atom("model.n", "lt", 4),
    atom("model.n", "divisible_by", 2),
    atom("model.n", "absent", True),
    atom("model.n", "absent", False),
    atom("model.n", "eq", FactRef("model.m")),
    atom("model.n", "ne", FactRef("model.m")),
    atom("model.m", "gt", FactRef("model.n")),
]
HOLDS = {
    "eq": lambda a, b: a == b,
    "in": lambda a, b: a in b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "gt": lambda a, b: a > b,
    "divisible_by": lambda a, b: a % b == 0,
}


def meaning(condition: Condition, values: Mapping[str, Any]) -> bool | None:
    """The design's table and strong Kleene, word by word."""
    if isinstance(condition, Not):
        inner = meaning(condition.part, values)
        return None if inner is None else not inner
    if isinstance(condition, All | Any_):
        decisive = isinstance(condition, Any_)
        found = [meaning(part, values) for part in condition.parts]
        return decisive if decisive in found else None if None in found else not decisive
    assert isinstance(condition, Atom)
    left = values.get(condition.fact)
    if condition.operator == "absent":
        return None if left is None else (left is ABSENT) == condition.operand
    operator = {"ne": "eq", "not_in": "in"}.get(condition.operator, condition.operator)
    right = values.get(condition.operand.name) if isinstance(condition.operand, FactRef) else condition.operand
    if left is ABSENT or right is ABSENT:
        truth = False
    elif left is None or right is None:
        return None
    else:
        truth = HOLDS[operator](left, right)
    return truth != (operator != condition.operator)


def cases() -> Iterator[dict[str, Any]]:
    for values in product(*VALUES.values()):
        yield {name: value for name, value in zip(VALUES, values, strict=True) if value is not None}


def conditions() -> st.SearchStrategy[Condition]:
    def deeper(inner: st.SearchStrategy[Condition]) -> st.SearchStrategy[Condition]:
        parts = st.lists(inner, max_size=3).map(tuple)
        return st.one_of(parts.map(All), parts.map(Any_), inner.map(Not))

    return st.recursive(st.sampled_from(ATOMS), deeper, max_leaves=8)


@pytest.mark.parametrize("one", ATOMS, ids=lambda one: f"{one.fact} {one.operator} {one.operand}")
def test_an_atomic_test_on_every_small_case(one: Atom) -> None:
    for values in cases():
        assert compile_condition(one, SMALL.catalogue)(values) is meaning(one, values), values


@given(conditions())
def test_a_condition_on_every_small_case(condition: Condition) -> None:
    function = compile_condition(condition, SMALL.catalogue)
    for values in cases():
        assert function(values) is meaning(condition, values), values


@given(conditions(), conditions())
def test_a_requirement_is_not_when_or_that(when: Condition, that: Condition) -> None:
    one = replace(SMALL.gates["fused"][0].requires[0], when=when, that=that)
    truths = compile_truths([one], SMALL.catalogue)
    for values in cases():
        holds = meaning(Any_((Not(when), that)), values)
        assert truths(values) == [(meaning(when, values), holds)]
        assert compile_condition(formula(one), SMALL.catalogue)(values) is holds


def test_a_fact_is_compared_with_architectures_and_versions_by_what_makes_them_equal() -> None:
    small = rules(
        """\
        feature: fused
        summary: One thing.
        requires:
          - {id: arch, protects: speed, that: {platform.arch: [sm90, sm100]}, reason: "It is {platform.arch}."}
          - {id: torch, protects: speed, that: {library.torch: "2.10"}, reason: "It is {library.torch}."}
          - {id: old, protects: speed, that: {library.torch: {ne: "2.9"}}, reason: "It is {library.torch}."}
        """
    )
    lean = CompiledFeature(small, "fused")
    for arch, torch, states in (
        (Arch("sm90"), Version("2.10.0+cpu"), ["passed", "passed", "passed"]),
        (Arch("sm80"), Version("2.9"), ["failed", "failed", "failed"]),
        (ABSENT, ABSENT, ["failed", "failed", "passed"]),
    ):
        values = {"platform.arch": arch, "library.torch": torch}
        assert [one[1] for one in lean.reasons(values)] == states
    assert [one[1] for one in lean.reasons({})] == ["unknown"] * 3


SHIPPED = load_rules()


def records_of(small: RuleSet, name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Lines of facts that a feature's decision reads, one layer in each."""
    from tests.test_promise_shipped import BY_TYPE, FUSES, STORAGES

    facts: dict[str, st.SearchStrategy[Any]] = {}
    layer: dict[str, st.SearchStrategy[Any]] = {}
    for fact in small.catalogue.inputs(small.catalogue.decided_from[name]):
        spec = small.catalogue[fact]
        if fact.startswith("feature.") or fact == "model.runner" or (spec.derive is not None and not spec.from_):
            continue
        if fact.startswith("layer."):
            if fact in ("layer.routed_storage", "layer.shared_storage"):
                layer[fact] = st.sampled_from(STORAGES)
            continue
        known = [*(spec.values or spec.known_values or BY_TYPE.get(spec.type, [])), None]
        usual = [FUSES[fact]] * (3 * len(known)) if fact in FUSES else []
        facts[fact] = st.sampled_from([*usual, *known])
    return st.fixed_dictionaries(
        {
            "facts": st.fixed_dictionaries({}, optional=facts),
            "layers": st.fixed_dictionaries({"layer.index": st.just(3)}, optional=layer).map(lambda one: [one]),
        }
    )


@pytest.mark.parametrize("name", list(SHIPPED.features))
@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_lean_call_says_what_decide_says(name: str, data: st.DataObject) -> None:
    record = data.draw(records_of(SHIPPED, name))
    facts = from_record(SHIPPED.catalogue, json.loads(json.dumps(record)))
    with quiet():
        decided = decide(SHIPPED, facts)
    whole = decided[name]
    (own,) = facts.runner_layer_values or ({},)
    by_layer = SHIPPED.features[name].scope == "layer"
    values = {**facts.values, **own} if by_layer else dict(facts.values)
    for other, made in decided.items():
        # What gates see of other features is for the caller to give.
        model, layers = came_to(made, SHIPPED.features[other].outputs)
        seen = layers[0] if by_layer and layers else model
        values |= {fact: one.value for fact, one in seen.items() if one.value is not UNKNOWN}
    lean = CompiledFeature(SHIPPED, name)
    assert lean.choice(values) == (whole.state, whole.option)
    assert lean.state(values) == whole.state
    found = [(id_, state, reason) for id_, state, reason, _ in lean.reasons(values)]
    assert found == [(one.id, one.state, one.reason) for one in whole.outcomes]


CHOICE = """\
feature: fused
summary: One thing instead of two.
request: {request}
outputs: {{size: {{type: integer, value: {{fact: model.n}}, else: 0}}}}
"""
GATE = """\
feature: fused
applies_to: {{model.family: x}}
request: {asks}
on_failure: {on_failure}
requires:
  - {{id: hard, protects: correctness, that: {{model.m: {{ge: 2}}}}, on_failure: {on_failure}, reason: "{{model.m}}."}}
  - {{id: soft, protects: support, that: {{model.m: {{ge: 3}}}}, on_failure: {on_failure}, reason: "{{model.m}}."}}
options:
  - option: wide
    requires:
      - {{id: wide-hard, protects: correctness, that: {{engine.name: a}}, reason: "Is {{engine.name}}."}}
      - {{id: wide-soft, protects: speed, that: {{server.extra: a}}, reason: "Is {{server.extra}}."}}
  - option: narrow
    outputs: {{size: 1}}
    requires: [{{id: narrow-hard, protects: correctness, that: {{engine.backend: a}}, reason: "{{engine.backend}}."}}]
"""
FLAGS = [{}, {"server.force": None, "server.forbid": None}, {"server.force": True, "server.forbid": False}]
FLAGS += [{"server.force": None}, {"server.force": True}, {"server.forbid": True}]
WORDS = [{}, *({"server.backend": word} for word in (None, "on", "off", "wide", "narrow", "other"))]


@pytest.mark.parametrize("on_failure", ["off", "error"])
@pytest.mark.parametrize("asks", ["honoured", "ignored", "required"])
@pytest.mark.parametrize("request_", ["{force: server.force, forbid: server.forbid}", "server.backend"])
def test_the_lean_call_on_every_way_of_asking(request_: str, asks: str, on_failure: str) -> None:
    gate = GATE.format(asks=asks, on_failure=on_failure)
    if asks == "honoured":
        gate = gate.replace("request: honoured\n", "")
    small = parse_rule_set(
        files({"features/fused.yaml": CHOICE.format(request=request_), "gates/fused/fused.yaml": gate})
    )
    lean = CompiledFeature(small, "fused")
    domain = {
        "model.family": ["x"],
        "model.n": [1, "", None],
        "model.m": [1, 2, 3, ""],
        "engine.name": ["a", "b", ""],
        "engine.backend": ["a", "b", ""],
        "server.extra": ["a", "b", ""],
    }
    seen = set()
    elsewhere = [("y", *[""] * 5), ("", 1, 3, "a", "a", "a")]
    for values in [*product(*domain.values()), *elsewhere]:
        known = {name: value for name, value in zip(domain, values, strict=True) if value != ""}
        for asked in FLAGS if "force" in request_ else WORDS:
            facts = from_record(small.catalogue, {"facts": {**known, **asked}})
            whole = decide_again(small, "fused", facts)
            assert lean.choice(facts.values) == (whole.state, whole.option), (known, asked)
            if whole.outcomes:
                states = [(one.id, one.state, one.reason) for one in whole.outcomes]
                assert [one[:3] for one in lean.reasons(facts.values)] == states, (known, asked)
            seen.add(whole.state)
    assert seen >= {"on", "off", "pending"}


def test_the_generator_is_short_and_runs_no_text() -> None:
    for name in ("compile.py", "compile_gate.py"):
        text = (ROOT / "gatekeeper" / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) < 200
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        assert not called & {"exec", "eval", "__import__"}
        for node in calls:
            if isinstance(node.func, ast.Attribute):
                assert (ast.unparse(node.func)) not in ("ast.parse", "ast.literal_eval")
            if isinstance(node.func, ast.Name) and node.func.id == "compile":
                assert ast.unparse(node.args[0]) == "module"


def test_nothing_is_compiled_before_it_is_asked() -> None:
    small = rules()
    catalogue = parse_rule_set(files()).catalogue
    assert not catalogue.compiled
    compile_condition(small.gates["fused"][0].requires[0].that, catalogue)
    assert len(catalogue.compiled) == 1


def test_every_layer_over_no_layer_says_so() -> None:
    found = decision(
        """\
        feature: fused
        summary: One thing.
        requires:
          - id: all-big
            protects: speed
            that: {every_layer: {where: {layer.size: {gt: 4}}, that: {layer.one.format: bf16}}}
            reason: Not all are.
        """,
        layers=[{"layer.index": 1, "layer.size": 3}],
    )
    (outcome,) = found.outcomes
    assert outcome.state == "failed"
    assert [check.note for check in outcome.checks][
        -1
    ] == "no MoE layer meets `where`, so there is nothing to vouch for"


def test_any_layer_over_no_layer_says_so() -> None:
    found = decision(
        """\
        feature: fused
        summary: One thing.
        requires:
          - {id: one-big, protects: speed, that: {any_layer: {that: {layer.size: {gt: 4}}}}, reason: None is.}
        """,
        layers=[],
    )
    (outcome,) = found.outcomes
    assert [(check.fact, check.truth, check.note) for check in outcome.checks] == [
        ("layer.size", False, "there is no MoE layer")
    ]
