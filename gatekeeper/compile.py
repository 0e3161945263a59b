"""Condition tree to closure: values in, true / false / unknown (None) out. The naive meaning lives in the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from gatekeeper.conditions import TEMPLATE, All, Condition, FactRef, ItemTests, Layers, Not, Test
from gatekeeper.names import covers, glob
from gatekeeper.operators import NEGATED, OPERATORS
from gatekeeper.values import ABSENT, UNKNOWN, Truth, Value, Values, records_equal, shown

if TYPE_CHECKING:
    from gatekeeper.catalogue import Catalogue

LAYERS = "layers"
"""Key under which a scope holds the values of the runner's layers; no fact is called that, for facts have a dot."""

Closure: TypeAlias = Callable[[Values], Truth]


def compile_condition(condition: Condition, catalogue: Catalogue) -> Closure:
    """Return the closure of a condition."""
    if isinstance(condition, Test):
        return _test(condition, catalogue)
    if isinstance(condition, Not):
        inner = compile_condition(condition.part, catalogue)
        return lambda values: None if (truth := inner(values)) is None else not truth
    if isinstance(condition, Layers):
        return _layers(condition, catalogue)
    parts = tuple(compile_condition(part, catalogue) for part in condition.parts)
    return conjunction(parts) if isinstance(condition, All) else _disjunction(parts)


def conjunction(parts: tuple[Closure, ...]) -> Closure:
    """False as soon as one is false, else unknown if one is unknown."""
    if len(parts) == 1:
        return parts[0]

    def evaluate(values: Values) -> Truth:
        result: Truth = True
        for part in parts:
            truth = part(values)
            if truth is False:
                return False
            if truth is None:
                result = None
        return result

    return evaluate


def _disjunction(parts: tuple[Closure, ...]) -> Closure:
    def evaluate(values: Values) -> Truth:
        result: Truth = False
        for part in parts:
            truth = part(values)
            if truth:
                return True
            if truth is None:
                result = None
        return result

    return evaluate


def _layers(condition: Layers, catalogue: Catalogue) -> Closure:
    among = compile_condition(condition.among, catalogue)
    that = compile_condition(condition.that, catalogue)
    every = condition.every

    def evaluate(values: Values) -> Truth:
        layers: Any = values.get(LAYERS)
        if layers is None:
            return None
        met: list[tuple[Truth, Truth]] = []
        for layer in layers:
            scope = {**values, **layer}
            if (chosen := among(scope)) is not False:
                met.append((chosen, that(scope)))
        if every:
            # False, with a note, where no layer meets `where`: there is nothing to vouch for.
            if not met or any(chosen and truth is False for chosen, truth in met):
                return False
            sure = any(chosen for chosen, _ in met) and all(truth for _, truth in met)
            return True if sure else None
        if any(chosen and truth for chosen, truth in met):
            return True
        return False if all(truth is False for _, truth in met) else None

    return evaluate


def _test(test: Test, catalogue: Catalogue) -> Closure:
    if test.operator in NEGATED:
        positive = Test(test.fact, NEGATED[test.operator], test.operand, test.where, test.refers)
        inner = _test(positive, catalogue)
        return lambda values: None if (truth := inner(values)) is None else not truth
    spec = catalogue[test.fact]
    if test.operator == "absent":
        return _absent(test, tuple(f"{test.fact}.{key}" for key in spec.fields) or (test.fact,))
    if test.operator == "covers":
        return _covers(test)
    if spec.type == "record" and isinstance(test.operand, FactRef):
        other = test.operand.name
        return _records(tuple((f"{test.fact}.{key}", f"{other}.{key}") for key in spec.fields))
    fact, holds = test.fact, OPERATORS[test.operator].holds
    if isinstance(test.operand, FactRef):
        assert holds is not None
        return _against_fact(fact, test.operand.name, holds)
    if isinstance(test.operand, ItemTests):
        return _items(test, test.operand)
    assert holds is not None
    return _against_value(fact, glob(str(test.operand)) if test.operator == "matches" else test.operand, holds)


def _against_value(fact: str, operand: Any, holds: Callable[[Any, Any], bool]) -> Closure:
    def evaluate(values: Values) -> Truth:
        value = values.get(fact)
        if value is None:
            return None
        return value is not ABSENT and holds(value, operand)

    return evaluate


def _against_fact(fact: str, other: str, holds: Callable[[Any, Any], bool]) -> Closure:
    def evaluate(values: Values) -> Truth:
        left, right = values.get(fact), values.get(other)
        if left is ABSENT or right is ABSENT:
            return False
        if left is None or right is None:
            return None
        return holds(left, right)

    return evaluate


def _absent(test: Test, names: tuple[str, ...]) -> Closure:
    wanted = bool(test.operand)

    def evaluate(values: Values) -> Truth:
        found = [values.get(name) for name in names]
        if any(value is not None and value is not ABSENT for value in found):
            return not wanted
        return None if None in found else wanted

    return evaluate


def _records(pairs: tuple[tuple[str, str], ...]) -> Closure:
    return lambda values: records_equal((values.get(one, UNKNOWN), values.get(other, UNKNOWN)) for one, other in pairs)


def _items(test: Test, operand: ItemTests) -> Closure:
    tests = tuple(_item_test(inner) for inner in operand.tests)
    fact, every = test.fact, test.operator == "every_item"

    def evaluate(values: Values) -> Truth:
        items: Any = values.get(fact)
        if items is None:
            return None
        if items is ABSENT:
            return False
        truths = [_kleene_all(one(item, values) for one in tests) for item in items]
        if every:
            return _kleene_all(truths)
        if True in truths:
            return True
        return None if None in truths else False

    return evaluate


def _item_test(test: Test) -> Callable[[Any, Values], Truth]:
    """One test of an item that is known; its right side may be another fact."""
    holds = OPERATORS[NEGATED.get(test.operator, test.operator)].holds
    assert holds is not None
    negated = test.operator in NEGATED
    constant = glob(str(test.operand)) if test.operator == "matches" else test.operand
    other = test.operand.name if isinstance(test.operand, FactRef) else ""

    def evaluate(item: Any, values: Values) -> Truth:
        right: Any = values.get(other) if other else constant
        if right is None:
            return None
        truth = right is not ABSENT and holds(item, right)
        return truth != negated

    return evaluate


def _kleene_all(truths: Iterable[Truth]) -> Truth:
    found = list(truths)
    if False in found:
        return False
    return None if None in found else True


def _covers(test: Test) -> Closure:
    fact, template, names = test.fact, str(test.operand), test.refers

    def evaluate(values: Values) -> Truth:
        found = [values.get(name) for name in (fact, *names)]
        if ABSENT in found:
            return False
        if None in found:
            return None
        patterns: Any = values[fact]
        return covers(str(values["quant.method"]), patterns, fill(template, values))

    return evaluate


def fill(template: str, values: Values, extra: dict[str, str] | None = None) -> str:
    """Put facts into the `{fact}` places of a text: `none` if absent, `unknown` if unknown."""

    def place(found: Any) -> str:
        if found[1] is None:
            return str(found[0][0])
        if extra and found[1] in extra:
            return extra[found[1]]
        value: Value | Any | None = values.get(found[1])
        if value is None:
            # A record is there by its fields.
            start = found[1] + "."
            value = {name.removeprefix(start): one for name, one in values.items() if name.startswith(start)}
            if all(one is ABSENT for one in value.values()):
                return "none" if value else "unknown"
        return shown(value)

    return TEMPLATE.sub(place, template)
