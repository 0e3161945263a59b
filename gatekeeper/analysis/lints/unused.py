"""Lints of what nothing uses: facts, conditions, shared requirements; features and families that have no gate."""

from __future__ import annotations

from collections.abc import Iterator

from gatekeeper.analysis.cases import can_hold
from gatekeeper.analysis.lints.finding import Finding, gates
from gatekeeper.conditions import All, Condition, FactRef, Test, facts_of, places
from gatekeeper.fact_spec import FEATURE_GROUP, FactSpec
from gatekeeper.families import Family
from gatekeeper.rules import Gate, RuleSet

_SELECTORS = ("model.family", "model.architecture")


def unused_fact(rules: RuleSet) -> Iterator[Finding]:
    """Find facts that nothing reads."""
    used = _used_facts(rules)
    for spec in rules.catalogue.values():
        whole = spec.name.rpartition(".")[0]
        if whole in rules.catalogue or spec.group == FEATURE_GROUP:
            continue  # a field of a record counts with it, what a feature came to with the feature
        if not used & {spec.name, *(f"{spec.name}.{key}" for key in spec.fields)}:
            message = f"nothing reads the fact `{spec.name}`; drop it, or say who does"
            yield Finding(message=message, where=spec.where, allow=spec.allow)


def unused_condition(rules: RuleSet) -> Iterator[Finding]:
    """Find named conditions that nothing uses."""
    for name, condition in rules.conditions.items():
        if f"condition {name}" not in rules.used:
            message = f"nothing uses the condition `{name}`; drop it"
            yield Finding(message=message, where=condition.where, allow=condition.allow)


def unused_requirement(rules: RuleSet) -> Iterator[Finding]:
    """Find shared requirements that no gate takes."""
    for name, requirement in rules.requirements.items():
        if f"requirement {name}" not in rules.used:
            message = f"no gate takes the shared requirement `{name}`; drop it"
            yield Finding(message=message, where=requirement.where, allow=requirement.allow)


def ungated_feature(rules: RuleSet) -> Iterator[Finding]:
    """Find features that are off for every model, since there is no gate."""
    for feature in rules.features.values():
        if not rules.gates[feature.name]:
            message = (
                f"no gate decides `{feature.name}`, so that it is off for every model; write one in this file or under "
                f"`gates/{feature.name}/`"
            )
            yield Finding(message=message, where=feature.where, allow=feature.allow)


def uncovered_family(rules: RuleSet) -> Iterator[Finding]:
    """Find families that no gate covers and whose file does not say why, of features whose gates go by family."""
    for feature, found in rules.gates.items():
        by_family = bool(found) and all(facts_of(gate.applies_to) & set(_SELECTORS) for gate in found)
        for family in rules.families.values():
            covered = any(_covers(gate, family, rules) for gate in found)
            if by_family and not covered and feature not in family.gateless:
                message = (
                    f"no gate of `{feature}` covers the family `{family.name}`; write one, or `gateless: "
                    f"{{{feature}: reason}}` in this file"
                )
                allow = (*family.allow, *rules.features[feature].allow)
                yield Finding(message=message, where=family.where, allow=allow)


def idle_gateless(rules: RuleSet) -> Iterator[Finding]:
    """Find reasons for having no gate where there is one, or no such feature."""
    for family in rules.families.values():
        for feature in family.gateless:
            if feature not in rules.features:
                message = f"`gateless` speaks of `{feature}`, and there is no such feature; drop it"
                yield Finding(message=message, where=family.where, allow=family.allow)
            elif any(_covers(gate, family, rules) for gate in rules.gates[feature]):
                message = f"`gateless` says that no gate of `{feature}` covers this family, and one does; drop it"
                yield Finding(message=message, where=family.where, allow=family.allow)


def _covers(gate: Gate, family: Family, rules: RuleSet) -> bool:
    this = Test("model.family", "eq", family.name, family.where)
    parts: list[Condition] = [gate.applies_to]
    if "model.family" in rules.catalogue:
        parts.append(this)
    if "model.architecture" in rules.catalogue and family.architectures:
        parts.append(Test("model.architecture", "in", tuple(sorted(family.architectures)), family.where))
    return can_hold(All(tuple(parts)), rules.catalogue) is not False


def _used_facts(rules: RuleSet) -> frozenset[str]:
    used: set[str] = set()
    for condition in rules.conditions.values():
        used |= facts_of(condition.that)
    for requirement in rules.requirements.values():
        used |= facts_of(All((requirement.when, requirement.that))) | set(places(requirement.reason))
    for gate, _ in gates(rules):
        used |= facts_of(gate.applies_to)
        for requirement in gate.demands:
            used |= facts_of(All((requirement.when, requirement.that))) | set(places(requirement.reason))
        given = [*gate.outputs.values(), *(one for option in gate.options for one in option.outputs.values())]
        used |= {one.name for one in given if isinstance(one, FactRef)}
    for feature in rules.features.values():
        used |= set(feature.request.names)
        used |= {one.value.name for one in feature.outputs.values() if isinstance(one.value, FactRef)}
    for family in rules.families.values():
        used |= {*family.facts, *family.from_, *family.moe_layer.names}
    for preset in (*rules.platforms.values(), *rules.layouts.values()):
        used |= set(preset)
    for spec in rules.catalogue.values():
        used |= _read_by(spec)
    return frozenset(used)


def _read_by(spec: FactSpec) -> set[str]:
    """Return the facts that another one is derived from, or (`engine.X`) follows."""
    names = {name for one in (spec.derive, spec.default_derive) if one is not None for name in one.names}
    return names | ({f"server.{spec.name.partition('.')[2]}"} if spec.group == "engine" else set())
