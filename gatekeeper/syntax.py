"""Short ways to write the nodes of a Python syntax tree."""

from __future__ import annotations

import ast
from typing import Any, TypeAlias

Expr: TypeAlias = ast.expr
_AT: dict[str, Any] = {"lineno": 1, "col_offset": 0}
"""Every node needs a place; `ast.fix_missing_locations` would take three times as long as making and compiling them."""


def name(one: str) -> Expr:
    return ast.Name(one, ast.Load(), **_AT)


def constant(value: Any) -> Expr:
    return ast.Constant(value, **_AT)


TRUE, FALSE, NONE = constant(True), constant(False), constant(None)
ABSENT = name("ABSENT")


def own(kept: ast.NamedExpr) -> Expr:
    """Return the name under which a value was kept."""
    return name(kept.target.id)


def set_(target: str, value: Expr) -> ast.stmt:
    return ast.Assign([ast.Name(target, ast.Store(), **_AT)], value, **_AT)


def if_(test: Expr, body: list[ast.stmt], orelse: list[ast.stmt] | None = None) -> ast.stmt:
    return ast.If(test, body, orelse or [], **_AT)


def return_(value: Expr) -> ast.stmt:
    return ast.Return(value, **_AT)


def compare(operator: type[ast.cmpop], left: Expr, right: Expr) -> Expr:
    return ast.Compare(left, [operator()], [right], **_AT)


def is_(left: Expr, right: Expr) -> Expr:
    return compare(ast.Is, left, right)


def is_not(left: Expr, right: Expr) -> Expr:
    return compare(ast.IsNot, left, right)


def not_(value: Expr) -> Expr:
    return ast.UnaryOp(ast.Not(), value, **_AT)


def and_(*parts: Expr) -> Expr:
    return ast.BoolOp(ast.And(), list(parts), **_AT) if len(parts) > 1 else parts[0]


def or_(*parts: Expr) -> Expr:
    return ast.BoolOp(ast.Or(), list(parts), **_AT) if len(parts) > 1 else parts[0]


def call(function: Expr, *arguments: Expr) -> Expr:
    return ast.Call(function, list(arguments), [], **_AT)


def tuple_(*parts: Expr) -> Expr:
    return ast.Tuple(list(parts), ast.Load(), **_AT)


def list_(parts: list[Expr]) -> Expr:
    return ast.List(parts, ast.Load(), **_AT)


def dict_(keys: list[Expr], values: list[Expr]) -> Expr:
    return ast.Dict([*keys], values, **_AT)


def either(test: Expr, yes: Expr, no: Expr) -> Expr:
    """`yes if test else no`."""
    return ast.IfExp(test, yes, no, **_AT)


def keep(target: str, value: Expr) -> ast.NamedExpr:
    """`target := value`."""
    return ast.NamedExpr(ast.Name(target, ast.Store(), **_AT), value, **_AT)


def attribute(value: Expr, one: str) -> Expr:
    return ast.Attribute(value, one, ast.Load(), **_AT)


def text(parts: list[Expr]) -> Expr:
    """Return an f-string of constants and values."""
    placed = [part if isinstance(part, ast.Constant) else ast.FormattedValue(part, -1, None, **_AT) for part in parts]
    return ast.JoinedStr([*placed], **_AT)


def function(parameters: tuple[str, ...], body: list[ast.stmt]) -> ast.Module:
    """Return a module with nothing but a function."""
    arguments = ast.arguments([], [ast.arg(one, **_AT) for one in parameters], None, [], [], None, [])
    return ast.Module([ast.FunctionDef("rule", arguments, body, [], None, **_AT)], [])
