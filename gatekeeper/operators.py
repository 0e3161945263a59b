"""Operator word to a typed test of one known value; absent and unknown are decided before these are asked."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCALARS = frozenset({"boolean", "integer", "number", "string", "enum", "version", "arch"})
NUMBERS = frozenset({"integer", "number"})
ORDERED = NUMBERS | {"version", "arch"}
TEXTS = frozenset({"string", "enum"})


@dataclass(frozen=True, slots=True)
class Operator:
    """One word of the rule language that compares a fact's value with an operand."""

    word: str
    left: frozenset[str]
    """Types of facts that it may test."""
    operand: str
    """What stands on its right: `same` (a value of the fact's type), `list` of such, `item`, `test`, `glob`, `name`."""
    holds: Callable[[Any, Any], bool] | None
    """Both sides known; None for `covers`, `any_item` and `every_item`, which need more than two values."""
    phrase: str
    """How an outcome says it: ``model.n_routed_experts is 160, expected one of [256, 384]``."""


def _equals(left: Any, right: Any) -> bool:
    # Booleans are not integers, though Python's are.
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _within(left: Any, right: Any) -> bool:
    return any(_equals(left, item) for item in right)


def _contains(left: Any, right: Any) -> bool:
    return _within(right, left)


def _divisible(left: Any, right: Any) -> bool:
    return bool(right != 0 and left % right == 0)


def _matches(left: Any, right: Any) -> bool:
    return bool(right(left))


OPERATORS: dict[str, Operator] = {
    op.word: op
    for op in (
        Operator("eq", SCALARS | {"record"}, "same", _equals, "expected"),
        Operator("ne", SCALARS | {"record"}, "same", lambda a, b: not _equals(a, b), "expected anything but"),
        Operator("in", SCALARS, "list", _within, "expected one of"),
        Operator("not_in", SCALARS, "list", lambda a, b: not _within(a, b), "expected none of"),
        Operator("gt", ORDERED, "same", operator.gt, "expected more than"),
        Operator("ge", ORDERED, "same", operator.ge, "expected at least"),
        Operator("lt", ORDERED, "same", operator.lt, "expected less than"),
        Operator("le", ORDERED, "same", operator.le, "expected at most"),
        Operator("divisible_by", NUMBERS, "same", _divisible, "expected a multiple of"),
        Operator("contains", frozenset({"list"}), "item", _contains, "expected to contain"),
        Operator("any_item", frozenset({"list"}), "test", None, "expected an item with"),
        Operator("every_item", frozenset({"list"}), "test", None, "expected every item with"),
        Operator("matches", TEXTS, "glob", _matches, "expected a match of"),
        Operator("covers", frozenset({"list"}), "name", None, "expected to cover"),
    )
}

NEGATED = {"ne": "eq", "not_in": "in"}
"""`ne` and `not_in` are exactly the negation of these, so they hold for an absent fact."""
