"""Overlays: what `amends` adds, replaces and drops, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gatekeeper import RuleError, RuleSet, decide, from_record, load_rules, parse_rule_set, read_facts
from gatekeeper.load import shipped_rules
from tests.small import decide_with, files

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "name: site\nversion: 7\nlanguage: 1\n"
GATE = """\
feature: fused
gate: main
applies_to: {model.family: [a, b]}
requires:
  - {id: enough, protects: support, that: {model.n: {ge: 4}}, reason: "There are {model.n}, not 4."}
  - use: even
"""
REQUIREMENTS = """\
requirements:
  even: {protects: correctness, that: {model.n: {divisible_by: 2}}, reason: "{model.n} is odd."}
"""
BASE = files(
    {
        "features/fused.yaml": "feature: fused\nsummary: One thing instead of two.\nrequest: {force: server.force}\n",
        "gates/main.yaml": GATE,
        "requirements.yaml": REQUIREMENTS,
    }
)
CHOICE = files(
    {
        "features/fused.yaml": """\
feature: fused
summary: One thing instead of two.
outputs: {width: {type: integer, else: null}}
options:
  - {option: wide, outputs: {width: 8}, requires: [{id: eight, protects: correctness, that: {model.n: 8}, reason: "{model.n}"}]}
  - {option: narrow, outputs: {width: 1}}
"""
    }
)


def over(text: str, base: dict[str, str] = BASE, **more: str) -> RuleSet:
    return parse_rule_set(base, [{"ruleset.yaml": MANIFEST, "gates/site.yaml": text, **more}])


def state(rules: RuleSet, n: int, family: str = "a", **facts: Any) -> tuple[str, str | None]:
    found = decide_with(rules, {"facts": {"model.n": n, "model.family": family, **facts}, "assume": ["server"]})
    return found.state, found.decided_by


def test_a_requirement_is_added_replaced_and_dropped() -> None:
    rules = over("""\
amends: fused/main
add: [{requirement: {id: small, protects: speed, that: {model.n: {le: 6}}, reason: "{model.n}"}, because: Six is enough here.}]
replace: [{requirement: {id: enough, protects: support, that: {model.n: {ge: 2}}, reason: "{model.n}"}, because: Two will do here.}]
drop: [{requirement: even, because: Odd numbers work here.}]
""")
    assert [one.id for one in rules.gates["fused"][0].requires] == ["enough", "small"]
    assert [state(rules, n) for n in (1, 3, 8)] == [("off", "enough"), ("on", None), ("off", "small")]
    assert [state(parse_rule_set(BASE), n) for n in (1, 3, 8)] == [("off", "even"), ("off", "even"), ("on", None)]


def test_dropping_what_protects_correctness_is_said_at_every_decision() -> None:
    rules = over("amends: fused/main\ndrop: [{requirement: even, because: Odd numbers work here.}]\n")
    with capture_logs() as events:
        decisions = decide(rules, from_record(rules.catalogue, {"facts": {"model.n": 4, "model.family": "a"}}))
    said = "`even`, which protects correctness, is dropped at gates/site.yaml:2: Odd numbers work here."
    assert decisions["fused"].warnings == (said,)
    assert decisions["fused"].to_json()["warnings"] == [said]
    (event,) = events
    assert (event["log_level"], event["warnings"]) == ("warning", [said])


@pytest.mark.parametrize(
    ("amendment", "warned"),
    [
        ("drop: [{requirement: enough, because: It only kept us slow.}]", False),
        (
            "replace: [{requirement: {id: even, protects: speed, that: {model.n: 4}, reason: '{model.n}'}, because: Only speed.}]",
            True,
        ),
        (
            "replace: [{requirement: {id: even, protects: correctness, that: {model.n: 4}, reason: '{model.n}'}, because: Stricter.}]",
            False,
        ),
    ],
)
def test_only_protection_that_is_gone_is_warned_of(amendment: str, warned: bool) -> None:
    rules = over(f"amends: fused/main\n{amendment}\n")
    assert bool(rules.gates["fused"][0].warnings) is warned


@pytest.mark.parametrize(
    ("amendment", "odd", "warned"),
    [
        ("drop: [{because: Odd numbers work here.}]", "on", True),
        (
            "replace: [{requirement: {protects: support, that: {model.n: {ge: 1}}, reason: '{model.n}'}, because: Any number.}]",
            "on",
            True,
        ),
        (
            "replace: [{requirement: {protects: correctness, that: {model.n: {ge: 9}}, reason: '{model.n}'}, because: Nine or more.}]",
            "off",
            False,
        ),
    ],
)
def test_a_shared_requirement_is_amended_for_every_gate_that_takes_it(amendment: str, odd: str, warned: bool) -> None:
    rules = over(f"amends: even\n{amendment}\n")
    assert state(rules, 5)[0] == odd
    assert bool(rules.gates["fused"][0].warnings) is warned


def test_whole_parts_of_a_gate_are_replaced() -> None:
    rules = over("""\
