"""Changes that turn a feature on: each proven by deciding again, none smaller left out, none outside `controllable`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from gatekeeper import Decision, RuleSet, decide, from_record, load_rules, parse_rule_set
from gatekeeper.analysis.changes import Change, Found, turn_on
from gatekeeper.decide import decide_again
from gatekeeper.errors import FactError
from gatekeeper.facts import Facts
from gatekeeper.log import quiet
from gatekeeper.values import plain
from tests.strategies import files_of, records, rule_sets, to_yaml
from tests.test_promise_shipped import loads

Record = Mapping[str, Any]
Combination = tuple[tuple[str, Any], ...]
"""Facts with the values that they are set to; `UNSET` takes one back."""
UNSET = "(unset)"


def search(rules: RuleSet, record: Record, feature: str) -> tuple[Decision, Found]:
    with quiet():
        facts = from_record(rules.catalogue, record)
        found = decide(rules, facts, [feature])[feature]
        return found, turn_on(rules, facts, found, partial(decide_again, rules, feature))


# ------------------------------------------------------------------------------------------- the oracle: brute force


def changed(record: Record, combination: Combination) -> Record:
    """The record as an operator would write it after a change."""
    result = copy.deepcopy(dict(record))
    for name, value in combination:
        if value == UNSET:
            del result["facts"][name]
        else:
            result["facts"][name] = value
        if name in result.get("unknown", ()):
            result["unknown"] = [one for one in result["unknown"] if one != name]
    return result


def decided(rules: RuleSet, record: Record, feature: str) -> Decision | None:
    try:
        facts = from_record(rules.catalogue, record)
        with quiet():
            return decide(rules, facts, [feature])[feature]
    except FactError:
        return None


def waived(found: Decision) -> set[str]:
    scopes = [(found.option, found.outcomes), *((one.option, one.outcomes) for one in found.layers or ())]
    return {one.id for option, outcomes in scopes for one in outcomes
            if one.state == "waived" and one.option in (None, option)}  # fmt: skip


def choices(rules: RuleSet, facts: Facts, record: Record) -> dict[str, list[Any]]:
    """Every fact that can be changed, with every value that would be another."""
    result = {}
    for name, spec in rules.catalogue.items():
        if spec.controllable:
            now = facts.reading(name).value
            values = [plain(value) for value in spec.controllable if value != now]
            if record["facts"].get(name) is not None:
                back = from_record(rules.catalogue, changed(record, ((name, UNSET),))).reading(name).value
                if rules.catalogue.inputs([name]) == {name}:
                    values = [value for value in values if spec.coerce(value) != back]
                values += [UNSET] if back != now else []
            result[name] = values
    return result


def combinations(values: Mapping[str, list[Any]], size: int) -> Iterator[Combination]:
    for names in itertools.combinations(sorted(values), size):
        for chosen in itertools.product(*(values[name] for name in names)):
            yield tuple(zip(names, chosen, strict=True))


def spelled_out(change: Change) -> set[Combination]:
    """Every combination that a change stands for."""
    axes = [
        [(one.axis, plain(value)) for value in one.values] + [(one.axis, UNSET)] * one.unset for one in change.settings
    ]
    return {tuple(sorted(chosen)) for chosen in itertools.product(*axes)}


# -------------------------------------------------------------------------------------------------------- properties


def holds(rules: RuleSet, record: Record, feature: str, *, brute: int) -> None:
    """Check what was found against brute force over sets of up to `brute` settings."""
    before, found = search(rules, record, feature)
    note(f"{before.state} by {before.decided_by}: {[str(one) for one in found.changes]}")
    if before.state == "on" and not before.degraded:
        return
    facts = from_record(rules.catalogue, record)
    allowed = choices(rules, facts, record)
    for change in found.changes:
        for combination in spelled_out(change):
            assert all(value in allowed[name] for name, value in combination), "outside `controllable`"
            after = decided(rules, changed(record, combination), feature)
            assert after is not None and after.state == "on"
            assert (after.option, after.degraded) == (change.option, change.degraded)
            assert waived(after) - waived(before) == set(change.waives)
    assert found.complete or found.size > brute
    sizes: dict[bool, int] = {}
    expected: dict[bool, set[Combination]] = {True: set(), False: set()}
    for size in range(1, brute + 1):
        for combination in combinations(allowed, size):
            after = decided(rules, changed(record, combination), feature)
            if after is None or after.state != "on" or (before.state == "on" and after.degraded):
                continue
            price = bool(after.degraded or waived(after) - waived(before))
            if sizes.setdefault(price, size) == size:
                expected[price].add(combination)
        if False in sizes:
            break
    for price in (False, True):
        told = {
            one
            for change in found.changes
            if bool(change.degraded or change.waives) is price
            for one in spelled_out(change)
        }
        assert {one for one in told if len(one) <= brute} == expected[price]
        assert not (expected[price] and any(len(one) > brute for one in told)), "larger than the smallest"


CONTROLLABLE: dict[str, list[Any]] = {
    "model.n": [2, 4],
    "model.m": [0, 3],
    "model.kind": ["a", "b"],
    "server.eplb": [True, False],
    "server.backend": ["auto", "a", "b"],
    "parallel.tp_size": [1, 2, 4],
    "quant.bits": [2, 3],
    "engine.backend": ["a", "b"],
}


@st.composite
def sometimes_controlled(draw: st.DrawFn) -> tuple[dict[str, str], dict[str, Any]]:
    """A random rule set of which an operator controls a few facts, and a line of facts."""
    rules, *_ = draw(rule_sets())
    asked = {
        name: True for name in rules["facts"] if name.startswith(("server.force_", "server.forbid_", "server.use_"))
    }
    possible = {name: values for name, values in (CONTROLLABLE | asked).items() if name in rules["facts"]}
    for name in draw(st.lists(st.sampled_from(sorted(possible)), min_size=1, max_size=5, unique=True)):
        rules["facts"][name]["controllable"] = possible[name]
    return files_of(rules), draw(records(rules))


FACTS_OF_OPERATORS = """\
facts:
  model.runner: {type: enum, values: [target, draft], doc: The runner., given_by: [caller]}
  model.n: {type: integer, doc: A number that nobody sets., given_by: [config]}
  platform.arch: {type: arch, doc: The architecture., given_by: [platform]}
  server.a: {type: boolean, default: false, controllable: true, doc: A switch., given_by: [flags]}
  server.b: {type: enum, values: [auto, x, y], default: auto, controllable: true, doc: A choice., given_by: [flags]}
  engine.b: {type: string, doc: What became of that choice., given_by: [engine]}
  parallel.p: {type: integer, minimum: 1, controllable: [1, 2, 4], doc: Ranks., given_by: [flags]}
  parallel.q: {type: integer, default: {derive: parallel.p * 2}, controllable: [1, 8], doc: Others., given_by: [flags]}
  parallel.pq: {type: integer, derive: "parallel.p * parallel.q if server.a else parallel.p", doc: Both.}
  server.force: {type: boolean, default: false, controllable: true, doc: Force it., given_by: [flags]}
  server.forbid: {type: boolean, default: false, controllable: true, doc: Forbid it., given_by: [flags]}
  server.use:
    {type: string, default: auto, controllable: [auto, on, off, best, second], doc: What to use., given_by: [flags]}
