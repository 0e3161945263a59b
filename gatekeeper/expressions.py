"""`derive`: a checked subset of Python expressions over facts, compiled to closures; never evaluated by Python.

Unknown operands give unknown, absent ones absent (absent wins in arithmetic); comparisons with an absent operand are
false; `and`, `or`, `not` and conditionals are strong Kleene.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gatekeeper.values import ABSENT, UNKNOWN, Arch, Missing, Value, Values, Version, records_equal

Evaluate: TypeAlias = Callable[[Values], "Value | Missing"]

MAX_LENGTH = 1000
MAX_DEPTH = 64  # each level costs frames of Python's stack, to compile and to evaluate
MAX_BITS = 4096  # past this a product of facts is a mistake, and would only burn time


@dataclass(frozen=True, slots=True)
class Expression:
    """One compiled expression; called with values, it gives a value, `ABSENT` or `UNKNOWN`."""

    text: str
    names: frozenset[str]
    """Facts that it reads."""
    evaluate: Evaluate
    tree: ast.expr = field(repr=False, compare=False)
    """What it was compiled from, for the check of its types."""

    def __call__(self, values: Values) -> Value | Missing:
        return self.evaluate(values)


def parse_expression(text: str) -> Expression:
    """Compile `text`. Raises `ValueError` that says what is not allowed."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"an expression of {len(text)} characters; name parts of it as facts of their own")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"`{_cut(text)}` is not an expression; expected one such as `model.a + 1`") from None
    compiler = _Compiler()
    evaluate = compiler.compile(tree.body)
    return Expression(text, frozenset(compiler.names), evaluate, tree.body)


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class _Compiler:
    def __init__(self) -> None:
        self.names: set[str] = set()
        self._depth = 0

    def compile(self, node: ast.expr) -> Evaluate:
        if self._depth >= MAX_DEPTH:
            raise ValueError(f"an expression nested deeper than {MAX_DEPTH} levels; name parts of it as facts")
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is None:
            raise ValueError(f"{_source(node)} is not allowed in an expression")
        self._depth += 1
        evaluate: Evaluate = method(node)
        self._depth -= 1
        return evaluate

    def _constant(self, node: ast.Constant) -> Evaluate:
        value = node.value
        if not isinstance(value, int | float | str) or isinstance(value, bool):
            raise ValueError(f"{_source(node)} is not allowed; write `true` or `false`, a number or a text")
        return lambda values: value

    def _name(self, node: ast.Name) -> Evaluate:
        if node.id not in ("true", "false"):
            raise ValueError(f"`{node.id}` is not a fact: fact names have a dot")
        truth = node.id == "true"
        return lambda values: truth

    def _attribute(self, node: ast.Attribute) -> Evaluate:
        parts = [node.attr]
        inner: ast.expr = node.value
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            raise ValueError(f"{_source(node)} is not a fact; expected a name such as `model.n_routed_experts`")
        name = ".".join([inner.id, *reversed(parts)])
        self.names.add(name)
        return lambda values: values.get(name, UNKNOWN)

    def _list(self, node: ast.List) -> Evaluate:
        items = [self.compile(item) for item in node.elts]
        return lambda values: _strict(tuple, *(item(values) for item in items))

    def _unaryop(self, node: ast.UnaryOp) -> Evaluate:
        inner = self.compile(node.operand)
        if isinstance(node.op, ast.Not):

            def negate(values: Values) -> Value | Missing:
                truth = _truth(inner(values))
                return UNKNOWN if truth is None else not truth

            return negate
        if isinstance(node.op, ast.USub):
            return lambda values: _strict(lambda items: -_number(items[0]), inner(values))
        raise ValueError(f"{_source(node)} is not allowed in an expression; use `-` or `not`")

    def _boolop(self, node: ast.BoolOp) -> Evaluate:
        items = [self.compile(item) for item in node.values]
        decisive = isinstance(node.op, ast.Or)

        def evaluate(values: Values) -> Value | Missing:
            truths = [_truth(item(values)) for item in items]
            if decisive in truths:
                return decisive
            return UNKNOWN if None in truths else not decisive

        return evaluate

    def _ifexp(self, node: ast.IfExp) -> Evaluate:
        test, yes, no = self.compile(node.test), self.compile(node.body), self.compile(node.orelse)

        def evaluate(values: Values) -> Value | Missing:
            truth = _truth(test(values))
            if truth is not None:
                return yes(values) if truth else no(values)
            one, other = yes(values), no(values)
            if isinstance(one, Missing) or isinstance(other, Missing):
                return one if one is other else UNKNOWN
            return one if _compared(operator.eq, one, other) else UNKNOWN

        return evaluate

    def _binop(self, node: ast.BinOp) -> Evaluate:
        apply = _ARITHMETIC.get(type(node.op))
        if apply is None:
            raise ValueError(f"{_source(node)} is not allowed; use + - * / // %")
        left, right = self.compile(node.left), self.compile(node.right)
        divides = isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod)
        exact = isinstance(node.op, ast.Div)

        def calculate(items: tuple[Any, ...]) -> Value | Missing:
            a, b = _number(items[0]), _number(items[1])
            if divides and b == 0:
                return ABSENT
            if exact and isinstance(a, int) and isinstance(b, int):
                return ABSENT if a % b else a // b
            if isinstance(a, int) and isinstance(b, int) and a.bit_length() + b.bit_length() > MAX_BITS:
                return ABSENT
            try:
                result: int | float = apply(a, b)
            except OverflowError:
                return ABSENT
            return result if isinstance(result, int) or math.isfinite(result) else ABSENT

        return lambda values: _strict(calculate, left(values), right(values))

    def _compare(self, node: ast.Compare) -> Evaluate:
        sides = [self.compile(side) for side in (node.left, *node.comparators)]
        pairs = list(zip(node.ops, sides, sides[1:], strict=False))
        tests = [self._comparison(op, a, b) for op, a, b in pairs]

        def evaluate(values: Values) -> Value | Missing:
            truths = [test(values) for test in tests]
            if False in truths:
                return False
            return UNKNOWN if None in truths else True

        return evaluate

    def _comparison(self, op: ast.cmpop, left: Evaluate, right: Evaluate) -> Callable[[Values], bool | None]:
        if isinstance(op, ast.In | ast.NotIn):
            compare: Callable[[Any, Any], bool] = _is_item
        elif type(op) in _COMPARISONS:
            compare = _COMPARISONS[type(op)] if not isinstance(op, ast.NotEq) else operator.eq
        else:
            raise ValueError("only == != < <= > >= in and not in compare")
        negated = isinstance(op, ast.NotEq | ast.NotIn)

        def evaluate(values: Values) -> bool | None:
            a, b = left(values), right(values)
            if isinstance(a, Mapping) and isinstance(b, Mapping) and compare is operator.eq:
                truth: bool | None = records_equal((a.get(key, UNKNOWN), b.get(key, UNKNOWN)) for key in {*a, *b})
            elif a is ABSENT or b is ABSENT:
                truth = False
            elif a is UNKNOWN or b is UNKNOWN:
                truth = None
            else:
                truth = _compared(compare, a, b)
            return truth if truth is None else truth != negated

        return evaluate

    def _call(self, node: ast.Call) -> Evaluate:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in _FUNCTIONS or node.keywords:
            raise ValueError(f"{_source(node)} is not allowed; the functions are {', '.join(sorted(_FUNCTIONS))}")
        items = [self.compile(item) for item in node.args]
        lowest, highest, apply = _FUNCTIONS[name]
        if not lowest <= len(items) <= highest:
            wanted = str(lowest) if lowest == highest else f"{lowest} to {highest}"
            raise ValueError(f"`{name}` takes {wanted} operand{'s' * (highest > 1)}, not {len(items)}")
        return lambda values: apply(*(item(values) for item in items))


