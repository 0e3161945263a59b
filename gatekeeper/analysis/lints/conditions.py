"""Lints of single tests: ranges open to devices of tomorrow, values that nobody has seen, names instead of evidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gatekeeper.analysis.lints.finding import Finding, demands, gate_waivers, gates, place
from gatekeeper.catalogue import Catalogue
from gatekeeper.conditions import All, Any_, Condition, FactRef, ItemTests, Layers, Not, Test, facts_of, tests_of
from gatekeeper.errors import Where
from gatekeeper.fact_spec import FAMILY_FACT, FEATURE_GROUP, FactSpec
from gatekeeper.rules import NamedCondition, RuleSet
from gatekeeper.source import nearest
from gatekeeper.values import Value, shown
from gatekeeper.waivers import Waiver

ARCHITECTURE_FACT = "model.architecture"
CAPABILITY = "platform.capability"
QUANTIZER_NAMES = frozenset({"quant.method", "quant.algo"})
_UP, _DOWN = frozenset({"gt", "ge"}), frozenset({"lt", "le"})
_CLOSED = frozenset({"eq", "in"})
# The word for "not this": `not: {platform.arch: {lt: sm90}}` is open upward.
_OPPOSITE = {"gt": "le", "ge": "lt", "lt": "ge", "le": "gt", "eq": "ne", "in": "not_in", "ne": "eq", "not_in": "in"}
Bounds = Mapping[str, frozenset[str]]
"""For each fact, the words that bound it where a test stands."""


@dataclass(frozen=True, slots=True)
class _Written:
    """A condition as it is written, with the bounds and the waivers of the place."""

    condition: Condition
    bounds: Bounds
    allow: tuple[Waiver, ...]


def open_range(rules: RuleSet) -> Iterator[Finding]:
    """Find ranges of architectures or capabilities with one end."""
    owners = _Owners(rules)
    for written in _conditions(rules):
        for test, bounds in _ranged(written.condition, written.bounds, rules.catalogue, negated=False):
            words = bounds.get(test.fact, frozenset())
            if words & _CLOSED or (words & _UP and words & _DOWN):
                continue
            admitted = "that does not exist yet" if words & _UP else "however old"
            message = (
                f"`{test.operator}` leaves `{test.fact}` open at one end, to any device {admitted}; "
                "list those that are known to work, or bound it on both sides"
            )
            yield Finding(message=message, where=test.where, allow=owners.allow(test.where, written.allow))


def unlisted_value(rules: RuleSet) -> Iterator[Finding]:
    """Find constants that the catalogue does not list among the known values of a fact."""
    owners = _Owners(rules)
    for written in _conditions(rules):
        for test, _ in tests_of(written.condition):
            spec = rules.catalogue[test.fact]
            known = _known(rules, spec)
            for value in _constants(test):
                if known and shown(value) not in known:
                    hint = nearest(shown(value), known) or _listing(spec)
                    message = f"`{shown(value)}` is not among the known values of `{spec.name}`{hint}"
                    yield Finding(message=message, where=test.where, allow=owners.allow(test.where, written.allow))


def _known(rules: RuleSet, spec: FactSpec) -> Sequence[str]:
    if spec.name == FAMILY_FACT:
        return tuple(rules.families)
    if spec.name == ARCHITECTURE_FACT and not spec.known_values:
        found = [{*family.architectures, *family.wrapper_architectures} for family in rules.families.values()]
        return sorted(set().union(*found)) if all(found) else ()  # some are known by another name
    return spec.known_values


def _listing(spec: FactSpec) -> str:
    if spec.name in (FAMILY_FACT, ARCHITECTURE_FACT):
        return "; correct it, or add the family to families/"
    if spec.group == FEATURE_GROUP:
        return f"; it has {', '.join(f'`{value}`' for value in spec.known_values)}"
    return "; correct it, or add it to `known_values`"


def quantization_by_name(rules: RuleSet) -> Iterator[Finding]:
    """Find requirements that trust the quantizer's name where the checkpoint's own storage could be asked."""
    evidence = [spec.name for spec in rules.catalogue.values() if _tells_storage(spec)]
    if not evidence:
        return
    for demand in demands(rules):
        requirement = demand.requirement
        whole = All((requirement.when, requirement.that))
        if any(fact.startswith(tuple(evidence)) for fact in facts_of(whole)):
            continue
        for fact in sorted(
            {test.fact for test, _ in tests_of(whole) if test.fact in QUANTIZER_NAMES and _constants(test)}
        ):
            message = (
                f"`{requirement.id}` decides by the name in `{fact}`; "
                f"what is stored can be asked: test {' or '.join(f'`{name}`' for name in evidence)}"
            )
            yield Finding(message=message, where=place(requirement, rules), allow=demand.allow)


def _tells_storage(spec: FactSpec) -> bool:
    return spec.group == "layer" and spec.type == "record" and "format" in spec.fields


def _constants(test: Test) -> tuple[Value, ...]:
    """Return the values that a test compares a fact, or a list's items, with."""
    if isinstance(test.operand, ItemTests):
        return tuple(value for inner in test.operand.tests for value in _constants(inner))
    if test.operator not in ("eq", "ne", "in", "not_in", "contains") or isinstance(test.operand, FactRef):
        return ()
    return test.operand if isinstance(test.operand, tuple) else (test.operand,)