"""
ATOMS: list[dict[str, Any]] = [
    {"server.a": True}, {"server.a": False}, {"server.b": "x"}, {"server.b": ["auto", "y"]}, {"engine.b": "y"},
    {"parallel.p": [1, 2]}, {"parallel.p": 4}, {"parallel.q": {"ge": 4}}, {"parallel.pq": {"divisible_by": 8}},
    {"parallel.pq": {"lt": {"fact": "parallel.q"}}}, {"model.n": 4}, {"platform.arch": "sm90"},
]  # fmt: skip
OF_FIRST: list[dict[str, Any]] = [
    {"feature.first.state": "on"}, {"feature.first.state": "off"}, {"feature.first.outputs.width": {"ge": 2}},
]  # fmt: skip


@st.composite
def demands(draw: st.DrawFn, stem: str, atoms: list[dict[str, Any]], least: int, most: int) -> list[dict[str, Any]]:
    """Requirements that an operator can often do something about."""

    def condition() -> dict[str, Any]:
        one, other = draw(st.sampled_from(atoms)), draw(st.sampled_from(atoms))
        return draw(st.sampled_from([one, one, {"any": [one, other]}, {"all": [one, other]}, {"not": one}]))

    found = []
    for number in range(draw(st.integers(least, most))):
        body: dict[str, Any] = {
            "id": f"{stem}-{number}",
            "reason": "It does not hold.",
            "absent_passes": "because absent does no harm",
        }
        body["protects"] = draw(st.sampled_from(["correctness", "correctness", "support", "speed"]))
        body["that"] = condition()
        if draw(st.integers(0, 3)) == 0:
            body["when"] = draw(st.sampled_from(atoms))
        found.append(body)
    return found


@st.composite
def controlled(draw: st.DrawFn) -> tuple[dict[str, str], dict[str, Any]]:
    """A rule set whose facts an operator mostly controls, one feature on top of another; and a line of facts."""
    first: dict[str, Any] = {
        "feature": "first",
        "summary": "The first.",
        "requires": draw(demands("first", ATOMS, 1, 3)),
    }
    first["request"] = {"force": "server.force", "forbid": "server.forbid"}
    first["outputs"] = {"width": {"type": "integer", "value": {"fact": "parallel.pq"}, "else": 0}}
    second: dict[str, Any] = {"feature": "second", "summary": "What needs it.", "request": "server.use"}
    atoms = [*ATOMS, *OF_FIRST]
    if draw(st.booleans()):
        second["requires"] = draw(demands("second", atoms, 0, 2))
        second["options"] = [
            {"option": "best", "requires": draw(demands("best", atoms, 1, 2))},
            {"option": "second", "degraded": "Slower.", "requires": draw(demands("worse", atoms, 0, 2))},
        ]
        second["on_failure"] = draw(st.sampled_from(["off", "error"]))
    else:
        second["requires"] = draw(demands("second", atoms, 1, 4))
    facts: dict[str, Any] = {}
    for name, values in {
        "model.n": [4, 4, 5], "platform.arch": ["sm90", "sm90", "sm100"], "server.a": [True, False],
        "server.b": ["auto", "x", "y"], "engine.b": ["x", "y"], "parallel.p": [1, 2, 4, 8], "parallel.q": [1, 4, 8],
        "server.force": [False, True], "server.forbid": [False, True], "server.use": ["auto", "on", "off", "best"],
    }.items():  # fmt: skip
        if draw(st.booleans()):
            facts[name] = draw(st.sampled_from([*values, None]))
    texts = {"features/first.yaml": to_yaml(first), "features/second.yaml": to_yaml(second)}
    texts |= {"facts/all.yaml": FACTS_OF_OPERATORS, "ruleset.yaml": "{name: a, version: 1, language: 1}"}
    assumed = draw(st.sampled_from([["server", "parallel", "engine"], ["server", "engine"], ["server"], []]))
    return texts, {"facts": facts, "assume": assumed}


DRAWS_MUCH = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@DRAWS_MUCH
@given(drawn=controlled() | sometimes_controlled())
def test_changes_on_random_rule_sets(drawn: tuple[dict[str, str], dict[str, Any]]) -> None:
    texts, record = drawn
    for path, text in texts.items():
        note(f"--- {path}\n{text}")
    note(f"--- record\n{record}")
    rules = parse_rule_set(texts)
    for feature in rules.features:
        if decided(rules, record, feature) is not None:
            holds(rules, record, feature, brute=2)


SHIPPED = load_rules()


@settings(DRAWS_MUCH, max_examples=40)
@given(drawn=loads())
def test_changes_on_the_shipped_rules(drawn: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for record in drawn:
        note(f"--- record\n{record}")
        for feature in SHIPPED.features:
            holds(SHIPPED, record, feature, brute=1)


def test_the_random_rule_sets_reach_changes() -> None:
    """A property of changes that are never found is empty."""
    seen: set[str] = set()

    @settings(max_examples=120, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(drawn=controlled())
    def look(drawn: tuple[dict[str, str], dict[str, Any]]) -> None:
        rules = parse_rule_set(drawn[0])
        for feature in rules.features:
            before = decided(rules, drawn[1], feature)
            if before is None or before.state == "on":
                continue
            for change in search(rules, drawn[1], feature)[1].changes:
                seen.update([before.state, f"size {len(change.settings)}"])
                seen.update(["waives"] * bool(change.waives))
                seen.update(["unset"] * any(one.unset for one in change.settings))

    look()
    assert {"off", "pending", "error", "waives", "unset", "size 1", "size 2"} <= seen, seen
