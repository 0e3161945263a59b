"""What generated code calls instead of spelling it out: tests of lists, of modules' names and of layers; and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from gatekeeper.conditions import TEMPLATE, FactRef, ItemTests, Test
from gatekeeper.names import covers, glob
from gatekeeper.operators import NEGATED, OPERATORS
from gatekeeper.values import ABSENT, Missing, Truth, Value, Values, shown, spelt

LAYERS = "layers"
"""Key under which a scope holds the values of the runner's layers; no fact is called that, for facts have a dot."""

Closure: TypeAlias = Callable[[Values], Truth]


def over_layers(every: bool, among: Closure, that: Closure) -> Closure:
    """`every_layer` or `any_layer`, from the two conditions under it."""

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


def record_absent(wanted: bool, names: Iterable[str]) -> Closure:
    """`absent` of a record, which is there by its fields."""
    fields = tuple(names)

    def evaluate(values: Values) -> Truth:
        found = [values.get(name) for name in fields]
        if any(value is not None and value is not ABSENT for value in found):
            return not wanted
        return None if None in found else wanted

    return evaluate


def over_items(test: Test, operand: ItemTests) -> Closure:
    """`any_item` or `every_item` of a list."""
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


def covered(test: Test) -> Closure:
    """`covers`: whether a pattern list covers the name of a module."""
    fact, template, names = test.fact, str(test.operand), test.refers

    def evaluate(values: Values) -> Truth:
        found = [values.get(name) for name in (fact, *names)]
        if ABSENT in found:
            return False
        if None in found:
            return None
        patterns: Any = values[fact]
        return covers(str(values["quant.method"]), patterns, fill(template, values, write=spelt))

    return evaluate


def show(value: Any) -> str:
    """Return a value as a sentence shows it, where None is unknown."""
    return "unknown" if value is None else shown(value)


def fill(
    template: str,
    values: Values,
    extra: dict[str, str] | None = None,
    write: Callable[[Value | Missing], str] = shown,
) -> str:
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
        return write(value)

    return TEMPLATE.sub(place, template)
