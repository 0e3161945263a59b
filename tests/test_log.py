"""One event a feature, with stable keys; the level says whether somebody should look."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from gatekeeper import decide, from_record
from gatekeeper.log import MAX_ITEMS, feature_flag_attributes, quiet
from tests.small import FEATURE, rules
from tests.test_decide import BEST, CHOICE, GOOD, HEAD, LAYERED, NONE_ASKED, SAME, SWITCH

KEYS = {
    "event", "log_level", "feature", "gate", "runner", "state", "option", "decided_by", "reason", "failed", "waived",
    "facts", "digest", "rule_set",
}  # fmt: skip


def events(feature: str, **record: Any) -> list[dict[str, Any]]:
    small = rules(feature)
    with capture_logs() as found:
        decide(small, from_record(small.catalogue, record))
    return [dict(event) for event in found]


@pytest.mark.parametrize(
    ("feature", "facts", "level"),
    [
        (SWITCH, GOOD, "info"),
        (SWITCH, {**GOOD, "model.n": 5}, "info"),
        (SWITCH, {}, "info"),
        (SWITCH, {**GOOD, "model.n": 5, "server.force": True}, "warning"),
        (SWITCH, {**GOOD, "model.m": 8}, "error"),
        (CHOICE, BEST, "info"),
        (CHOICE, {**BEST, "model.n": 5}, "warning"),
        (CHOICE, {**BEST, "model.n": 5, "model.m": 8}, "error"),
    ],
)
def test_one_event_a_feature_at_its_level(feature: str, facts: dict[str, Any], level: str) -> None:
    (event,) = events(feature, facts=facts)
    assert (event["event"], event["log_level"]) == ("gate.decided", level)
    assert set(event) == KEYS


def test_an_event_says_what_the_decision_says() -> None:
    (event,) = events(SWITCH, facts={**GOOD, "model.n": 5, "model.rate": 2})
    assert (event["state"], event["decided_by"], event["failed"]) == ("off", "correct", ["support", "correct"])
    assert event["reason"] == "The rate is 2."
    assert event["facts"]["model.n"] == 5
    assert event["rule_set"] == "small 1"


def test_long_lists_are_given_as_count_and_digest() -> None:
    feature = f"{HEAD}requires: [{{id: a, protects: support, that: {{model.tags: {{contains: x}}}}, reason: No.}}]\n"
    short, long = [str(n) for n in range(MAX_ITEMS)], [str(n) for n in range(MAX_ITEMS + 1)]
    assert events(feature, facts={"model.tags": short})[0]["facts"]["model.tags"] == short
    shortened = events(feature, facts={"model.tags": long})[0]["facts"]["model.tags"]
    assert shortened["count"] == MAX_ITEMS + 1
    assert len(shortened["sha256"]) == 64
    other = events(feature, facts={"model.tags": [*long[:-1], "z"]})[0]["facts"]["model.tags"]
    assert other["sha256"] != shortened["sha256"]


def test_many_layers_that_all_differ_are_shortened() -> None:
    layers = [{"layer.index": index, **SAME, "layer.size": index} for index in range(60)]
    (event,) = events(LAYERED, facts=NONE_ASKED, layers=layers)
    assert event["facts"]["layer.size"]["count"] == 60


def test_quiet_drops_events_and_nests() -> None:
    with capture_logs() as found:
        small = rules()
        with quiet():
            with quiet():
                pass
            decide(small, from_record(small.catalogue, {}))
        assert found == []
        decide(small, from_record(small.catalogue, {}))
    assert len(found) == 1


def test_the_processor_adds_the_attributes_of_opentelemetry() -> None:
    event = feature_flag_attributes(None, "info", {**events(CHOICE, facts=BEST)[0]})
    assert event["feature_flag.key"] == "fused"
    assert event["feature_flag.result.variant"] == "best"
    assert event["feature_flag.provider.name"] == "model-gatekeeper"
    assert event["feature_flag.set.id"] == "small 1"
    off = feature_flag_attributes(None, "info", {**events(FEATURE, facts={"model.n": 1})[0]})
    assert (off["feature_flag.result.variant"], off["feature_flag.result.reason"]) == ("off", "enough")
    assert feature_flag_attributes(None, "info", {"event": "other"}) == {"event": "other"}


def test_the_library_leaves_the_configuration_of_structlog_alone() -> None:
    before = structlog.get_config()
    events(SWITCH, facts=GOOD)
    assert structlog.get_config() == before
