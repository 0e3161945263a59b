"""Types of `derive` expressions, found at load: what can't be calculated or compared is a fault, not a surprise."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from gatekeeper.expressions import Expression
from gatekeeper.fact_spec import FactSpec
from gatekeeper.source import nearest

Kind: TypeAlias = str
"""`boolean integer number string version arch record`, `list of KIND`, or `any` (the items of an empty list)."""

ANY: Kind = "any"
_NUMBERS = ("integer", "number")
_TEXTS = ("string", "version", "arch")
_ORDERED = (*_NUMBERS, "version", "arch", ANY)


def check_type(expression: Expression, spec: FactSpec, facts: Mapping[str, FactSpec]) -> None:
    """Raise `ValueError` where an expression does not fit together, or does not give what `spec` declares.

    Facts that are not in `facts` are a fault of their own and count as anything here.
    """
    kind, wanted = _Types(facts).kind(expression.tree), kind_of(spec)
    words = spec.type == "enum" and {"true", "false"} <= set(spec.values)
    if not (_fits(kind, wanted) or (words and kind == "boolean")):
        raise ValueError(f"`{expression.text}` gives {_a(kind)}, and the fact is declared as {_a(wanted)}")
    if spec.type == "enum":
        _check_words(_results(expression.tree), spec)


def kind_of(spec: FactSpec) -> Kind:
    """Return the kind of a declared fact; an enum's words are texts."""
    if spec.type == "list":
        return f"list of {spec.items}"
    return "string" if spec.type == "enum" else spec.type


def _fits(kind: Kind, wanted: Kind) -> bool:
    if kind == wanted or ANY in (kind, wanted) or (kind == f"list of {ANY}" and wanted.startswith("list of ")):
        return True
    if kind.startswith("list of ") and wanted.startswith("list of "):
        return _fits(kind.removeprefix("list of "), wanted.removeprefix("list of "))
    # A text that an expression writes is read as the version or architecture that the fact is.
    return (kind, wanted) == ("integer", "number") or (kind == "string" and wanted in _TEXTS)


def _results(node: ast.expr) -> list[ast.expr]:
    """Return the constants that an expression may come to."""
    if isinstance(node, ast.IfExp):
        return [*_results(node.body), *_results(node.orelse)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "coalesce":
        return [one for item in node.args for one in _results(item)]
    return [node]


def _check_words(nodes: Sequence[ast.expr], spec: FactSpec) -> None:
    for node in nodes:
        word = node.value if isinstance(node, ast.Constant) else None
        if isinstance(word, str) and word not in spec.values:
            hint = nearest(word, spec.values) or f"; it has {', '.join(spec.values)}"
            raise ValueError(f"`{word}` is no value of `{spec.name}`{hint}")


class _Types:
    def __init__(self, facts: Mapping[str, FactSpec]) -> None:
        self.facts = facts

    def kind(self, node: ast.expr) -> Kind:
        """Return the kind of a node; the compiler has refused every node that has no method here."""
        kind: Kind = getattr(self, f"_{type(node).__name__.lower()}")(node)
        return kind

    def _constant(self, node: ast.Constant) -> Kind:
        return {int: "integer", float: "number", str: "string"}[type(node.value)]

    def _name(self, node: ast.Name) -> Kind:
        return "boolean"

    def _attribute(self, node: ast.Attribute) -> Kind:
        name = ast.unparse(node)
        return kind_of(self.facts[name]) if name in self.facts else ANY

    def _list(self, node: ast.List) -> Kind:
        return f"list of {self._common(node.elts, 'a list')}"

    def _unaryop(self, node: ast.UnaryOp) -> Kind:
        if isinstance(node.op, ast.Not):
            return self._demand(node.operand, ("boolean",), "`not`")
        return self._demand(node.operand, _NUMBERS, "`-`")

    def _boolop(self, node: ast.BoolOp) -> Kind:
        word = "`or`" if isinstance(node.op, ast.Or) else "`and`"
        for item in node.values:
            self._demand(item, ("boolean",), word)
        return "boolean"

    def _ifexp(self, node: ast.IfExp) -> Kind:
        self._demand(node.test, ("boolean",), "`if`")
        return self._common([node.body, node.orelse], "`if … else`")

    def _binop(self, node: ast.BinOp) -> Kind:
        word = f"`{ast.unparse(node)}`"
        kinds = [self._demand(side, _NUMBERS, word) for side in (node.left, node.right)]
        # Of integers `/` is exact: it gives an integer, or absent where it does not come out even.
        return "number" if "number" in kinds else "integer"

    def _compare(self, node: ast.Compare) -> Kind:
        sides = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, sides, sides[1:], strict=False):
            one, other = self.kind(left), self.kind(right)
            if isinstance(op, ast.In | ast.NotIn):
                if other != ANY and not other.startswith("list of "):
                    raise ValueError(f"`{ast.unparse(right)}` is {_a(other)}; `in` needs a list")
                other = other.removeprefix("list of ")
            elif not isinstance(op, ast.Eq | ast.NotEq):
                texts = one == other == "string"
                if texts or not {one, other} <= {*_ORDERED, "string"}:
                    raise ValueError(f"`{ast.unparse(node)}` puts {_a(one)} and {_a(other)} in order; that can't be")
            if _joined(one, other) is None:
                raise ValueError(f"`{ast.unparse(node)}` compares {_a(one)} with {_a(other)}, which are never equal")
            self._check_enum(left, right)
            self._check_enum(right, left)
        return "boolean"

    def _check_enum(self, fact: ast.expr, word: ast.expr) -> None:
        spec = self.facts.get(ast.unparse(fact)) if isinstance(fact, ast.Attribute) else None
        if spec is not None and spec.type == "enum":
            _check_words(word.elts if isinstance(word, ast.List) else [word], spec)

    def _call(self, node: ast.Call) -> Kind:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("min", "max"):
            kinds = [self._demand(item, _NUMBERS, f"`{name}`") for item in node.args]
            return "number" if "number" in kinds else "integer"
        if name == "coalesce":
            return self._common(node.args, "`coalesce`")
        kinds = [self.kind(item) for item in node.args]
        if name == "present":
            return "boolean"
        if kinds[0] not in (ANY, "string") and not kinds[0].startswith("list of "):
            raise ValueError(f"`{name}` needs a list, and `{ast.unparse(node.args[0])}` is {_a(kinds[0])}")
        if name == "item":
            self._demand(node.args[1], ("integer",), "`item`")
            return kinds[0].removeprefix("list of ")
        return "integer"

    def _demand(self, node: ast.expr, wanted: tuple[Kind, ...], word: str) -> Kind:
        kind = self.kind(node)
        if kind not in (*wanted, ANY):
            raise ValueError(f"{word} needs {_a(wanted[-1])}, and `{ast.unparse(node)}` is {_a(kind)}")
        return kind

    def _common(self, nodes: Sequence[ast.expr], word: str) -> Kind:
        kind = ANY
        for node in nodes:
            own = self.kind(node)
            joined = _joined(kind, own)
            if joined is None:
                raise ValueError(f"{word} mixes {_a(kind)} and {_a(own)}: `{ast.unparse(node)}`")
            kind = joined
        return kind


def _joined(one: Kind, other: Kind) -> Kind | None:
    """Return the kind that values of both have in common, if there is one."""
    if _fits(one, other):
        return other if one != ANY and other != ANY else one if other == ANY else other
    return one if _fits(other, one) else None


def _a(kind: Kind) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" if kind != ANY else "anything"
