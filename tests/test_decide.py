"""Decisions: each line of the design's *States*, requests, choices, outputs, layers, and the digest."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from structlog.testing import capture_logs

from gatekeeper import FactError, RefusedError, decide, from_record, parse_rule_set
from tests.small import decide_with, decision, files, rules

HEAD = "feature: fused\nsummary: One thing instead of two.\n"
FLAGS = "request: {force: server.force, forbid: server.forbid}\n"
NONE_ASKED = {"server.force": False, "server.forbid": False}

# Each of the three has one requirement of each kind, told apart by the fact that it tests.
SWITCH = f"""\
{HEAD}{FLAGS}applies_to: {{model.family: a}}
outputs: {{k: {{type: integer, value: 1, else: 0}}}}
requires:
  - {{id: support, protects: support, that: {{model.n: 4}}, reason: "There are {{model.n}}."}}
  - {{id: correct, protects: correctness, that: {{model.rate: 1}}, reason: "The rate is {{model.rate}}."}}
  - {{id: grave, protects: speed, that: {{model.m: 7}}, on_failure: error, reason: "m is {{model.m}}."}}
"""
GOOD: dict[str, Any] = {"model.family": "a", "model.n": 4, "model.rate": 1, "model.m": 7, **NONE_ASKED}


def essence(feature: str, facts: dict[str, Any], **record: Any) -> str:
    """`state decided_by`, with `requested` where it was asked for."""
    found = decision(feature, facts={name: value for name, value in facts.items() if value != "?"}, **record)
    return f"{found.state} {found.decided_by}{' requested' if found.requested else ''}"


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "on None"),
        # 1. Forbidden.
        ({"server.forbid": True}, "off request"),
        ({"server.forbid": True, "server.force": True}, "error request requested"),
        ({"server.forbid": True, "model.family": "z"}, "off request"),
        # 2. No gate applies.
        ({"model.family": "z"}, "off no-gate"),
        ({"model.family": "z", "server.force": True}, "error no-gate requested"),
        ({"model.family": "?"}, "pending no-gate"),
        ({"model.family": "?", "server.force": True}, "pending no-gate requested"),
        # 3. A correctness requirement failed while forced: nothing that is unknown can help.
        ({"model.rate": 2, "server.force": True}, "error correct requested"),
        ({"model.rate": 2, "server.force": True, "model.n": "?"}, "error correct requested"),
        # 4. Failed and not waived.
        ({"model.n": 5}, "off support"),
        ({"model.rate": 2}, "off correct"),
        ({"model.n": 5, "model.rate": 2}, "off correct"),
        ({"model.n": 5, "model.rate": "?"}, "off support"),
        ({"model.m": 8}, "error grave"),
        ({"model.m": 8, "model.n": 5}, "off support"),
        ({"model.m": 8, "model.n": "?"}, "pending support"),
        # 5. Unknown and not waived.
        ({"model.n": "?"}, "pending support"),
        ({"model.n": "?", "model.rate": "?"}, "pending correct"),
        ({"model.rate": "?", "server.force": True}, "pending correct requested"),
        # 7. On; forced, support and speed are waived.
        ({"model.n": 5, "server.force": True}, "on None requested"),
        ({"model.n": "?", "server.force": True}, "on None requested"),
        ({"model.m": 8, "server.force": True}, "on None requested"),
        # A request whose fact is unknown: decided as auto, and what it may still change is pending.
        ({"server.force": "?"}, "pending request"),
        ({"server.forbid": "?"}, "pending request"),
        ({"server.force": "?", "model.n": 5}, "off support"),
        ({"server.force": "?", "model.m": 8}, "pending request"),
        ({"server.forbid": "?", "server.force": True}, "pending request requested"),
        ({"server.force": "?", "server.forbid": True}, "off request"),
    ],
)
def test_states_of_a_switch(facts: dict[str, Any], expected: str) -> None:
    assert essence(SWITCH, {**GOOD, **facts}) == expected


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({}, "auto"),
        ({"server.force": True}, "on"),
        ({"server.forbid": True}, "off"),
        ({"server.force": True, "server.forbid": True}, "both"),
        ({"server.force": "?"}, "unknown"),
        ({"server.forbid": "?", "server.force": True}, "unknown"),
    ],
)
def test_the_request_is_reported_as_it_was_made(facts: dict[str, Any], word: str) -> None:
    given = {name: value for name, value in {**GOOD, **facts}.items() if value != "?"}
    assert decision(SWITCH, facts=given).request == word


def test_what_a_request_waives_is_reported_with_what_it_was() -> None:
    found = decision(SWITCH, facts={**GOOD, "model.n": 5, "server.force": True})
    waived = [(one.id, one.state, one.was) for one in found.outcomes if one.was]
    assert waived == [("support", "waived", "failed")]
    assert found.reason == "On by request, which waives `support`."
    assert found.outputs == {"k": 1}


def test_reasons_are_rendered_and_every_requirement_is_reported() -> None:
    found = decision(SWITCH, facts={**GOOD, "model.n": 5})
    assert found.reason == "There are 5."
    assert [(one.id, one.state) for one in found.outcomes] == [
        ("support", "failed"),
        ("correct", "passed"),
        ("grave", "passed"),
    ]
    assert found.outputs == {"k": 0}
    check = found.outcomes[0].checks[0]
    assert (check.fact, check.actual, check.witness, check.operator, check.expected) == ("model.n", 5, "given", "eq", 4)
    assert check.where == "features/fused.yaml:7"


def test_a_pending_reason_names_what_is_not_known() -> None:
    found = decision(SWITCH, facts={name: value for name, value in GOOD.items() if name != "model.n"})
    assert found.reason.startswith("Depends on `model.n`, not known yet (stage config).")


@pytest.mark.parametrize(
    ("when", "that", "facts", "state"),
    [
        ("{model.n: 1}", "{model.m: 1}", {"model.n": 2, "model.m": 2}, "not_applicable"),
        ("{model.n: 1}", "{model.m: 1}", {"model.n": 2}, "not_applicable"),
        ("{model.n: 1}", "{model.m: 1}", {"model.n": 1, "model.m": 1}, "passed"),
        ("{model.n: 1}", "{model.m: 1}", {"model.m": 1}, "passed"),
        ("{model.n: 1}", "{model.m: 1}", {"model.n": 1, "model.m": 2}, "failed"),
        ("{model.n: 1}", "{model.m: 1}", {"model.m": 2}, "unknown"),
        ("{model.n: 1}", "{model.m: 1}", {"model.n": 1}, "unknown"),
        ("{model.n: 1}", "{model.m: 1}", {"model.n": None, "model.m": 2}, "not_applicable"),
    ],
)
def test_a_requirement_is_not_when_or_that(when: str, that: str, facts: dict[str, Any], state: str) -> None:
    feature = f"{HEAD}requires:\n  - {{id: a, protects: support, when: {when}, that: {that}, reason: No.}}\n"
    assert decision(feature, facts=facts).outcomes[0].state == state


def test_nested_requirements_share_their_when() -> None:
    feature = f"""{HEAD}requires:
  - when: {{model.n: 1}}
    requires:
      - {{id: a, protects: support, that: {{model.m: 1}}, reason: No.}}
      - {{id: b, protects: support, when: {{model.rate: 1}}, that: {{model.m: 2}}, reason: No.}}
