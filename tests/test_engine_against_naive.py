"""The engine against the naive interpreter, on random rule sets and facts; and the promise on the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gatekeeper.decide import decide
from gatekeeper.facts import from_record
from gatekeeper.load import parse_rule_set
from tests.naive import naive_decide
from tests.promise import assert_facts_kept, assert_kept
from tests.small import FACTS
from tests.strategies import files_of, hide, records, rule_sets

Decided = Mapping[str, Any]
Check = Callable[[st.DataObject], None]

COMPARED = ("state", "option", "outputs", "decided_by")


def engine_decide(
    files: Mapping[str, str], overlays: Sequence[Mapping[str, str]], *lines: Mapping[str, Any]
) -> list[list[dict[str, Any]]]:
    """What the engine says to each line of facts, as its JSON form has it, sorted by feature."""
    rules = parse_rule_set(files, overlays)
    answers = []
    for line in lines:
        with capture_logs():  # thousands of events would bury a failing example
            decisions = decide(rules, from_record(rules.catalogue, dict(line)))
        answers.append([decisions[name].to_json() for name in sorted(decisions)])
    return answers


def essence(decided: Decided, *, layer: bool = False) -> dict[str, Any]:
    """What both must agree on, of a feature or of one of its layers."""
    kept = {key: decided[key] for key in COMPARED}
    if layer:
        return {"index": decided["index"], "role": decided["role"], **kept}
    kept |= {key: decided[key] for key in ("feature", "gate", "mode", "would_be", "requested")}
    if decided["state"] == "mixed":
        del kept["outputs"]  # given by layer only: nothing to compare
    if decided["layers"]:
        return kept | {"layers": [essence(each, layer=True) for each in decided["layers"]]}
    if decided["decided_by"] == "no-gate" or (
        decided["decided_by"] in ("request", "layers") and decided["state"] != "pending"
    ):
        return kept  # whether requirements were looked at all the same is a matter of the report
    return kept | {"outcomes": [(one["id"], one["state"], one["resolves_at"]) for one in decided["outcomes"]]}


LINES = 4
"""Lines of facts to each rule set: to draw and to load one takes longest."""


def engine_agrees(data: st.DataObject) -> None:
    rules, files, overlays = data.draw(rule_sets())
    lines = []
    for _ in range(LINES):
        record = data.draw(records(rules, complete=data.draw(st.booleans())))
        lines.append(data.draw(hide(record, rules)) if data.draw(st.booleans()) else record)
    show(files, overlays, *lines)

    for line, engine in zip(lines, engine_decide(files, overlays, *lines), strict=True):
        naive = naive_decide(rules, line)
        assert [essence(decided) for decided in engine] == [essence(decided) for decided in naive], line


def engine_keeps_the_promise(data: st.DataObject) -> None:
    rules, files, overlays = data.draw(rule_sets())
    lines = []
    for _ in range(LINES):
        record = data.draw(records(rules, complete=data.draw(st.booleans())))
        lines += [data.draw(hide(record, rules)), record]
    show(files, overlays, *lines)

    answers = engine_decide(files, overlays, *lines)
    for fewer, more in zip(answers[::2], answers[1::2], strict=True):
        for before, after in zip(fewer, more, strict=True):
            assert_kept(before, after)
            assert_facts_kept(before, after)


def show(files: Mapping[str, str], overlays: Sequence[Mapping[str, str]], *lines: Mapping[str, Any]) -> None:
    for number, folder in enumerate([files, *overlays]):
        for path, text in folder.items():
            note(f"--- {path}{f' of overlay {number}' if number else ''}\n{text}")
    for line in lines:
        note(f"--- facts\n{line}")


# What random search found, or would need long to find: a rule set, and facts of which the second lines say more.

ALPHA: dict[str, Any] = {"feature": "alpha", "summary": "A feature."}
BETA: dict[str, Any] = {"feature": "beta", "summary": "Another one."}
NUMBERED = {"id": "numbered", "protects": "correctness", "that": {"model.n": 1}, "reason": "It is {model.n}."}
ASKS = {"id": "asks", "protects": "correctness", "reason": "It is {feature.alpha.state}."}
OF_FAMILY = {"feature": "alpha", "mode": "enforce", "applies_to": {"model.family": "x"}, "requires": [NUMBERED]}
EVERY_LAYER = {"every_layer": {"that": {"quant.method": {"matches": "*"}}}}

FOUND: dict[str, tuple[Sequence[Any], Sequence[Any], Any, Any]] = {
    "an error without a list of layers may turn out to be off": (
        [
            {**ALPHA, "scope": "layer", "requires": [{**NUMBERED, "on_failure": "error"}]},
            {**BETA, "requires": [{**ASKS, "that": {"feature.alpha.state": "error"}}]},
        ],
        [],
        {"facts": {"model.n": 2}},
        {"facts": {"model.n": 2}, "layers": []},
    ),
    "a forced error without layers is off if the gate ignores the request": (
        [
            {**ALPHA, "scope": "layer", "request": {"force": "server.force"}},
            {**BETA, "requires": [{**ASKS, "that": {"feature.alpha.state": "error"}}]},
        ],
        [{**OF_FAMILY, "request": "ignored"}],
        {"facts": {"server.force": True}, "layers": []},
        {"facts": {"server.force": True, "model.family": "x"}, "layers": []},
    ),
    "a gate that may enforce what the feature keeps in the shadow": (
        [{**ALPHA, "mode": "shadow"}, {**BETA, "requires": [{**ASKS, "that": {"feature.alpha.state": "off"}}]}],
        [OF_FAMILY],
        {"facts": {"model.n": 1}},
        {"facts": {"model.n": 1, "model.family": "x"}},
    ),
    "an unknown request of a feature in the shadow": (
        [
            {**ALPHA, "mode": "shadow", "request": "server.backend", "options": [{"option": "one"}]},
            {**BETA, "requires": [{**ASKS, "that": {"feature.alpha.option": {"absent": True}}}]},
        ],
        [],
        {"facts": {}},
        {"facts": {"server.backend": "one"}},
    ),
    "an unknown list of layers is known with the checkpoint": (
        [{**ALPHA, "requires": [{**NUMBERED, "that": EVERY_LAYER}]}],
        [],
        {"facts": {}},
        {"facts": {"quant.method": "fp8"}},
    ),
    "a record of which only a null is known may be absent as a whole": (
        [{**ALPHA, "scope": "layer", "requires": [{**NUMBERED, "that": {"not": {"layer.one": {"absent": True}}}}]}],
        [],
        {"facts": {}, "layers": [{"layer.index": 0, "layer.one": {"width": None}}]},
        {"facts": {}, "layers": [{"layer.index": 0, "layer.one": {"width": None, "format": None}}]},
    ),
    "nothing is open about an empty list of layers": (
        [{**ALPHA, "requires": [{**NUMBERED, "when": {"model.family": "x"}, "that": EVERY_LAYER}]}],
        [],
        {"facts": {}, "layers": []},
        {"facts": {"quant.method": "fp8"}, "layers": []},
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_found(case: str) -> None:
    features, gates, fewer, more = FOUND[case]
    rules = {
        "manifest": {"name": "found", "version": "1", "language": 1},
        "features": {feature["feature"]: feature for feature in features},
        "gates": gates,
    }
    files = {**files_of(rules), "facts/facts.yaml": FACTS}
    catalogue = yaml.safe_load(FACTS)

    before, after = engine_decide(files, [], fewer, more)

    for line, engine in ((fewer, before), (more, after)):
        naive = naive_decide({**rules, **catalogue}, line)
        assert [essence(decided) for decided in engine] == [essence(decided) for decided in naive]
    for one, other in zip(before, after, strict=True):
        assert_kept(one, other)
        assert_facts_kept(one, other)


PROPERTIES = pytest.mark.parametrize("holds", [engine_agrees, engine_keeps_the_promise])
# A rule set is a large thing to draw; what is left to watch is the profile's number of examples.
DRAWS_MUCH = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@PROPERTIES
@DRAWS_MUCH
@given(data=st.data())
def test_engine(holds: Check, data: st.DataObject) -> None:
    holds(data)


@pytest.mark.slow_property
@PROPERTIES
@DRAWS_MUCH
@given(data=st.data())
def test_engine_at_length(holds: Check, data: st.DataObject) -> None:
    holds(data)
