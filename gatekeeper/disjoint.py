"""Whether two conditions can both hold, as far as sets of constants tell."""

from __future__ import annotations

from typing import Any

from gatekeeper.conditions import All, Any_, Condition, FactRef, Test
from gatekeeper.values import ABSENT


def disjoint(one: Condition, other: Condition) -> bool:
    """Whether two conditions can't both hold, as far as sets of constants tell."""
    left, right = _constants(one), _constants(other)
    return any(not (left[fact] & right[fact]) for fact in left.keys() & right.keys())


def _constants(condition: Condition) -> dict[str, frozenset[Any]]:
    """Return, for each fact that a condition pins to constants, which; `ABSENT` where it must be absent."""
    if isinstance(condition, Test):
        if condition.operator == "eq" and not isinstance(condition.operand, FactRef):
            return {condition.fact: frozenset({condition.operand})}
        if condition.operator == "in" and isinstance(condition.operand, tuple):
            return {condition.fact: frozenset(condition.operand)}
        if condition.operator == "absent" and condition.operand:
            return {condition.fact: frozenset({ABSENT})}
        return {}
    if isinstance(condition, All):
        merged: dict[str, frozenset[Any]] = {}
        for part in condition.parts:
            for fact, values in _constants(part).items():
                merged[fact] = merged[fact] & values if fact in merged else values
        return merged
    if isinstance(condition, Any_):
        branches = [_constants(part) for part in condition.parts]
        common = set.intersection(*(set(branch) for branch in branches))
        return {fact: frozenset().union(*(branch[fact] for branch in branches)) for fact in common}
    return {}
