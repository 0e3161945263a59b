"""Whether a condition can hold at all: a search over representative values of its facts, which never guesses.

For each fact the search tries the constants that the condition compares it with, a value below, between and above
them, another value, and absent. What it can't judge exactly (lists, globs, order of AMD architectures, layers) may be
anything at any time, so "can't hold" is always true, and "can hold" is said only of what was judged exactly.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from gatekeeper.analysis.samples import TooManyError, is_whole, samples
from gatekeeper.catalogue import Catalogue
from gatekeeper.closures import Closure
from gatekeeper.compile import compile_condition
from gatekeeper.conditions import All, Any_, Condition, FactRef, ItemTests, Layers, Not, Test
from gatekeeper.fact_spec import FEATURE_GROUP, FactSpec
from gatekeeper.operators import NEGATED
from gatekeeper.values import ABSENT, Arch, Truth

Scope: TypeAlias = dict[Any, Any]
"""Fact name to value, and what can't be judged to whether it holds; what is not there is not chosen yet."""

MAX_STEPS = 20_000
"""Choices tried before the search gives up and says nothing."""
_ORDER = frozenset({"gt", "ge", "lt", "le"})


def can_hold(condition: Condition, catalogue: Catalogue) -> bool | None:
    """Say whether some values of the facts make `condition` true; None where that is not known.

    False is a proof. Derived facts and the fields of a record count as free of each other, so where one is read, or
    where something can't be judged exactly, or after `MAX_STEPS` choices, the answer is False or None.
    """
    try:
        search = _Search(condition, catalogue)
        found = search.run()
    except TooManyError:
        return None
    return found and (True if search.exact else None)


def never(condition: Condition, catalogue: Catalogue) -> bool:
    """Whether a condition is proven never to hold."""
    return can_hold(condition, catalogue) is False


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One atomic condition: judged by its closure, or (`closure` is None) true or false as the search likes."""

    key: Hashable
    reads: tuple[str, ...]
    closure: Closure | None
    negated: bool = False

    def truth(self, scope: Scope) -> Truth:
        if self.closure is not None:
            return self.closure(scope)
        if any(scope.get(name) is ABSENT for name in self.reads):
            return self.negated
        chosen: Truth = scope.get(self.key)
        return chosen if chosen is None else chosen != self.negated


class _Search:
    def __init__(self, condition: Condition, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.exact = True
        self._steps = 0
        self._leaves: dict[int, _Leaf] = {}
        self._tests: list[Test] = []
        self._condition = condition
        self._prepare(condition)
        self._choices = self._domains()

    def run(self) -> bool:
        return self._extend({}, list(self._choices))

    def _extend(self, scope: Scope, left: Sequence[Hashable]) -> bool:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TooManyError
        truth = self._truth(self._condition, scope)
        if truth is not None or not left:
            return truth is True
        name, *rest = left
        for value in self._choices[name]:
            scope[name] = value
            if self._extend(scope, rest):
                return True
        del scope[name]
        return False

    def _truth(self, condition: Condition, scope: Scope) -> Truth:
        """Kleene over the tree: what is not chosen yet is unknown, so a branch is cut as early as can be."""
        if isinstance(condition, Not):
            truth = self._truth(condition.part, scope)
            return truth if truth is None else not truth
        if isinstance(condition, All | Any_):
            decisive = isinstance(condition, Any_)
            result: Truth = not decisive
            for part in condition.parts:
                truth = self._truth(part, scope)
                if truth is decisive:
                    return decisive
                result = None if truth is None else result
            return result
        return self._leaves[id(condition)].truth(scope)

    def _prepare(self, condition: Condition) -> None:
        if isinstance(condition, Not):
            self._prepare(condition.part)
        elif isinstance(condition, All | Any_):
            for part in condition.parts:
                self._prepare(part)
        elif isinstance(condition, Layers):
            self._leaves[id(condition)] = self._layers(condition)
        else:
            self._leaves[id(condition)] = self._leaf(condition)
            self._tests.append(condition)

    def _layers(self, condition: Layers) -> _Leaf:
        # Both need a layer that meets `where` and passes.
        if never(All((condition.among, condition.that)), self.catalogue):
            return _Leaf((), (), lambda scope: False)
        self.exact = False
        return _Leaf(("layers", condition), (), None)

    def _leaf(self, test: Test) -> _Leaf:
        spec = self.catalogue[test.fact]
        if any(self._free(name) for name in (test.fact, *test.refers)):
            self.exact = False
        if self._judged(test, spec):
            return _Leaf((), (test.fact, *test.refers), compile_condition(test, self.catalogue))
        self.exact = False
        word = NEGATED.get(test.operator, test.operator)
        # `every_item` of an empty list holds, whatever its items are compared with.
        reads = (test.fact,) if isinstance(test.operand, ItemTests) else (test.fact, *test.refers)
        return _Leaf((test.fact, word, test.operand), reads, None, test.operator in NEGATED)

    def _free(self, name: str) -> bool:
        """Whether a fact hangs together with others, which the search does not follow."""
        spec = self.catalogue[name]
        return spec.derive is not None or spec.default_derive is not None or spec.group in (FEATURE_GROUP, "engine")

    def _judged(self, test: Test, spec: FactSpec) -> bool:
        if test.operator == "absent":
            return True
        if spec.type == "list" or test.operator == "matches":
            return False
        if test.operator == "divisible_by":
            return spec.type == "integer" and is_whole(test.operand) and test.operand != 0
        if isinstance(test.operand, FactRef):
            return test.operator not in ("in", "not_in") and not (spec.type == "arch" and test.operator in _ORDER)
        if spec.type == "arch" and test.operator in _ORDER:
            return isinstance(test.operand, Arch) and len(test.operand.order) == 1
        return True

    def _domains(self) -> dict[Hashable, list[Any]]:
        """Return what each fact may be, facts of most tests first, and of each test that can't be judged, both."""
        groups = self._groups()
        domains: dict[Hashable, list[Any]] = {}
        weight: dict[Hashable, int] = {}
        for test in self._tests:
            for name in self._fields(test):
                weight[name] = weight.get(name, 0) + 1
                if name not in domains:
                    group = [self.catalogue[one] for one in sorted(groups[name])]
                    tests = [one for one in self._tests if one.fact in groups[name]]
                    domains[name] = samples(self.catalogue[name], group, tests)
        for leaf in self._leaves.values():
            if leaf.closure is None:
                domains[leaf.key], weight[leaf.key] = [True, False], 0
        return dict(sorted(domains.items(), key=lambda item: (-weight[item[0]], len(item[1]))))

    def _fields(self, test: Test) -> Iterator[str]:
        for name in (test.fact, *test.refers):
            fields = self.catalogue[name].fields
            yield from (f"{name}.{key}" for key in fields) if fields else (name,)

    def _groups(self) -> dict[str, frozenset[str]]:
        """Return, for each fact, the facts that it is compared with, directly or in a chain."""
        groups: dict[str, frozenset[str]] = {}
        for test in self._tests:
            pairs = [(name, name) for name in self._fields(test)]
            if isinstance(test.operand, FactRef):
                fields, other = self.catalogue[test.fact].fields, test.operand.name
                pairs += [(f"{test.fact}.{key}", f"{other}.{key}") for key in fields] or [(test.fact, other)]
            for one, two in pairs:
                joined = groups.get(one, frozenset({one})) | groups.get(two, frozenset({two}))
                groups |= dict.fromkeys(joined, joined)
        return groups
