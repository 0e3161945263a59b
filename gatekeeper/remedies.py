"""What an operator can change so that a refused feature's requirement passes, found by deciding again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gatekeeper.decision import Decision, Outcome
from gatekeeper.errors import FactError
from gatekeeper.facts import Facts
from gatekeeper.values import Value, shown


def with_remedies(decision: Decision, facts: Facts, again: Callable[[Facts], Decision]) -> Decision:
    """Let an error say which controllable facts would make the failed requirement pass; each is tried by `again`."""
    culprit = next((one for one in decision.outcomes if one.id == decision.decided_by), None)
    if decision.state != "error" or culprit is None:
        return decision
    found = []
    for name in sorted(facts.catalogue.inputs(check.fact for check in culprit.checks)):
        values = facts.catalogue[name].controllable
        passing = [value for value in values if _passes(again, facts, name, value, culprit)]
        if passing:
            found.append(f"`{name}` {' or '.join(map(shown, passing))}")
    if not found:
        return decision
    return replace(decision, reason=f"{decision.reason} `{culprit.id}` passes with {', or with '.join(found)}.")


def _passes(again: Callable[[Facts], Decision], facts: Facts, name: str, value: Value, culprit: Outcome) -> bool:
    if facts.values.get(name) == value:
        return False
    try:
        decision = again(facts.with_fact(name, value))
    except FactError:
        return False
    states = [(one.id, one.option, one.state) for one in decision.outcomes]
    return any((culprit.id, culprit.option, state) in states for state in ("passed", "not_applicable"))