"""
    states = [one.state for one in decision(feature, facts={"model.n": 1, "model.m": 1, "model.rate": 2}).outcomes]
    assert states == ["passed", "not_applicable"]
    states = [one.state for one in decision(feature, facts={"model.n": 2, "model.m": 9, "model.rate": 1}).outcomes]
    assert states == ["not_applicable", "not_applicable"]


def test_a_shared_requirement_may_be_overridden_in_when_protects_and_on_failure() -> None:
    shared = "requirements:\n  few: {protects: support, when: {model.m: 1}, that: {model.n: 1}, reason: No.}\n"
    feature = HEAD + "requires: [{use: few, when: {model.m: 2}, protects: correctness, on_failure: error}]\n"
    small = parse_rule_set(files({"requirements.yaml": shared, "features/fused.yaml": feature}))
    assert decide_with(small, {"facts": {"model.m": 1, "model.n": 2}}).state == "on"
    failed = decide_with(small, {"facts": {"model.m": 2, "model.n": 2}})
    assert (failed.state, failed.decided_by, failed.outcomes[0].protects) == ("error", "few", "correctness")


# --------------------------------------------------------------------------------------------------------- choices

CHOICE = f"""\
{HEAD}request: server.backend
outputs: {{width: {{type: integer, value: 1, else: null}}}}
on_failure: error
requires: [{{id: all, protects: support, that: {{model.family: a}}, reason: No.}}]
options:
  - option: best
    outputs: {{width: 128}}
    requires:
      - {{id: best-n, protects: support, that: {{model.n: 4}}, reason: "n is {{model.n}}."}}
      - {{id: best-rate, protects: correctness, that: {{model.rate: 1}}, reason: "The rate is {{model.rate}}."}}
  - option: good
    degraded: It is slower.
    requires: [{{id: good-m, protects: support, that: {{model.m: 7}}, reason: "m is {{model.m}}."}}]