def _conditions(rules: RuleSet) -> Iterator[_Written]:
    for one in rules.conditions.values():
        yield _Written(one.that, {}, one.allow)
    for gate, feature in gates(rules):
        yield _Written(gate.applies_to, {}, gate_waivers(gate, feature))
    for demand in demands(rules):
        requirement = demand.requirement
        around = _bounds(demand.gate.applies_to, {}, negated=False)
        yield _Written(requirement.when, around, demand.allow)
        yield _Written(requirement.that, _bounds(requirement.when, around, negated=False), demand.allow)


class _Owners:
    """Who waives a lint of a test: the named condition that it is written in, else the place that has it."""

    def __init__(self, rules: RuleSet) -> None:
        self._named: dict[Where, NamedCondition] = {}
        for one in sorted(rules.conditions.values(), key=lambda named: (named.where.line, named.where.column)):
            for test, _ in tests_of(one.that):
                # A condition that uses another has the other's tests too; the nearest name above is the one.
                if test.where.file == one.where.file and test.where.line >= one.where.line:
                    self._named[test.where] = one

    def allow(self, where: Where, otherwise: tuple[Waiver, ...]) -> tuple[Waiver, ...]:
        return self._named[where].allow if where in self._named else otherwise


def _ranged(
    condition: Condition, bounds: Bounds, catalogue: Catalogue, *, negated: bool
) -> Iterator[tuple[Test, Bounds]]:
    """Yield the tests of order on devices, each with what bounds its fact in the same conjunction."""
    if isinstance(condition, Test):
        device = catalogue[condition.fact].type == "arch" or condition.fact == CAPABILITY
        if device and condition.operator in _UP | _DOWN:
            yield condition, _bounds(condition, bounds, negated=negated)
    elif isinstance(condition, Not):
        yield from _ranged(condition.part, bounds, catalogue, negated=not negated)
    elif isinstance(condition, Layers):
        inner = _bounds(condition.among, bounds, negated=False)
        yield from _ranged(condition.among, bounds, catalogue, negated=False)
        yield from _ranged(condition.that, inner, catalogue, negated=False)
    else:
        bounds = _bounds(condition, bounds, negated=negated)
        for part in condition.parts:
            yield from _ranged(part, bounds, catalogue, negated=negated)


def _bounds(condition: Condition, outer: Bounds, *, negated: bool) -> Bounds:
    """Return the words by which a conjunction bounds facts, with those of the place around it."""
    found = dict(outer)
    for test, turned in _conjuncts(condition, negated):
        word = _OPPOSITE.get(test.operator, test.operator) if turned else test.operator
        found[test.fact] = found.get(test.fact, frozenset()) | {word}
    return found


def _conjuncts(condition: Condition, negated: bool) -> Iterable[tuple[Test, bool]]:
    if isinstance(condition, Test):
        yield condition, negated
    elif isinstance(condition, Not):
        yield from _conjuncts(condition.part, not negated)
    elif isinstance(condition, All | Any_) and (isinstance(condition, Any_) == negated or len(condition.parts) == 1):
        for part in condition.parts:
            yield from _conjuncts(part, negated)