def _source(node: ast.expr) -> str:
    try:
        return f"`{_cut(ast.unparse(node))}`"
    except RecursionError:
        return "this"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _compared(compare: Callable[[Any, Any], bool], left: Any, right: Any) -> bool:
    """Compare two known values; a text beside a version or an architecture is read as one. Booleans are no numbers."""
    if isinstance(left, Version | Arch) and isinstance(right, str):
        right = type(left)(right)
    elif isinstance(right, Version | Arch) and isinstance(left, str):
        left = type(right)(left)
    if compare is not _is_item and isinstance(left, bool) != isinstance(right, bool):
        return False
    try:
        return bool(compare(left, right))
    except (TypeError, AttributeError):
        raise ValueError(f"can't compare `{left}` with `{right}`") from None


def _is_item(item: Any, items: Any) -> bool:
    # In a text this would be a test of a substring, and rules have none.
    if not isinstance(items, tuple):
        raise ValueError(f"`{items}` is not a list")
    return any(_compared(operator.eq, item, one) for one in items)


def _strict(apply: Callable[[tuple[Any, ...]], Value | Missing], *items: Value | Missing) -> Value | Missing:
    if any(item is ABSENT for item in items):
        return ABSENT
    return UNKNOWN if any(item is UNKNOWN for item in items) else apply(items)


def _truth(value: Value | Missing) -> bool | None:
    if value is UNKNOWN:
        return None
    if value is ABSENT:
        return False
    if not isinstance(value, bool):
        raise ValueError(f"`{value}` is not true or false")
    return value


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"`{value}` is not a number")
    return value


def _sequence(value: Any) -> tuple[Any, ...] | str:
    if not isinstance(value, tuple | str):
        raise ValueError(f"`{value}` is not a list")
    return value


def _coalesce(*items: Value | Missing) -> Value | Missing:
    # Passes absent and stops at unknown: what follows an unknown may not be the answer.
    return next((item for item in items if item is not ABSENT), ABSENT)


def _item(items: Value | Missing, index: Value | Missing) -> Value | Missing:
    def pick(pair: tuple[Any, ...]) -> Value | Missing:
        sequence, position = _sequence(pair[0]), _number(pair[1])
        inside = isinstance(position, int) and 0 <= position < len(sequence)
        return sequence[int(position)] if inside else ABSENT

    return _strict(pick, items, index)


def _present(item: Value | Missing) -> Value | Missing:
    if isinstance(item, Mapping) and all(isinstance(part, Missing) for part in item.values()):
        return UNKNOWN  # a record of which no field is known yet
    return item if item is UNKNOWN else item is not ABSENT


def _least(*items: Value | Missing) -> Value | Missing:
    return _strict(lambda numbers: min(map(_number, numbers)), *items)


def _greatest(*items: Value | Missing) -> Value | Missing:
    return _strict(lambda numbers: max(map(_number, numbers)), *items)


def _length(items: Value | Missing) -> Value | Missing:
    return _strict(lambda one: len(_sequence(one[0])), items)


_FUNCTIONS: dict[str, tuple[int, int, Callable[..., Value | Missing]]] = {
    "coalesce": (1, 20, _coalesce),
    "item": (2, 2, _item),
    "len": (1, 1, _length),
    "max": (1, 20, _greatest),
    "min": (1, 20, _least),
    "present": (1, 1, _present),
}