amends: fused/main
replace:
  - {applies_to: {model.family: c}, because: Only the family c here.}
  - {request: required, because: Nobody gets it unasked.}
""")
    assert state(rules, 4) == ("off", "no-gate")
    assert state(rules, 4, "c") == ("off", "request")
    assert state(rules, 4, "c", **{"server.force": True}) == ("on", None)


def test_options_are_added_in_their_place_replaced_and_dropped() -> None:
    rules = over(
        """\
amends: fused/fused
drop: [{option: narrow, because: Nobody wants it narrow.}]
replace: [{option: {option: wide, outputs: {width: 16}}, because: Sixteen is the new eight.}]
add: [{option: {option: huge, outputs: {width: 99}, requires: [{id: n, protects: speed, that: {model.n: 9}, reason: "{model.n}"}]}, before: wide, because: Nine want more.}]
""",
        CHOICE,
    )
    assert [one.name for one in rules.gates["fused"][0].options] == ["huge", "wide"]
    assert decide_with(rules, {"facts": {"model.n": 9}}).outputs == {"width": 99}
    assert decide_with(rules, {"facts": {"model.n": 1}}).outputs == {"width": 16}
    # The option stays and its protection is gone.
    assert "`eight`, which protects correctness, is replaced" in rules.gates["fused"][0].warnings[0]


def test_overlays_work_in_their_order_and_the_digest_knows_it() -> None:
    def one(bound: int) -> dict[str, str]:
        text = f"amends: fused/main\nreplace: [{{requirement: {{id: enough, protects: support, that: {{model.n: {bound}}}, reason: '{{model.n}}'}}, because: Because of {bound}.}}]\n"
        return {"ruleset.yaml": MANIFEST, "gates/site.yaml": text}

    there, back = parse_rule_set(BASE, [one(2), one(6)]), parse_rule_set(BASE, [one(6), one(2)])
    assert [state(there, n)[0] for n in (2, 6)] == ["off", "on"]
    assert [state(back, n)[0] for n in (2, 6)] == ["on", "off"]
    assert len({there.digest, back.digest, parse_rule_set(BASE).digest}) == 3
    assert (there.name, there.version) == ("small+site+site", "1+7+7")


def test_an_overlay_brings_gates_facts_and_requirements_of_its_own() -> None:
    rules = over(
        "feature: fused\ngate: more\napplies_to: {model.family: c}\nrequires: [{use: tiny}]\n",
        **{
            "facts/site.yaml": "facts: {env.SITE: {type: string, doc: Where we are., given_by: [environment]}}\n",
            "requirements.yaml": "requirements: {tiny: {protects: support, that: {env.SITE: here}, reason: 'We are in {env.SITE}.'}}\n",
        },
    )
    assert state(rules, 4, "c", **{"env.SITE": "here"}) == ("on", None)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("amends: fused/mian\ndrop: [{requirement: even, because: It is just so.}]", "unknown-gate: unknown gate `fused/mian`, did you mean `fused/main`?"),
        ("amends: fused/main\ndrop: [{requirement: evn, because: It is just so.}]", "unknown-requirement: gate `fused/main` has no requirement `evn`, did you mean `even`?"),
        ("amends: fused/main\ndrop: [{option: x, because: It is just so.}]", "unknown-option: gate `fused/main` has no option `x`; it has none"),
        ("amends: fused/main\ndrop: [{requirement: even, because: It is just so.}]\nreplace: [{requirement: {id: even, protects: speed, that: {model.n: 1}, reason: '{model.n}'}, because: It is just so.}]", "unknown-requirement: gate `fused/main` has no requirement `even` any more: this amendment drops it, before it replaces and adds"),
        ("amends: odd\ndrop: [{because: It is just so.}]", "unknown-requirement: unknown requirement `odd`"),
        ("amends: even\nadd: [{requirement: {use: even}, because: It is just so.}]", "wrong-amendment: nothing can be added to a shared requirement"),
        ("amends: fused/main\nadd: [{requirement: {use: even}, because: It is just so.}]", "duplicate-id: requirement `even` stands twice"),
        ("amends: fused/main\ndrop: [{because: It is just so.}]", "wrong-amendment: say what is dropped"),
        ("amends: fused/main\ndrop: [{requirement: even}]", "missing-key: missing key `because`"),
        ("amends: fused/main\nreplace: [{requirement: {protects: speed, that: {model.n: 1}, reason: '{model.n}'}, because: It is just so.}]", "wrong-amendment: a gate has several requirements; say which by `id`"),
        ("amends: fused/main\nreplace: [{applies_to: {layer.size: 1}, because: It is just so.}]", "layer-fact: `applies_to` can't read"),
        ("amends: fused/main\ndorp: []", "unknown-key: unknown key `dorp`, did you mean `drop`?"),
    ],
)  # fmt: skip
def test_wrong_amendments(text: str, fault: str) -> None:
    with pytest.raises(RuleError) as raised:
        over(text)
    assert any(fault in str(one) for one in raised.value.faults), raised.value


def test_an_overlay_extends_nothing_and_needs_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "ruleset.yaml").write_text(MANIFEST + "extends: shipped\n")
    with pytest.raises(RuleError, match="wrong-overlay: an overlay extends nothing"):
        load_rules(None, [tmp_path])
    (tmp_path / "ruleset.yaml").unlink()
    with pytest.raises(RuleError, match="no-manifest"):
        load_rules(None, [tmp_path])


def test_the_example_of_a_site_turns_on_what_it_has_validated() -> None:
    settings = {"parallel.tp_size": 8}
    states = []
    for rules in (shipped_rules(), load_rules(None, [ROOT / "examples" / "site-overlay"])):
        for model in ("moonshotai__Kimi-K2-Instruct", "moonshotai__Kimi-K2.5"):
            target = ROOT / "tests" / "corpus" / model
            facts = read_facts(target, platform="h200", set={**settings, "engine.name": "sglang"}, rules=rules)
            loads = facts.with_fact("engine.loads_fused_shared", True).with_fact("engine.moe_a2a_backend", "none")
            with capture_logs():
                found = decide(rules, loads, ["shared_experts_fusion"])["shared_experts_fusion"]
            states.append((found.state, found.outcome_ids("failed")))
    assert states == [
        ("off", ["quark-at-384"]),
        ("off", ["one-storage", "quark-at-384"]),
        ("on", []),
        ("off", ["one-storage", "quark-at-384"]),
    ]


def test_an_overlay_over_the_shipped_rules(tmp_path: Path) -> None:
    (tmp_path / "gates").mkdir()
    (tmp_path / "ruleset.yaml").write_text(MANIFEST)
    (tmp_path / "gates" / "kimi.yaml").write_text(
        "amends: shared_experts_fusion/deepseek_v3\ndrop: [{requirement: quark-at-384, because: Validated in our lab.}]\n"
    )
    rules = load_rules(None, [tmp_path])
    (gate,) = [one for one in rules.gates["shared_experts_fusion"] if one.name == "deepseek_v3"]
    assert "quark-at-384" not in [one.id for one in gate.requires]
    assert gate.warnings == ()
    assert rules.name == "shipped+site"