"""
BEST: dict[str, Any] = {"model.family": "a", "model.n": 4, "model.rate": 1, "model.m": 7, "server.backend": "auto"}


def choice(facts: dict[str, Any]) -> str:
    found = decision(CHOICE, facts={name: value for name, value in {**BEST, **facts}.items() if value != "?"})
    return " ".join(str(part) for part in (found.state, found.option, found.would_be, found.decided_by))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "on best None None"),
        ({"model.n": 5}, "on good None None"),
        ({"model.n": 5, "model.rate": "?"}, "on good None None"),
        ({"model.n": "?"}, "pending None good best-n"),
        ({"model.n": "?", "model.rate": "?"}, "pending None good best-rate"),
        ({"model.n": "?", "model.m": 8}, "pending None None best-n"),
        ({"model.n": "?", "model.m": "?"}, "pending None None best-n"),
        ({"model.n": 5, "model.m": 8}, "error None None best-n"),
        ({"model.n": 5, "model.rate": 2, "model.m": 8}, "error None None best-rate"),
        ({"model.family": "z"}, "off None None all"),
        # Asked for by name: that one, and its own support and speed are waived.
        ({"server.backend": "good"}, "on good None None"),
        ({"server.backend": "best", "model.n": 5}, "on best None None"),
        ({"server.backend": "best", "model.n": "?"}, "on best None None"),
        ({"server.backend": "best", "model.rate": "?"}, "pending None None best-rate"),
        ({"server.backend": "best", "model.rate": 2}, "error None None best-rate"),
        ({"server.backend": "best", "model.family": "z"}, "on best None None"),
        ({"server.backend": "bset"}, "error None None request"),
        # `on` asks for any option; an option's own requirements are not waived.
        ({"server.backend": "on", "model.n": 5}, "on good None None"),
        ({"server.backend": "on", "model.n": 5, "model.m": 8}, "error None None best-n"),
        ({"server.backend": "off"}, "off None None request"),
        ({"server.backend": "?"}, "pending None best request"),
        ({"server.backend": "?", "model.n": 5, "model.m": 8}, "pending None None request"),
    ],
)
def test_states_of_a_choice(facts: dict[str, Any], expected: str) -> None:
    assert choice(facts) == expected


def test_an_option_that_can_not_be_had_names_what_would_work() -> None:
    reason = decision(CHOICE, facts={**BEST, "server.backend": "best", "model.rate": 2}).reason
    assert "The rate is 2. A request does not waive this." in reason
    assert "`good`" in reason
    assert "`best`, `good`" in decision(CHOICE, facts={**BEST, "server.backend": "bset"}).reason


def test_outputs_of_an_option_beat_those_of_the_feature() -> None:
    assert decision(CHOICE, facts=BEST).outputs == {"width": 128}
    fallback = decision(CHOICE, facts={**BEST, "model.n": 5})
    assert (fallback.outputs, fallback.degraded) == ({"width": 1}, "It is slower.")
    assert decision(CHOICE, facts={**BEST, "server.backend": "off"}).outputs == {"width": None}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"model.n": 3}, "on None"),
        ({}, "pending output-k"),
        ({"model.n": None}, "off output-k"),
        ({"model.n": None, "server.force": True}, "error output-k requested"),
    ],
)
def test_an_output_without_a_value_keeps_it_from_being_on(facts: dict[str, Any], expected: str) -> None:
    outputs = "outputs: {k: {type: integer, value: {fact: model.n}, else: 0}}\n"
    feature = f"{HEAD}{FLAGS}applies_to: {{model.m: 7}}\n{outputs}"
    assert essence(feature, {**NONE_ASKED, "model.m": 7, **facts}) == expected


@pytest.mark.parametrize(
    ("request_", "facts", "expected"),
    [
        ("ignored", {"server.force": True}, "off few"),
        ("ignored", {"server.forbid": True}, "off request"),
        ("ignored", {"server.force": "?", "model.n": 4}, "on None"),
        ("required", {"model.n": 4}, "off request"),
        ("required", {"model.n": 4, "server.force": True}, "on None requested"),
        ("required", {"model.n": 4, "server.force": "?"}, "pending request"),
    ],
)
def test_a_gate_may_ignore_or_require_a_request(request_: str, facts: dict[str, Any], expected: str) -> None:
    requires = "requires: [{id: few, protects: support, that: {model.n: 4}, reason: No.}]\n"
    gate = f"feature: fused\nrequest: {request_}\n{requires}"
    small = parse_rule_set(files({"features/fused.yaml": HEAD + FLAGS, "gates/fused.yaml": gate}))
    given = {name: value for name, value in {**NONE_ASKED, "model.n": 5, **facts}.items() if value != "?"}
    found = decide_with(small, {"facts": given})
    assert f"{found.state} {found.decided_by}{' requested' if found.requested else ''}" == expected
    assert found.request_ignored is (request_ == "ignored" and given.get("server.force", False))


def test_an_error_names_the_controllable_facts_that_would_help() -> None:
    that = "that: {parallel.tp_size: {divisible_by: 2}}"
    feature = f"{HEAD}requires: [{{id: even, protects: correctness, {that}, on_failure: error, reason: Odd.}}]\n"
    assert (
        decision(feature, facts={"parallel.tp_size": 1}).reason == "Odd. `even` passes with `parallel.tp_size` 2 or 4."
    )


# ---------------------------------------------------------------------------------------------------------- layers

LAYERED = f"""\
{HEAD}{FLAGS}scope: layer
outputs: {{k: {{type: integer, value: 1, else: 0}}}}
requires:
  - {{id: alike, protects: correctness, that: {{layer.two: {{fact: layer.one}}}}, reason: "Not alike: {{difference}}"}}
  - {{id: size, protects: support, that: {{layer.size: {{le: 9}}}}, reason: "{{layer.index}} is {{layer.size}} wide"}}
