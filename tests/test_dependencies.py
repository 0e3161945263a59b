"""Features that read what others came to, shadow mode, and stages."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from gatekeeper import FactError, RefusedError, RuleSet, decide, from_record, parse_rule_set
from tests.small import FEATURE, decide_with, faults, files

OTHER = """\
feature: other
summary: A thing that reads the first.
requires:
  - {id: without-fused, protects: correctness, that: {feature.fused.state: 'off'}, reason: "fused is {feature.fused.state}."}
"""
BY_LAYER = """\
feature: fused
summary: One thing instead of two.
scope: layer
outputs: {slots: {type: integer, value: 1, else: 0}}
requires:
  - {id: enough, protects: support, that: {layer.size: {ge: 4}}, reason: "It is {layer.size}, not 4."}
"""
LAYERED_OTHER = OTHER.replace("requires:", "scope: layer\nrequires:")
LAYERS = [{"layer.index": 0, "layer.size": 1}, {"layer.index": 1, "layer.size": 8}, {"layer.index": 2}]


def rules(other: str = OTHER, fused: str = FEATURE) -> RuleSet:
    return parse_rule_set(files({"features/fused.yaml": fused, "features/other.yaml": other}))


@pytest.mark.parametrize(("n", "state"), [(4, "off"), (1, "on"), (None, "off")])
def test_a_gate_reads_what_another_feature_came_to(n: int | None, state: str) -> None:
    found = decide_with(rules(), {"facts": {"model.n": n or 9}}, "other")
    assert found.state == ("off" if n != 1 else "on") == state


def test_the_outcome_says_by_what_the_other_was_decided() -> None:
    found = decide_with(rules(), {"facts": {"model.n": 1}}, "other")
    assert found.outcomes[0].checks[0].witness == "decided: fused by enough"
    assert found.facts_used == {"feature.fused.state": "off"}


def test_a_pending_feature_is_an_unknown_fact() -> None:
    found = decide_with(rules(), {"facts": {}}, "other")
    assert (found.state, found.decided_by) == ("pending", "without-fused")


def test_a_feature_whose_request_is_not_known_is_an_unknown_fact_even_where_it_is_off() -> None:
    requested = FEATURE.replace("requires:", "request: {force: server.force}\nrequires:")
    record = {"facts": {"model.n": 1}}
    assert decide_with(rules(fused=requested), record, "fused").state == "off"
    assert decide_with(rules(fused=requested), record, "other").state == "pending"
    assert decide_with(rules(fused=requested), {**record, "assume": ["server"]}, "other").state == "on"


def test_only_the_feature_asked_for_is_answered_and_logged() -> None:
    small = rules()
    with capture_logs() as events:
        decisions = decide(small, from_record(small.catalogue, {"facts": {"model.n": 1}}), ["other"])
    assert list(decisions) == ["other"]
    assert [event["feature"] for event in events] == ["other"]


def test_in_a_layer_gate_it_is_that_layers() -> None:
    found = decide_with(rules(LAYERED_OTHER, BY_LAYER), {"layers": LAYERS}, "other")
    assert [layer.state for layer in found.layers or ()] == ["on", "off", "pending"]
    assert found.facts_used == {"feature.fused.state": {"0": "off", "1": "on"}}


def test_in_a_model_gate_it_is_unknown_while_one_layer_is_pending() -> None:
    assert decide_with(rules(fused=BY_LAYER), {"layers": LAYERS}, "other").state == "pending"


@pytest.mark.parametrize(("state", "wanted"), [("mixed", "on"), ("on", "off")])
def test_in_a_model_gate_layers_that_differ_are_mixed(state: str, wanted: str) -> None:
    other = OTHER.replace("'off'", state)
    assert decide_with(rules(other, BY_LAYER), {"layers": LAYERS[:2]}, "other").state == wanted


def test_under_every_layer_it_is_that_layers_too() -> None:
    other = OTHER.replace("{feature.fused.state: 'off'}", "{any_layer: {that: {feature.fused.outputs.slots: 1}}}")
    assert decide_with(rules(other, BY_LAYER), {"layers": LAYERS}, "other").state == "on"
    assert decide_with(rules(other, BY_LAYER), {"layers": LAYERS[:1]}, "other").state == "off"


def test_an_option_and_an_output_are_facts_and_absent_where_there_is_none() -> None:
    choice = """\
