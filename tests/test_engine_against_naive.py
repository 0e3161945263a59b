"""The engine against the naive interpreter, on random rule sets and facts; and the promise on the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gatekeeper.decide import decide
from gatekeeper.facts import from_record
from gatekeeper.load import parse_rule_set
from tests.naive import naive_decide
from tests.promise import assert_kept
from tests.strategies import hide, records, rule_sets

Decided = Mapping[str, Any]
Check = Callable[[st.DataObject], None]

COMPARED = ("state", "option", "outputs", "decided_by")


def engine_decide(files: Mapping[str, str], *lines: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """What the engine says to each line of facts, as its JSON form has it, sorted by feature."""
    rules = parse_rule_set(dict(files))
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
    kept |= {"feature": decided["feature"], "would_be": decided["would_be"], "requested": decided["requested"]}
    if decided["state"] == "mixed":
        del kept["outputs"]  # given by layer only: nothing to compare
    if decided["layers"]:
        return kept | {"layers": [essence(each, layer=True) for each in decided["layers"]]}
    if decided["decided_by"] == "no-gate" or (
        decided["decided_by"] in ("request", "layers") and decided["state"] != "pending"
    ):
        return kept  # whether requirements were looked at all the same is a matter of the report
    return kept | {"outcomes": [(outcome["id"], outcome["state"]) for outcome in decided["outcomes"]]}


def engine_agrees(data: st.DataObject) -> None:
    rules, files = data.draw(rule_sets())
    record = data.draw(records(rules, complete=data.draw(st.booleans())))
    if data.draw(st.booleans()):
        record = data.draw(hide(record, rules))
    for path, text in files.items():
        note(f"--- {path}\n{text}")
    note(f"--- record\n{record}")

    (engine,) = engine_decide(files, record)

    assert [essence(decided) for decided in engine] == [essence(decided) for decided in naive_decide(rules, record)]


def engine_keeps_the_promise(data: st.DataObject) -> None:
    rules, files = data.draw(rule_sets())
    record = data.draw(records(rules, complete=data.draw(st.booleans())))
    hidden = data.draw(hide(record, rules))

    fewer, more = engine_decide(files, hidden, record)

    for before, after in zip(fewer, more, strict=True):
        assert_kept(before, after)


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
