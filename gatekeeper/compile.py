"""Conditions to Python functions, generated as syntax trees; the naive meaning lives in the tests.

A truth is True, False or None (unknown). A value is as the catalogue types it, `ABSENT`, or None where it is unknown.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from gatekeeper import syntax as to
from gatekeeper.closures import Closure, covered, over_items, over_layers, record_absent, show
from gatekeeper.conditions import (
    All,
    Condition,
    FactRef,
    ItemTests,
    Layers,
    Not,
    Test,
)
from gatekeeper.names import glob
from gatekeeper.operators import NEGATED, OPERATORS
from gatekeeper.syntax import ABSENT, FALSE, NONE, TRUE, Expr
from gatekeeper.values import ABSENT as ABSENT_VALUE
from gatekeeper.values import Arch, Version

if TYPE_CHECKING:
    from gatekeeper.catalogue import Catalogue

KEYS: Mapping[type, str] = {Arch: "text", Version: "release"}
_COMPARE = {"eq": ast.Eq, "in": ast.In, "gt": ast.Gt, "ge": ast.GtE, "lt": ast.Lt, "le": ast.LtE}


def compile_condition(condition: Condition, catalogue: Catalogue) -> Closure:
    """Return a function from values to the truth of a condition; the catalogue keeps it."""
    if condition not in catalogue.compiled:
        code = Code(catalogue)
        catalogue.compiled[condition] = code.function("values", result=code.truth(condition))
    return catalogue.compiled[condition]


class Code:
    """The body of one function: what it fetched, the names of its own, and the objects that it refers to."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.body: list[ast.stmt] = [to.set_("get", to.attribute(to.name("values"), "get"))]
        self._objects: dict[str, Any] = {"ABSENT": ABSENT_VALUE, "show": show}
        self._fetched: dict[str, str] = {}
        self._kept = 0

    def function(self, *parameters: str, result: Expr) -> Any:
        """Compile it."""
        module = to.function(parameters, [*self.body, to.return_(result)])
        code = compile(module, "<rule>", "exec")
        # The one constant of the module that is code is the function's own: nothing is executed to get at it.
        return FunctionType(next(one for one in code.co_consts if isinstance(one, CodeType)), self._objects)

    def kept(self, value: Expr) -> ast.NamedExpr:
        """Give a value a name."""
        self._kept += 1
        return to.keep(f"t{self._kept}", value)

    def fact(self, name: str) -> Expr:
        """Fetch a fact once, before the statement that is being built."""
        if name not in self._fetched:
            self._fetched[name] = f"v{len(self._fetched)}"
            self.body.append(to.set_(self._fetched[name], to.call(to.name("get"), to.constant(name))))
        return to.name(self._fetched[name])

    def bound(self, value: Any) -> Expr:
        """Refer to an object that no literal can be."""
        name = f"c{len(self._objects)}"
        self._objects[name] = value
        return to.name(name)

    def truth(self, condition: Condition) -> Expr:
        """Return the truth of a condition, strong Kleene."""
        if isinstance(condition, Test):
            return self._test(condition)
        if isinstance(condition, Not):
            truth = self.kept(self.truth(condition.part))
            return to.either(to.is_(truth, NONE), NONE, to.not_(to.own(truth)))
        if isinstance(condition, Layers):
            parts = (compile_condition(part, self.catalogue) for part in (condition.among, condition.that))
            return self._called(over_layers(condition.every, *parts))
        every = isinstance(condition, All)
        if len(condition.parts) < 2:
            return self.truth(condition.parts[0]) if condition.parts else to.constant(every)
        truths = [self.kept(self.truth(part)) for part in condition.parts]
        own = [to.own(truth) for truth in truths]
        if every:
            return to.and_(*(to.is_not(truth, FALSE) for truth in truths), to.or_(to.and_(*own), NONE))
        return to.or_(*truths, to.either(to.or_(*(to.is_(one, NONE) for one in own)), NONE, FALSE))

    def _test(self, test: Test) -> Expr:
        if test.operator in NEGATED:
            return self.truth(Not(Test(test.fact, NEGATED[test.operator], test.operand, test.where, test.refers)))
        names = [f"{test.fact}.{key}" for key in self.catalogue[test.fact].fields]
        operand = test.operand
        if test.operator == "absent" and names:
            return self._called(record_absent(bool(operand), names))
        if test.operator == "covers":
            return self._called(covered(test))
        if isinstance(operand, ItemTests):
            return self._called(over_items(test, operand))
        if isinstance(operand, FactRef) and names:
            others = [f"{operand.name}{name.removeprefix(test.fact)}" for name in names]
            return _records([self.fact(name) for name in names], [self.fact(name) for name in others])
        left = self.fact(test.fact)
        if isinstance(operand, FactRef):
            right = self.fact(operand.name)
            gone, unknown = (
                to.or_(to.is_(left, ABSENT), to.is_(right, ABSENT)),
                to.or_(to.is_(left, NONE), to.is_(right, NONE)),
            )
            return to.either(gone, FALSE, to.either(unknown, NONE, self._holds(test.operator, left, right)))
        if test.operator == "absent":
            return to.either(to.is_(left, NONE), NONE, to.is_(left, ABSENT) if operand else to.is_not(left, ABSENT))
        return to.either(to.is_(left, NONE), NONE, self._known(test, left))

    def _known(self, test: Test, left: Expr) -> Expr:
        """Compare a fact that is known, or absent, with a constant."""
        value: Any = glob(str(test.operand)) if test.operator == "matches" else test.operand
        equality = test.operator in ("eq", "in")
        items = value if isinstance(value, tuple) else (value,)
        key = KEYS.get(type(items[0])) if equality else None
        if key:  # equal by one attribute, which spares a call
            plain = tuple(getattr(one, key) for one in items)
            left, items = to.attribute(left, key), plain
            value = plain if isinstance(value, tuple) else plain[0]
        literal = key or all(type(one) in (bool, int, float, str) for one in items)
        holds = self._holds(test.operator, left, to.constant(value) if literal else self.bound(value))
        # `ABSENT` equals nothing, and only what is not an equality would trip over it.
        return holds if equality and not key else to.and_(to.is_not(self.fact(test.fact), ABSENT), holds)

    def _holds(self, operator: str, left: Expr, right: Expr) -> Expr:
        if operator in _COMPARE:
            return to.compare(_COMPARE[operator], left, right)
        return to.call(self.bound(OPERATORS[operator].holds), left, right)

    def _called(self, test: Closure) -> Expr:
        return to.call(self.bound(test), to.name("values"))


def _records(left: list[Expr], right: list[Expr]) -> Expr:
    """False as soon as two known fields differ, or one of the records is absent as a whole."""
    pairs = zip(left, right, strict=True)
    differ = [to.and_(to.compare(ast.NotEq, a, b), to.is_not(a, NONE), to.is_not(b, NONE)) for a, b in pairs]
    gone = [to.and_(*(to.is_(field, ABSENT) for field in side)) for side in (left, right)]
    unknown = to.or_(*(to.is_(field, NONE) for field in (*left, *right)))
    return to.either(to.or_(*differ, *gone), FALSE, to.either(unknown, NONE, TRUE))