feature: fused
summary: One thing instead of two.
outputs: {width: {type: integer, else: null}}
options:
  - {option: wide, outputs: {width: 8}, requires: [{id: w, protects: support, that: {model.n: {ge: 8}}, reason: "{model.n}"}]}
"""
    for that, n, state in [
        ("{feature.fused.option: wide}", 8, "on"),
        ("{feature.fused.option: {absent: true}}", 1, "on"),
        ("{feature.fused.outputs.width: {divisible_by: 8}}", 8, "on"),
        ("{feature.fused.outputs.width: {absent: true}}", 1, "on"),
        ("{feature.fused.outputs.width: 8}", 1, "off"),
    ]:
        other = OTHER.replace("{feature.fused.state: 'off'}", that)
        assert decide_with(rules(other, choice), {"facts": {"model.n": n}}, "other").state == state, that


def test_what_a_feature_came_to_can_not_be_given() -> None:
    small = rules()
    with pytest.raises(FactError, match="is what a feature came to and can't be given"):
        from_record(small.catalogue, {"facts": {"feature.fused.state": "on"}})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {
                "features/other.yaml": OTHER,
                "features/fused.yaml": FEATURE.replace("model.n: {ge: 4}", "feature.other.state: 'on'"),
            },
            "cycle: features depend on each other in a circle",
        ),
        ({"features/other.yaml": OTHER.replace("'off'", "pending")}, "wrong-value: `eq` of `feature.fused.state`"),
        ({"features/other.yaml": OTHER.replace("fused.state", "fusd.state", 1)}, "did you mean `feature.fused.state`"),
        (
            {"facts/more.yaml": "facts: {feature.x.state: {type: string, doc: Not by hand.}}"},
            "bad-fact: `feature.x.state` says what a feature came to",
        ),
        (
            {"facts/more.yaml": "facts: {model.x: {type: boolean, derive: feature.fused.state == 'on', doc: Not so.}}"},
            "bad-fact: `model.x` is derived from `feature.fused.state`",
        ),
        (
            {"features/other.yaml": OTHER.replace("requires:", "request: feature.fused.state\nrequires:")},
            "wrong-value: `feature.fused.state` is what a feature came to, and nobody asks by it",
        ),
    ],
)
def test_wrong_dependencies(changes: dict[str, str | None], fault: str) -> None:
    (found,) = [one for one in faults(changes) if fault in one]
    assert found


SHADOW = FEATURE.replace("requires:", "mode: shadow\noutputs: {slots: {type: integer, value: 1, else: 0}}\nrequires:")


def test_a_shadow_decision_is_true_and_consumers_see_it_as_off() -> None:
    found = decide_with(rules(fused=SHADOW), {"facts": {"model.n": 4}}, "fused")
    assert (found.state, found.mode, found.outputs) == ("on", "shadow", {"slots": 1})
    assert (found.in_force.state, found.in_force.outputs) == ("off", {"slots": 0})
    assert found.to_json()["mode"] == "shadow"
    assert decide_with(rules(fused=SHADOW), {"facts": {"model.n": 4}}, "other").state == "on"


def test_the_layers_of_a_shadow_decision_are_seen_as_off() -> None:
    fused = BY_LAYER.replace("scope:", "mode: shadow\nscope:")
    found = decide_with(rules(LAYERED_OTHER, fused), {"layers": LAYERS[:2]}, "fused")
    assert [layer.state for layer in found.layers or ()] == ["off", "on"]
    assert [(layer.state, layer.outputs) for layer in found.in_force.layers or ()] == [("off", {"slots": 0})] * 2
    assert decide_with(rules(LAYERED_OTHER, fused), {"layers": LAYERS[:2]}, "other").state == "on"


def test_a_gate_overrides_the_mode_of_its_feature() -> None:
    declared = "feature: fused\nsummary: One thing instead of two.\nmode: shadow\n"
    gate = "feature: fused\nmode: enforce\nrequires:\n" + FEATURE.partition("requires:\n")[2]
    small = parse_rule_set(files({"features/fused.yaml": declared, "gates/fused.yaml": gate}))
    assert decide_with(small, {"facts": {"model.n": 4}}, "fused").mode == "enforce"


def test_a_shadow_error_refuses_nothing_and_is_no_error_event() -> None:
    fused = SHADOW.replace("requires:", "request: {force: server.force}\nrequires:").replace("support", "correctness")
    small = rules(fused=fused)
    record: dict[str, Any] = {"facts": {"model.n": 1, "server.force": True}}
    with capture_logs() as events:
        decisions = decide(small, from_record(small.catalogue, record))
    decisions.require()
    assert decisions["fused"].state == "error"
    (event,) = [event for event in events if event["feature"] == "fused"]
    assert (event["log_level"], event["mode"]) == ("info", "shadow")
    enforced = rules(fused=fused.replace("mode: shadow\n", ""))
    with capture_logs(), pytest.raises(RefusedError):
        decide(enforced, from_record(enforced.catalogue, record)).require()


def test_an_unknown_outcome_says_at_which_stage_it_is_known() -> None:
    feature = FEATURE.replace("{model.n: {ge: 4}}", "{model.n: {ge: 4}, platform.arch: sm90}")
    found = decide_with(rules(fused=feature), {"facts": {"model.n": 4}}, "fused")
    assert found.outcomes[0].resolves_at == "platform"
    assert found.reason.startswith("Depends on `platform.arch`, not known yet (stage platform).")
    assert decide_with(rules(fused=feature), {"facts": {"model.n": 1}}, "fused").outcomes[0].resolves_at is None


@pytest.mark.parametrize(
    ("layers", "facts", "stage", "names"),
    [
        (None, {"model.family": "a"}, "checkpoint", "`layer.size`"),
        (None, {}, "checkpoint", "`layer.size`, `model.family`"),
        ([{"layer.index": 0, "layer.size": 8}], {}, "config", "`model.family`"),
        (
            [{"layer.index": 0, "layer.size": 8}, {"layer.index": 1}],
            {"model.family": "a"},
            "checkpoint",
            "`layer.size`",
        ),
    ],
)
def test_under_every_layer_what_is_not_known_is_told_of_the_layers(
    layers: list[dict[str, Any]] | None, facts: dict[str, Any], stage: str, names: str
) -> None:
    condition = "{every_layer: {that: {layer.size: 8}}, model.family: a}"
    feature = FEATURE.replace("{model.n: {ge: 4}}", condition)
    record = {"facts": {"model.n": 4, **facts}, **({} if layers is None else {"layers": layers})}
    found = decide_with(rules(fused=feature), record, "fused")
    assert found.outcomes[0].resolves_at == stage
    assert found.reason.startswith(f"Depends on {names}, not known yet (stage {stage}).")


@pytest.mark.parametrize(
    ("fact", "stage"),
    [
        ("model.n", "config"),
        ("model.double", "config"),
        ("layer.size", "checkpoint"),
        ("layer.big", "checkpoint"),
        ("platform.arch", "platform"),
        ("library.torch", "platform"),
        ("engine.backend", "layout"),
        ("feature.fused.state", "config"),
    ],
)
def test_stages_follow_from_groups_and_derivations(fact: str, stage: str) -> None:
    assert rules().catalogue.stage_of(fact) == stage


@pytest.mark.parametrize(
    ("at", "late"), [("config", True), ("checkpoint", True), ("platform", False), ("layout", False)]
)
def test_a_requirement_that_is_due_before_its_facts_is_a_fault(at: str, late: bool) -> None:
    feature = FEATURE.replace("protects: support", f"protects: support, at: {at}")
    found = faults({"features/fused.yaml": feature.replace("model.n: {ge: 4}", "platform.arch: sm90")})
    assert ["late-fact" in one for one in found] == ([True] if late else [])
