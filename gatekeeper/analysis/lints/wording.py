"""Lints of what a person is told: reasons without a value, demands without a reference."""

from __future__ import annotations

from collections.abc import Iterator

from gatekeeper.analysis.lints.finding import Finding, demands, place
from gatekeeper.conditions import places
from gatekeeper.rules import RuleSet


def reason_without_value(rules: RuleSet) -> Iterator[Finding]:
    """Find reasons that do not say what was found."""
    for demand in demands(rules):
        requirement = demand.requirement
        if not places(requirement.reason):
            message = f"the reason of `{requirement.id}` names no actual value; put a {{fact}} or {{difference}} in it"
            yield Finding(message=message, where=place(requirement, rules), allow=demand.allow)


def missing_refs(rules: RuleSet) -> Iterator[Finding]:
    """Find requirements that refer to no report, change or document, in gates that do not either."""
    for demand in demands(rules):
        if not demand.refs:
            message = f"`{demand.requirement.id}` has no `refs`, nor has its gate; name the report or change behind it"
            yield Finding(message=message, where=place(demand.requirement, rules), allow=demand.allow)
