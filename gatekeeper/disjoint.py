"""Whether two conditions can both hold, as far as sets of constants tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from gatekeeper.conditions import All, Any_, Condition, FactRef, Test
from gatekeeper.rules import Gate
from gatekeeper.values import ABSENT


def overlapping(gates: Sequence[Gate]) -> Iterator[tuple[Gate, Gate]]:
    """Yield the pairs of gates of one feature that could both apply.

    Gates that pin one fact to different constants are apart already, so only those that share one are compared: a
    feature with a thousand gates takes no million comparisons.
    """
    pinned = [_constants(gate.applies_to) for gate in gates]
    facts = Counter(fact for constants in pinned for fact in constants)
    fact = facts.most_common(1)[0][0] if facts else ""
    groups: dict[Any, list[int]] = {}
    free = [index for index, constants in enumerate(pinned) if fact not in constants]
    for index, constants in enumerate(pinned):
        for value in constants.get(fact, ()):
            groups.setdefault(value, []).append(index)
    near = {pair for group in groups.values() for pair in combinations(group, 2)}
    near |= {(min(one, two), max(one, two)) for one in free for two in range(len(gates)) if one != two}
    for one, two in sorted(near):
        if gates[one].name != gates[two].name and not disjoint(gates[one].applies_to, gates[two].applies_to):
            yield gates[one], gates[two]


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
