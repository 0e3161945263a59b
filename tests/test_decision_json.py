"""The JSON form of decisions against its schema, on real models and on every state of a small rule set."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gatekeeper import decide, join, open_target, runners_of
from gatekeeper.load import shipped_rules
from gatekeeper.source import check_data
from tests.small import decision
from tests.test_decide import BEST, CHOICE, GOOD, LAYERED, NONE_ASKED, OTHER, SAME, SWITCH

CORPUS = Path(__file__).parent / "corpus"
MODELS = sorted(path.name for path in CORPUS.iterdir() if path.is_dir())
# One that is off, one that is mixed or on, one with draft layers, one that no family knows well.
SOME = ["moonshotai__Kimi-K2.5", "deepseek-ai__DeepSeek-V3", "mistralai__Mixtral-8x7B-v0.1", *MODELS[::12]]


def faults(data: Any, part: str = "") -> list[str]:
    """What of `data` does not fit the schema of decisions, or one of its parts."""
    if part:
        from jsonschema import Draft202012Validator

        from gatekeeper.source import _validator

        validator = Draft202012Validator(
            {"$ref": f"decision.schema.json#/$defs/{part}"}, registry=_validator("decision")._registry
        )
        return [error.message for error in validator.iter_errors(data)]
    return [str(fault) for fault in check_data(data, "decision", "decision")]


@cache
def decided(model: str) -> tuple[dict[str, Any], ...]:
    """The JSON of every decision on one model of the corpus, for each of its runners, here and there."""
    rules = shipped_rules()
    checkpoint = open_target(CORPUS / model, rules)
    found = []
    settings: list[dict[str, Any]] = [{}, {"parallel.tp_size": 8, "server.enforce_shared_experts_fusion": True}]
    for platform, setting in zip((None, "mi355x"), settings, strict=True):
        for runner in runners_of(checkpoint):
            facts = join(checkpoint, runner=runner, platform=platform, settings=setting, rules=rules)
            with capture_logs():
                found += [one.to_json() for one in decide(rules, facts).values()]
    return tuple(json.loads(json.dumps(one)) for one in found)


@pytest.mark.parametrize("model", sorted({model for model in SOME if model in MODELS}))
def test_decisions_on_real_models_fit_the_schema(model: str) -> None:
    assert decided(model)
    assert [fault for one in decided(model) for fault in faults(one)] == []


SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "on": (SWITCH, {"facts": GOOD}),
    "off": (SWITCH, {"facts": {**GOOD, "model.n": 5}}),
    "error": (SWITCH, {"facts": {**GOOD, "model.m": 8}}),
    "pending": (SWITCH, {"facts": {"model.family": "a"}, "assume": ["server"], "unknown": ["server.extra"]}),
    "no gate": (SWITCH, {"facts": {"model.family": "z"}}),
    "waived": (SWITCH, {"facts": {**GOOD, "model.n": 5, "server.force": True}}),
    "an option": (CHOICE, {"facts": BEST}),
    "a degraded option": (CHOICE, {"facts": {**BEST, "model.n": 5}}),
    "would be": (CHOICE, {"facts": {name: value for name, value in BEST.items() if name != "model.n"}}),
    "mixed": (LAYERED, {"facts": NONE_ASKED, "layers": [{"layer.index": 3, **SAME}, {"layer.index": 4, **OTHER}]}),
    "layers without a number": (LAYERED, {"facts": NONE_ASKED, "layers": [SAME, OTHER]}),
    "no layers": (LAYERED, {"facts": NONE_ASKED, "layers": []}),
    "an absent record": (LAYERED, {"facts": NONE_ASKED, "layers": [{**SAME, "layer.two": None}]}),
}


@pytest.mark.parametrize("name", SMALL)
def test_decisions_in_every_state_fit_the_schema(name: str) -> None:
    feature, record = SMALL[name]
    data = json.loads(json.dumps(decision(feature, **record).to_json()))
    assert faults(data) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "maybe"}, "`state` must be"),
        ({"digest": "abc"}, "`digest` is"),
        ({"extra": 1}, "unknown key `extra`"),
        ({"layers": [{"index": 3}]}, "missing key `name`"),
        ({"outcomes": [{"id": "a"}]}, "missing key `state`"),
        ({"rule_set": {"name": "a"}}, "missing key `version`"),
    ],
)
def test_the_schema_is_strict(change: dict[str, Any], message: str) -> None:
    data = {**decision(SWITCH, facts=GOOD).to_json(), **change}
    assert any(message in fault for fault in faults(data))


@pytest.mark.parametrize("key", [*decision(SWITCH, facts=GOOD).to_json()])
def test_the_schema_demands_every_key(key: str) -> None:
    data = decision(SWITCH, facts=GOOD).to_json()
    del data[key]
    assert any(f"missing key `{key}`" in fault for fault in faults(data))


def test_absent_and_unknown_are_told_apart() -> None:
    found = decision(SWITCH, facts={**{k: v for k, v in GOOD.items() if k != "model.rate"}, "model.n": None}).to_json()
    checks = {check["fact"]: (check["known"], check["actual"]) for one in found["outcomes"] for check in one["checks"]}
    assert checks == {"model.n": ("absent", None), "model.rate": ("unknown", None), "model.m": ("known", 7)}
    assert found["facts_used"]["model.n"] is None
    assert "model.rate" not in found["facts_used"]


def test_layer_facts_are_shown_by_ranges_of_layers() -> None:
    layers = [{"layer.index": 3 + index, **layer} for index, layer in enumerate([SAME, SAME, OTHER, SAME])]
    used = decision(LAYERED, facts=NONE_ASKED, layers=layers).to_json()["facts_used"]
    assert used["layer.two.format"] == {"3-4, 6": "bf16", "5": "fp8"}


def test_answers_and_lines_have_schemas_too() -> None:
    one = decision(SWITCH, facts=GOOD).to_json()
    assert faults([{"target": "x", "runner": "target", "decisions": [one]}], "answers") == []
    assert faults({"id": "a", "decisions": [one]}, "line") == []
    assert faults({"id": 3, "error": "why"}, "line") == []
    assert faults({"id": 3}, "line")
    assert faults({"id": 3, "error": "why", "decisions": []}, "line")
