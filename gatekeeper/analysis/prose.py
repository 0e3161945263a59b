"""Conditions and values in plain English: for documentation and explanations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gatekeeper.conditions import All, Condition, FactRef, ItemTests, Layers, Not, Test
from gatekeeper.values import Value, shown

PHRASES: Mapping[str, str] = {
    "eq": "is {}",
    "ne": "is not {}",
    "in": "is {}",
    "not_in": "is not {}",
    "gt": "is more than {}",
    "ge": "is at least {}",
    "lt": "is less than {}",
    "le": "is at most {}",
    "divisible_by": "is a multiple of {}",
    "contains": "contains {}",
    "any_item": "has an item that {}",
    "every_item": "has items of which every one {}",
    "matches": "matches {}",
    "covers": "covers the module {}",
}
"""What each operator says of its fact."""

Label = Callable[[str], str]


def in_words(condition: Condition, names: Mapping[Condition, str] | None = None, label: Label = str) -> str:
    """Say a condition as a clause, facts and texts in backticks: "`model.n` is 4 and `quant.method` is `quark`".

    `names` are the conditions that have a name; where one of them stands, `label(name)` is added.
    """
    return _clause(condition, names or {}, label, nested=False)


def _clause(condition: Condition, names: Mapping[Condition, str], label: Label, *, nested: bool) -> str:
    text, compound = _say(condition, names, label)
    if condition in names:
        return f"{f'({text})' if compound else text} ({label(names[condition])})"
    return f"({text})" if compound and nested else text


def _say(condition: Condition, names: Mapping[Condition, str], label: Label) -> tuple[str, bool]:
    """Return the text, and whether it needs brackets inside another."""

    def inner(part: Condition, *, nested: bool = True) -> str:
        return _clause(part, names, label, nested=nested)

    if isinstance(condition, Test):
        return f"`{condition.fact}` {predicate(condition)}", False
    if isinstance(condition, Not):
        return f"not {inner(condition.part)}", False
    if isinstance(condition, Layers):
        which = "every" if condition.every else "some"
        among = "" if condition.among == All(()) else f" where {inner(condition.among)}"
        return f"in {which} MoE layer{among}, {inner(condition.that)}", True
    if not condition.parts:
        return ("always" if isinstance(condition, All) else "never"), False
    if len(condition.parts) == 1:
        return inner(condition.parts[0], nested=False), False
    word = "and" if isinstance(condition, All) else "or"
    parts = [inner(part) for part in condition.parts]
    # A comma keeps "is 1 or 2" apart from the "or" that joins.
    glue = f", {word} " if any(" or " in part for part in parts) else f" {word} "
    return glue.join(parts), True


def predicate(test: Test) -> str:
    """Say what a test demands, without the fact: ``is at least 4``."""
    if test.operator == "absent":
        return "is absent" if test.operand else "is there"
    if isinstance(test.operand, FactRef) and test.operator in ("eq", "ne"):
        return f"{'equals' if test.operator == 'eq' else 'differs from'} `{test.operand.name}`"
    return PHRASES[test.operator].format(_operand(test))


def _operand(test: Test) -> str:
    operand = test.operand
    if isinstance(operand, FactRef):
        return f"one of `{operand.name}`" if test.operator in ("in", "not_in") else f"`{operand.name}`"
    if isinstance(operand, ItemTests):
        return " and ".join(predicate(one) for one in operand.tests)
    if test.operator in ("in", "not_in") and isinstance(operand, tuple):
        words = [value_in_words(one) for one in operand]
        return words[0] if len(words) == 1 else listed(words, "or")
    return value_in_words(operand)


def value_in_words(value: Value) -> str:
    """Return a value as a sentence has it: numbers and booleans plain, the rest in backticks."""
    return shown(value) if isinstance(value, bool | int | float) else f"`{shown(value)}`"


def listed(words: Sequence[Any], last: str = "and") -> str:
    """Return words as a sentence lists them: ``a, b and c``."""
    texts = [str(word) for word in words]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}"


def count(number: int, word: str, plural: str | None = None) -> str:
    """``2 errors``, ``1 error``, ``3 families``."""
    return f"{number} {word if number == 1 else plural or f'{word}s'}"
