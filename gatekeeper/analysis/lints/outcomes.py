"""Lints of what conditions can come to: never true, never false, never reached; each said only where it is proven."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from gatekeeper.analysis.cases import never
from gatekeeper.analysis.lints.finding import Demand, Finding, demands, gate_waivers, gates
from gatekeeper.catalogue import Catalogue
from gatekeeper.conditions import ALWAYS, All, Any_, Condition, Not
from gatekeeper.rules import Feature, Gate, Requirement, RuleSet

Judge: TypeAlias = Callable[[Requirement, Condition, Catalogue], bool]


def never_passes(rules: RuleSet) -> Iterator[Finding]:
    """Find conditions that no values of their facts meet."""
    for named in rules.conditions.values():
        if never(named.that, rules.catalogue):
            message = f"condition `{named.name}` can't hold, whatever the facts are; correct it"
            yield Finding(message=message, where=named.where, allow=named.allow)
    for shared in rules.requirements.values():
        if _fails(shared, ALWAYS, rules.catalogue):
            yield Finding(message=_failing(shared), where=shared.where, allow=shared.allow)
    for demand in _taken(rules, _fails):
        yield Finding(message=_failing(demand.requirement), where=demand.requirement.where, allow=demand.allow)
    for gate, feature in gates(rules):
        message = _gate_never_on(gate, rules.catalogue)
        if message:
            yield Finding(message=message, where=gate.where, allow=gate_waivers(gate, feature))


def never_fails(rules: RuleSet) -> Iterator[Finding]:
    """Find conditions that all values of their facts meet: they demand nothing."""
    for named in rules.conditions.values():
        if never(Not(named.that), rules.catalogue):
            message = f"condition `{named.name}` holds whatever the facts are; leave it out, or correct it"
            yield Finding(message=message, where=named.where, allow=named.allow)
    for shared in rules.requirements.values():
        if _passes(shared, ALWAYS, rules.catalogue):
            yield Finding(message=_passing(shared), where=shared.where, allow=shared.allow)
    for demand in _taken(rules, _passes):
        requirement, gate = demand.requirement, demand.gate
        applies = All((gate.applies_to, requirement.when))
        message = _passing(requirement)
        if never(applies, rules.catalogue):
            message = f"`{requirement.id}` never applies: its `when` can't hold where the gate does; correct or drop it"
        yield Finding(message=message, where=requirement.where, allow=demand.allow)


def unreachable_option(rules: RuleSet) -> Iterator[Finding]:
    """Find options that are never chosen: one before them passes whenever they do, or they never pass."""
    for gate, feature in gates(rules):
        if _gate_never_on(gate, rules.catalogue):
            continue  # a finding of its own
        for position, option in enumerate(gate.options):
            allow = (*option.allow, *gate_waivers(gate, feature))
            alone = All((gate.applies_to, _passing_all(gate.requires), _passing_all(option.requires)))
            if never(alone, rules.catalogue):
                message = f"option `{option.name}` can't pass, whatever the facts are; correct its requirements"
                yield Finding(message=message, where=option.where, allow=allow)
                continue
            if _can_be_named(gate, feature):
                continue  # whoever asks for it by name gets it
            for earlier in gate.options[:position]:
                if never(All((alone, Not(_passing_all(earlier.requires)))), rules.catalogue):
                    message = (
                        f"option `{option.name}` is never chosen: `{earlier.name}` stands before it and passes "
                        "whenever it does; change their order, or drop it"
                    )
                    yield Finding(message=message, where=option.where, allow=allow)
                    break


def _can_be_named(gate: Gate, feature: Feature) -> bool:
    return bool(feature.request.fact) and gate.request != "ignored"


def _taken(rules: RuleSet, is_so: Judge) -> Iterator[Demand]:
    """Yield the requirements for which `is_so` is proven in their gate, without shared ones for which it always is."""
    always = {name for name, shared in rules.requirements.items() if is_so(shared, ALWAYS, rules.catalogue)}
    for demand in demands(rules):
        requirement, applies_to = demand.requirement, demand.gate.applies_to
        # A gate that never applies is a finding of its own.
        judged = requirement.shared not in always and not never(applies_to, rules.catalogue)
        if judged and is_so(requirement, applies_to, rules.catalogue):
            yield demand


def _fails(requirement: Requirement, applies_to: Condition, catalogue: Catalogue) -> bool:
    """Whether it is proven to fail wherever it applies."""
    applies = All((applies_to, requirement.when))
    return never(All((applies, requirement.that)), catalogue) and not never(applies, catalogue)


def _passes(requirement: Requirement, applies_to: Condition, catalogue: Catalogue) -> bool:
    """Whether it is proven never to fail."""
    return never(All((applies_to, requirement.when, Not(requirement.that))), catalogue)


def _failing(requirement: Requirement) -> str:
    return f"`{requirement.id}` fails wherever it applies, whatever the facts are; correct its `that`"


def _passing(requirement: Requirement) -> str:
    return f"`{requirement.id}` can't fail, whatever the facts are, so it demands nothing; correct or drop it"


def _gate_never_on(gate: Gate, catalogue: Catalogue) -> str:
    if never(gate.applies_to, catalogue):
        return f"gate `{gate.name}` applies to no model: its `applies_to` can't hold; correct it"
    alone = any(_fails(requirement, gate.applies_to, catalogue) for requirement in gate.requires)
    if not alone and never(All((gate.applies_to, _passing_all(gate.requires))), catalogue):
        return f"gate `{gate.name}` is never on: its requirements contradict each other; correct them"
    return ""


def _passing_all(requirements: Iterable[Requirement]) -> Condition:
    return All(tuple(Any_((Not(one.when), one.that)) for one in requirements))
