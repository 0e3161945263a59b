"""The benchmark of rule engines: on a handful of facts all who are installed agree; no time is asserted."""

from __future__ import annotations

import pytest

from benchmarks import handwritten, rule_engines
from benchmarks.peers import PEERS, Answers, Formulas
from gatekeeper import load_rules
from gatekeeper.lean import CompiledFeature

RULES = rule_engines.one_gate(load_rules())
FEATURE = CompiledFeature(RULES, rule_engines.FEATURE)
FORMULAS = Formulas(RULES.catalogue, RULES.features[rule_engines.FEATURE], RULES.gates[rule_engines.FEATURE][0])
COMPLETE = Answers(FORMULAS, RULES.gates[rule_engines.FEATURE][0])
FACTS = rule_engines.random_facts(300)


def test_the_handwritten_function_agrees() -> None:
    assert next(rule_engines.disagreements(FEATURE, COMPLETE, [], FACTS), None) is None
    assert {handwritten.state(values) for values in FACTS} == {"on", "off", "pending", "error"}


@pytest.mark.peers
@pytest.mark.parametrize("make", PEERS, ids=lambda make: make.__name__)
def test_a_peer_agrees(make: object) -> None:
    peer = make(FORMULAS, rule_engines.domain_of(FORMULAS))  # type: ignore[operator]
    prepared = [peer.prepare(FORMULAS.facts(list(rule_engines.DOMAIN), values)) for values in FACTS[:20]]
    assert next(rule_engines.disagreements(FEATURE, COMPLETE, [(peer, prepared)], FACTS[:20]), None) is None


def test_a_disagreement_is_seen_and_fails_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(handwritten, "state", lambda values: "on")
    assert rule_engines.main(["--facts", "20", "--no-peers", "--no-scaling"]) == 1
    printed = capsys.readouterr().out
    assert "handwritten: ('on'" in printed
    assert "facts: {'model.family'" in printed