"""
SAME = {"layer.one": {"format": "bf16", "width": 2}, "layer.two": {"format": "bf16", "width": 2}, "layer.size": 4}
OTHER = {**SAME, "layer.two": {"format": "fp8", "width": 2}}


def layered(layers: Any, **record: Any) -> Any:
    numbered = layers and [{"layer.index": 3 + index, **layer} for index, layer in enumerate(layers)]
    return decision(LAYERED, facts={**NONE_ASKED, **record.pop("facts", {})}, layers=numbered, **record)


def test_layers_that_agree_make_one_decision() -> None:
    found = layered([SAME, SAME])
    assert (found.state, found.outputs, found.decided_by) == ("on", {"k": 1}, None)
    assert [(layer.index, layer.state) for layer in found.layers] == [(3, "on"), (4, "on")]
    assert layered([OTHER, OTHER]).state == "off"


def test_layers_that_differ_are_mixed_and_say_where() -> None:
    found = layered([SAME, SAME, OTHER])
    assert (found.state, found.outputs, found.decided_by) == ("mixed", None, "alike")
    assert found.reason == "on in 3-4; off in 5. Not alike: format fp8, not bf16"
    assert found.layer(5).outputs == {"k": 0}
    with pytest.raises(KeyError):
        found.layer(6)


def test_one_error_makes_the_feature_an_error() -> None:
    found = layered([SAME, OTHER], facts={"server.force": True})
    assert (found.state, found.decided_by) == ("error", "alike")


def test_a_layer_that_is_unknown_is_pending_by_itself() -> None:
    found = layered([SAME, {"layer.one": {"format": "bf16"}, "layer.two": {"format": "bf16"}, "layer.size": 4}])
    assert (found.state, [layer.state for layer in found.layers]) == ("mixed", ["on", "pending"])


def test_each_layer_has_its_own_reason() -> None:
    found = layered([{**SAME, "layer.size": 10}, {**SAME, "layer.size": 10}])
    assert [layer.reason for layer in found.layers] == ["3 is 10 wide", "4 is 10 wide"]


def test_no_moe_layer_is_off_and_an_error_if_forced() -> None:
    assert (layered([]).state, layered([]).decided_by, layered([]).layers) == ("off", "layers", ())
    assert layered([], facts={"server.force": True}).state == "error"
    assert layered([], facts={"server.forbid": True}).decided_by == "request"
    draft = layered([SAME], runner="draft")
    assert (draft.state, draft.reason) == ("off", "The model has no draft MoE layer.")


def test_an_unknown_list_of_layers_is_never_on() -> None:
    found = decision(LAYERED, facts=NONE_ASKED)
    assert (found.state, found.layers) == ("pending", None)
    free = LAYERED[: LAYERED.index("requires:")] + "requires: []\n"
    assert (decision(free, facts=NONE_ASKED).state, decision(free, facts=NONE_ASKED).decided_by) == (
        "pending",
        "layers",
    )


def test_a_rule_set_without_layer_facts_can_decide_by_layer() -> None:
    facts = "facts:\n  layer.size: {type: integer, doc: Its size.}\n"
    feature = HEAD + "scope: layer\nrequires: [{id: a, protects: support, that: {layer.size: 1}, reason: No.}]\n"
    small = parse_rule_set(
        {"ruleset.yaml": files()["ruleset.yaml"], "facts/all.yaml": facts, "features/fused.yaml": feature}
    )
    found = decide_with(small, {"layers": [{"layer.size": 1}, {"layer.size": 2}]})
    assert found.state == "mixed"
    assert json.dumps(found.to_json())


def test_a_record_in_a_reason_shows_its_fields() -> None:
    feature = LAYERED.replace("{difference}", "{layer.two}")
    found = decision(feature, facts=NONE_ASKED, layers=[{"layer.index": 3, **OTHER}])
    assert found.reason == "Not alike: {format: fp8, width: 2}"


# ----------------------------------------------------------------------------------------------- what callers get


def test_every_consumer_can_require_what_was_decided() -> None:
    small = rules(SWITCH)
    for facts, says in (
        ({**GOOD, "model.m": 8}, "fused: refused: m is 8."),
        (
            {name: value for name, value in GOOD.items() if name != "model.rate"} | {"server.force": True},
            "fused: requested, but pending",
        ),
    ):
        with capture_logs():
            decisions = decide(small, from_record(small.catalogue, {"facts": facts}))
        with pytest.raises(RefusedError, match=says):
            decisions.require()
    for facts in (GOOD, {**GOOD, "model.n": 5}, {}):
        with capture_logs():
            decide(small, from_record(small.catalogue, {"facts": facts})).require()


def test_one_name_is_no_list_of_names() -> None:
    small = rules()
    says = r"`features` is the text `fused`; expected a list of names, such as \[`fused`\]"
    with pytest.raises(FactError, match=says):
        decide(small, from_record(small.catalogue, {}), "fused")


LATER = "facts:\n  model.later: {type: integer, doc: A later number., from: [later], given_by: [config]}\n"


def test_facts_that_were_read_without_what_a_gate_asks_for_are_refused() -> None:
    """They would be unknown for ever, and the feature pending."""
    facts = from_record(rules().catalogue, {"facts": {"model.n": 4}})
    feature = HEAD + "applies_to: {model.later: 3}\n"
    asking = parse_rule_set({**files(), "facts/more.yaml": LATER, "features/fused.yaml": feature})
    says = r"read without `model.later`, which the rule set `small` asks for; .*rules=rules"
    with pytest.raises(FactError, match=says):
        decide(asking, facts)


def test_facts_that_no_gate_asks_for_may_be_missing() -> None:
    """Those of another catalogue, and what features came to, which nobody reads from a target."""
    facts = from_record(rules().catalogue, {"facts": {"model.n": 4}})
    other = """\
