"""What an outcome rests on: every atomic condition with the value found, its witness and the line of the rule."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from gatekeeper.catalogue import Catalogue
from gatekeeper.closures import LAYERS, fill
from gatekeeper.compile import compile_condition
from gatekeeper.conditions import Condition, FactRef, ItemTests, Layers, Not, Test, tests_of
from gatekeeper.decision import Check
from gatekeeper.facts import Facts
from gatekeeper.operators import OPERATORS
from gatekeeper.rules import Requirement
from gatekeeper.values import ABSENT, UNKNOWN, Missing, Reading, Readings, Value, Values, plain, shown


def collect(
    condition: Condition, values: Values, facts: Facts, layer: Readings | None, catalogue: Catalogue
) -> Iterator[Check]:
    """Yield a Check for each atomic test of a condition, in file order; of layers, for each layer."""
    if isinstance(condition, Test):
        yield _check(condition, values, facts, layer, catalogue)
    elif isinstance(condition, Not):
        yield from collect(condition.part, values, facts, layer, catalogue)
    elif isinstance(condition, Layers):
        layers: Any = values.get(LAYERS)
        for own, readings in zip(layers or (), facts.runner_layers or (), strict=True):
            scope = {**values, **own}
            yield from collect(condition.among, scope, facts, readings, catalogue)
            yield from collect(condition.that, scope, facts, readings, catalogue)
        if layers is not None and not layers:
            yield from _no_layer(condition, "there is no MoE layer")
        elif condition.every and layers is not None:
            among = compile_condition(condition.among, catalogue)
            if all(among({**values, **own}) is False for own in layers):
                yield from _no_layer(condition, "no MoE layer meets `where`, so there is nothing to vouch for")
    else:
        for part in condition.parts:
            yield from collect(part, values, facts, layer, catalogue)


def _no_layer(condition: Layers, note: str) -> Iterator[Check]:
    """Say that a condition on layers is false because it ranges over none, by the first test that would be asked."""
    for test in islice((*tests_of(condition.among), *tests_of(condition.that)), 1):
        yield Check(
            fact=test[0].fact,
            actual=ABSENT,
            witness="",
            note=note,
            operator=test[0].operator,
            expected=expected(test[0]),
            truth=False,
            where=f"{condition.where.file}:{condition.where.line}",
        )


def _check(test: Test, values: Values, facts: Facts, layer: Readings | None, catalogue: Catalogue) -> Check:
    reading = _reading(test.fact, facts, layer, catalogue)
    return Check(
        fact=test.fact,
        actual=reading.value,
        witness=reading.witness,
        note=reading.note,
        operator=test.operator,
        expected=expected(test),
        truth=compile_condition(test, catalogue)(values),
        where=f"{test.where.file}:{test.where.line}",
    )


def _reading(name: str, facts: Facts, layer: Readings | None, catalogue: Catalogue) -> Reading:
    fields = catalogue[name].fields
    if not fields:
        return facts.reading(name, layer)
    parts = {key: facts.reading(f"{name}.{key}", layer) for key in fields}
    witness = next((part.witness for part in parts.values() if part.witness), "")
    note = next((part.note for part in parts.values() if part.note), "")
    found = {key: part.value for key, part in parts.items()}
    if all(value is UNKNOWN for value in found.values()):
        return Reading(UNKNOWN, witness, note)
    if all(value is ABSENT for value in found.values()):
        return Reading(ABSENT, witness, note)
    return Reading({key: value for key, value in found.items() if value is not UNKNOWN}, witness, note)


def expected(test: Test) -> Any:
    """Return the right side of a test as JSON has it."""
    if isinstance(test.operand, FactRef):
        return {"fact": test.operand.name}
    if isinstance(test.operand, ItemTests):
        return {inner.operator: expected(inner) for inner in test.operand.tests}
    return plain(test.operand)


def sentence(rule: Requirement, values: Values, catalogue: Catalogue) -> str:
    """Return the reason of a requirement with its facts filled in."""
    extra = {}
    if "{difference}" in rule.reason:
        extra["difference"] = difference(rule.that, values, catalogue)
    return fill(rule.reason, values, extra)


def difference(condition: Condition, values: Values, catalogue: Catalogue) -> str:
    """Say what differs in the first comparison that does not hold: ``width 1024, not 2048``."""
    for test in _tests(condition):
        if test.operator != "absent" and compile_condition(test, catalogue)(values) is not True:
            return _difference(test, values, catalogue)
    return "nothing"


def _tests(condition: Condition) -> Iterator[Test]:
    if isinstance(condition, Test):
        yield condition
    elif isinstance(condition, Not):
        yield from _tests(condition.part)
    elif not isinstance(condition, Layers):
        for part in condition.parts:
            yield from _tests(part)


def _difference(test: Test, values: Values, catalogue: Catalogue) -> str:
    def found(name: str) -> Value | Missing:
        return values.get(name, UNKNOWN)

    if not isinstance(test.operand, FactRef):
        phrase = OPERATORS[test.operator].phrase
        wanted = expected(test)
        return f"{shown(found(test.fact))}, {phrase} {shown(tuple(wanted) if isinstance(wanted, list) else wanted)}"
    other = test.operand.name
    fields = catalogue[test.fact].fields
    if not fields:
        return f"{shown(found(test.fact))}, not {shown(found(other))}"
    pairs = [(key, found(f"{test.fact}.{key}"), found(f"{other}.{key}")) for key in fields]
    if any(all(pair[side] is ABSENT for pair in pairs) for side in (1, 2)):
        gone = test.fact if all(pair[1] is ABSENT for pair in pairs) else other
        return f"there is no {gone}"
    differing = [pair for pair in pairs if not (pair[1] is not UNKNOWN and pair[1] == pair[2])]
    return "; ".join(f"{key} {shown(one)}, not {shown(two)}" for key, one, two in differing)
