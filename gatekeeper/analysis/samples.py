"""Values that stand for all others of a fact, as far as the tests on it and on its like can tell them apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from math import ceil, floor, lcm
from typing import Any

from gatekeeper.conditions import FactRef, Test
from gatekeeper.fact_spec import FactSpec
from gatekeeper.values import ABSENT, Arch, Missing, Version

MAX_LISTED = 256
"""Numbers of an interval that are listed one by one where divisibility can't be settled by arithmetic."""
MAX_DIVISORS = 6


class TooManyError(Exception):
    """There are too many values to try: nothing is said then."""


def samples(spec: FactSpec, group: Sequence[FactSpec], tests: Sequence[Test]) -> list[Any]:
    """Return values of the fact `spec` such that any other of its values is like one of them.

    `group` are the facts that it is compared with and itself, `tests` all tests of those. Of what lies between two
    constants there is one value for each of the group, so that any order among them can be had. Raises `TooManyError`.
    """
    constants = [value for test in tests for value in _constants(test)]
    count = len(group)
    if spec.type == "boolean":
        values: list[Any] = [False, True]
    elif spec.type == "enum":
        values = list(spec.values)
    elif spec.type in ("integer", "number"):
        values = _numbers(spec, group, constants, tests)
    elif spec.type == "version":
        values = _versions([one for one in constants if isinstance(one, Version)], count)
    elif spec.type == "arch":
        values = _arches([one for one in constants if isinstance(one, Arch)], count)
    elif spec.type == "list":
        values = [(word,) for word in _others(count)]
    else:
        words = [*constants, *(word for one in group for word in one.values)]
        values = [*dict.fromkeys(word for word in words if isinstance(word, str)), *_others(count)]
    # A constant default leaves nothing absent.
    return values if not isinstance(spec.default, Missing) else [*values, ABSENT]


def is_whole(value: Any) -> bool:
    """Whether a value is a number without a fraction."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == floor(value)


def _constants(test: Test) -> tuple[Any, ...]:
    if test.operator in ("absent", "divisible_by") or isinstance(test.operand, FactRef):
        return ()
    return test.operand if isinstance(test.operand, tuple) else (test.operand,)


def _others(count: int) -> list[str]:
    """Return values that no rule names."""
    return [f"another value {number}" for number in range(1, count + 1)]


def _numbers(spec: FactSpec, group: Sequence[FactSpec], constants: Iterable[Any], tests: Iterable[Test]) -> list[Any]:
    least = [one.minimum for one in group if one.minimum is not None]
    points = sorted({one for one in [*constants, *least] if isinstance(one, int | float)})
    divisors = {abs(int(one)) for one in _divisors(tests) if abs(one) > 1}
    found: set[Any] = set(points)
    for low, high in pairwise([None, *points, None]):
        found.update(_between(low, high, len(group), divisors))
    if spec.type == "number":
        parts = range(1, len(group) + 1)
        found.update(
            low + (high - low) * part / (len(group) + 1) for low, high in pairwise(sorted(found)) for part in parts
        )
    return [
        one
        for one in sorted(found)
        if (spec.minimum is None or one >= spec.minimum) and (spec.type == "number" or is_whole(one))
    ]


def _divisors(tests: Iterable[Test]) -> Iterator[float]:
    for test in tests:
        if test.operator == "divisible_by" and isinstance(test.operand, int | float) and is_whole(test.operand):
            yield test.operand


def _between(low: float | None, high: float | None, count: int, divisors: set[int]) -> Iterator[int]:
    """Yield integers strictly between: `count` rounds of one for each set of the divisors that some number has."""
    if len(divisors) > MAX_DIVISORS:
        raise TooManyError
    period = lcm(*divisors)
    if low is None:
        low = -1 if high is None else ceil(high) - count * period - 1
    first = floor(low) + 1
    last = first + count * period - 1 if high is None else ceil(high) - 1
    if last - first + 1 < count * period:
        if last - first + 1 > MAX_LISTED:
            raise TooManyError
        yield from range(first, last + 1)
        return
    patterns = {lcm(*some) for size in range(len(divisors) + 1) for some in combinations(sorted(divisors), size)}
    for start in range(first, first + count * period, period):
        # What is congruent to `pattern` has exactly the divisors that `pattern` has.
        yield from (start + (pattern - start) % period for pattern in patterns)


def _versions(constants: list[Version], count: int) -> list[Version]:
    points = sorted(set(constants))
    found = [*points, *_later(Version("0"), points[0] if points else None, count), Version("0")]
    for low, high in pairwise([*points, None]):
        found += _later(low, high, count)
    return list(dict.fromkeys(found))


def _later(low: Version | None, high: Version | None, count: int) -> Iterator[Version]:
    """Yield versions after `low` and before `high`."""
    if low is None or (high is not None and not low < high):
        return
    zeros = [0] * len(high.release) if high is not None else []
    for number in range(1, count + 1):
        yield Version(
            ".".join(map(str, [*low.release, *zeros, number] if high is not None else [_major(low) + number]))
        )


def _major(version: Version) -> int:
    return version.release[0] if version.release else 0


def _arches(constants: list[Arch], count: int) -> list[Arch]:
    """Return architectures; of a vendor that counts in whole numbers, those below, between and above the constants."""
    found = [*constants, *(Arch(f"unheard{'of' * number}") for number in range(1, count + 1))]
    for vendor in sorted({one.vendor for one in constants if len(one.order) == 1}):
        points = sorted({one.order[0] for one in constants if one.vendor == vendor and len(one.order) == 1})
        numbers = [
            *points,
            *(one for low, high in pairwise([None, *points, None]) for one in _between(low, high, count, set())),
        ]
        found += [
            Arch(f"{vendor}{number}{suffix}")
            for number in numbers
            if number >= 0
            for suffix in ("", *"zyxwvut"[:count])
        ]
    return list(dict.fromkeys(found))