feature: other
summary: Another thing.
requires: [{id: a, protects: support, that: {feature.fused.state: 'on'}, reason: It is off.}]
"""
    more = parse_rule_set({**files(), "facts/more.yaml": LATER, "features/other.yaml": other})
    assert [one.state for one in decide(more, facts).values()] == ["on", "on"]
    assert decide(rules(), from_record(more.catalogue, {"facts": {"model.n": 4}}))["fused"].state == "on"


def test_a_decision_that_was_not_made_offers_the_nearest() -> None:
    small = rules()
    decisions = decide(small, from_record(small.catalogue, {}))
    with pytest.raises(KeyError, match="no decision of `fusde`, did you mean `fused`"):
        decisions["fusde"]
    assert "fusde" not in decisions and 0 not in decisions


def test_an_unknown_feature_is_an_error_that_offers_the_nearest() -> None:
    small = rules()
    with pytest.raises(FactError, match="unknown feature `fusde`, did you mean `fused`"):
        decide(small, from_record(small.catalogue, {}), ["fusde"])


# ---------------------------------------------------------------------------------------------------------- digest

DIGEST = """
import json, sys
from structlog.testing import capture_logs
from tests.small import decide_with
from tests.test_decide import LAYERED, NONE_ASKED, OTHER, SAME
from tests.small import decision
layers = [{"layer.index": 3 + i, **layer} for i, layer in enumerate([SAME, OTHER, SAME])]
print(decision(LAYERED, facts=NONE_ASKED, layers=layers).digest)
"""


def test_the_digest_is_equal_in_every_process() -> None:
    found = layered([SAME, OTHER, SAME]).digest
    for seed in ("0", "7"):
        done = subprocess.run(
            [sys.executable, "-c", DIGEST],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        )
        assert done.stdout.strip() == found


def test_the_digest_depends_on_what_was_used_and_on_nothing_else() -> None:
    digest = decision(SWITCH, facts=GOOD).digest
    same: list[dict[str, Any]] = [
        {"facts": {**GOOD, "model.n": 4.0}},
        {"facts": {**GOOD, "model.tags": ["unused"]}},
        {"facts": dict(reversed(GOOD.items()))},
        {"facts": GOOD, "assume": ["engine"]},
        {"facts": {**GOOD, "model.m": None}},
    ]
    assert {decision(SWITCH, **record).digest for record in same} == {digest}
    other: list[dict[str, Any]] = [
        {"facts": {**GOOD, "model.n": 5}},
        {"facts": {**GOOD, "model.n": None}},
        {"facts": {name: value for name, value in GOOD.items() if name != "model.n"}},
        {"facts": {**GOOD, "server.force": True}},
        {"facts": GOOD, "runner": "draft"},
    ]
    assert len({digest, *(decision(SWITCH, **record).digest for record in other)}) == 1 + len(other)


def test_the_digest_is_independent_of_files_and_order_of_features() -> None:
    moved = files({"features/fused.yaml": None, "features/moved.yaml": SWITCH})
    assert decide_with(parse_rule_set(moved), {"facts": GOOD}).digest == decision(SWITCH, facts=GOOD).digest


def test_a_decision_is_frozen() -> None:
    with pytest.raises(AttributeError):
        decision(SWITCH, facts=GOOD).state = "off"  # type: ignore[misc]
