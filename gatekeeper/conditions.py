"""Condition trees: parsed from plain data and checked against the catalogue. What they mean is compile.py's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, Union

from gatekeeper.catalogue import Catalogue
from gatekeeper.errors import Fault, Where
from gatekeeper.fact_spec import FactSpec, a_type
from gatekeeper.operators import NEGATED, OPERATORS
from gatekeeper.source import Document, nearest
from gatekeeper.values import Arch, Value

TEMPLATE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class FactRef:
    """`{fact: other}` on the right of an operator."""

    name: str


@dataclass(frozen=True, slots=True)
class Test:
    """One atomic condition: a fact, an operator, what it is compared with."""

    fact: str
    operator: str
    """A word of `OPERATORS`, or `absent`."""
    operand: Value | FactRef | ItemTests | str
    where: Where
    refers: tuple[str, ...] = ()
    """Further facts that it reads: the other side, or those in the name under `covers`."""


@dataclass(frozen=True, slots=True)
class ItemTests:
    """The tests under `any_item` / `every_item`; the fact's name in them is the list's own."""

    tests: tuple[Test, ...]


@dataclass(frozen=True, slots=True)
class All:
    """A conjunction; empty, it holds."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Any_:
    """A disjunction."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """A negation."""

    part: Condition


@dataclass(frozen=True, slots=True)
class Layers:
    """`every_layer` / `any_layer` over the layers that the runner loads and that meet `among`."""

    every: bool
    among: Condition
    that: Condition
    where: Where


Condition: TypeAlias = Union[Test, All, Any_, Not, Layers]

ALWAYS = All(())


class ConditionParser:
    """Parses the conditions of one rule set; every fault goes to `faults`."""

    def __init__(self, catalogue: Catalogue, named: Mapping[str, tuple[Document, Any]], faults: list[Fault]) -> None:
        self.catalogue = catalogue
        self.faults = faults
        self.used: set[str] = set()
        """Named conditions that something takes."""
        self._named = named
        self._open: list[str] = []

    def parse(self, document: Document, data: Any, path: tuple[str | int, ...]) -> Condition:
        """Parse the condition `data`, which stands at `path`."""
        parts: list[Condition] = []
        for word, value in data.items():
            at = (*path, word)
            if word == "all":
                parts.append(All(tuple(self.parse(document, one, (*at, i)) for i, one in enumerate(value))))
            elif word == "any":
                parts.append(Any_(tuple(self.parse(document, one, (*at, i)) for i, one in enumerate(value))))
            elif word == "not":
                parts.append(Not(self.parse(document, value, at)))
            elif word == "use":
                names = [value] if isinstance(value, str) else value
                self.used.update(names)
                parts += [self.named(name, document.where(at)) for name in names]
            elif word in ("every_layer", "any_layer"):
                among = self.parse(document, value["where"], (*at, "where")) if "where" in value else ALWAYS
                that = self.parse(document, value["that"], (*at, "that"))
                parts.append(Layers(word == "every_layer", among, that, document.where(at)))
            else:
                parts += self._tests(document, word, value, at)
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def named(self, name: str, where: Where) -> Condition:
        """Return a condition of conditions.yaml."""
        if name not in self._named:
            hint = nearest(name, self._named) or "; conditions.yaml declares them"
            self._fault("unknown-condition", f"unknown condition `{name}`{hint}", where)
            return ALWAYS
        if name in self._open:
            chain = " uses ".join(f"`{n}`" for n in [*self._open[self._open.index(name) :], name])
            self._fault("cycle", f"conditions use each other in a circle: {chain}", where)
            return ALWAYS
        document, data = self._named[name]
        self._open.append(name)
        condition = self.parse(document, data["that"], ("conditions", name, "that"))
        self._open.pop()
        return condition

    def _tests(self, document: Document, fact: str, test: Any, path: tuple[str | int, ...]) -> list[Condition]:
        where = document.where(path)
        spec = self.fact(fact, where)
        if spec is None:
            return []
        if spec.type in ("list", "record") and not isinstance(test, dict):
            words = "contains, any_item, every_item or covers" if spec.type == "list" else "eq or ne with {fact: …}"
            self._fault("no-shorthand", f"`{fact}` is {a_type(spec.type)}; test it with {words}", where)
            return []
        given = test if isinstance(test, dict) else {"in" if isinstance(test, list) else "eq": test}
        tests: list[Condition] = []
        for word, operand in given.items():
            at = document.where((*path, word))
            if word == "fact":
                one = self._test(spec, "eq", {"fact": operand}, at)
            else:
                one = self._test(spec, word, operand, at)
            if one is not None:
                tests.append(one)
        return tests

    def _test(self, spec: FactSpec, word: str, raw: Any, where: Where) -> Test | None:
        if word == "absent":
            return Test(spec.name, "absent", raw, where)
        if word not in OPERATORS:  # the schema refuses the word first
            return None
        op = OPERATORS[word]
        if spec.type not in op.left:
            allowed = [w for w, o in OPERATORS.items() if spec.type in o.left]
            message = f"`{word}` can't test {a_type(spec.type)}; use {', '.join([*allowed, 'absent'])}"
            self._fault("wrong-operator", message, where)
            return None
        if isinstance(raw, dict) and set(raw) == {"fact"} and op.operand in ("same", "list", "item"):
            return self._reference(spec, word, raw["fact"], where)
        try:
            if op.operand == "test":
                return self._items(spec, word, raw, where)
            if op.operand == "glob":
                if not isinstance(raw, str) or not raw:
                    raise ValueError("expected a glob over dotted segments, such as `model.layers.*.mlp`")
                if "{" in raw:
                    raise ValueError("a glob has no `{fact}` places; the names under `covers` have")
                return Test(spec.name, word, raw, where)
            if op.operand == "name":
                if not isinstance(raw, str):
                    raise ValueError("expected a module name")
                if self.fact("quant.method", where) is None:  # it says by whose rules the list is read
                    return None
                names = self.template(raw, where)
                return Test(spec.name, word, raw, where, (*names, "quant.method"))
            if spec.type == "record":
                raise ValueError("a record is compared with another record: {fact: …}")
            if op.operand == "list":
                if not isinstance(raw, list) or not raw:
                    raise ValueError("expected a list that isn't empty")
                return Test(spec.name, word, tuple(self._literal(spec, spec.type, one) for one in raw), where)
            if word == "divisible_by" and isinstance(raw, list | dict):
                raise ValueError("expected a number")
            literal = self._literal(spec, spec.items if word == "contains" else spec.type, raw)
            if word in ("gt", "ge", "lt", "le") and isinstance(literal, Arch) and not literal.order:
                raise ValueError(f"`{literal}` has no number to compare by; write one such as `sm90` or `gfx942`")
            return Test(spec.name, word, literal, where)
        except ValueError as error:
            self._fault("wrong-value", f"`{word}` of `{spec.name}`: {error}", where)
            return None

    def _literal(self, spec: FactSpec, kind: str, raw: Any) -> Value:
        self.no_fact(raw)
        if kind == spec.type:
            # The catalogue's minimum is no concern of a comparison: `gt: 0` is fine where 1 is the least.
            return FactSpec(name=spec.name, type=kind, doc="", where=spec.where, values=spec.values).coerce(raw)
        return FactSpec(name=spec.name, type=kind, doc="", where=spec.where).coerce(raw)

    def _reference(self, spec: FactSpec, word: str, name: Any, where: Where) -> Test | None:
        other = self.fact(name, where) if isinstance(name, str) else None
        if other is None:
            return None
        op = OPERATORS[word]
        wanted = {"same": spec.type, "item": spec.items, "list": "list"}[op.operand]
        fits = comparable(wanted, other.type)
        if op.operand == "list" and other.type == "list":
            fits = comparable(spec.type, other.items)
        if wanted == "record" and other.type == "record":
            fits = set(spec.fields) == set(other.fields)
        if not fits:
            need = f"a list of {a_type(spec.type)[2:].strip()} items" if wanted == "list" else a_type(wanted)
            message = f"`{name}` is {a_type(other.type)}; `{word}` of `{spec.name}` needs {need}"
            self._fault("wrong-type", message, where)
            return None
        return Test(spec.name, word, FactRef(name), where, (name,))

    def _items(self, spec: FactSpec, word: str, raw: Any, where: Where) -> Test:
        item = FactSpec(name=spec.name, type=spec.items, doc="", where=spec.where)
        if isinstance(raw, dict):
            pairs = [("eq", {"fact": one}) if inner == "fact" else (inner, one) for inner, one in raw.items()]
        else:
            pairs = [("in" if isinstance(raw, list) else "eq", raw)]
        found = [self._test(item, inner, operand, where) for inner, operand in pairs]
        tests = tuple(test for test in found if test is not None)
        return Test(spec.name, word, ItemTests(tests), where, tuple(name for test in tests for name in test.refers))

    def fact(self, name: str, where: Where) -> FactSpec | None:
        """Return the fact `name`, or a fault that offers the nearest one."""
        if name not in self.catalogue:
            hint = nearest(name, self.catalogue) or "; `gatekeeper facts` lists them all, files in facts/ declare them"
            self._fault("unknown-fact", f"unknown fact `{name}`{hint}", where)
            return None
        return self.catalogue[name]

    def no_fact(self, raw: Any) -> None:
        """Refuse a constant that is the name of a fact."""
        if isinstance(raw, str) and raw in self.catalogue:
            raise ValueError(f"`{raw}` is a fact, not a value; write `{{fact: {raw}}}`")

    def template(self, text: str, where: Where, extra: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Check the `{fact}` places of a text and return their names; `{{` and `}}` are literal."""
        for found in TEMPLATE.finditer(text):
            if found[1] is None and found[0] not in ("{{", "}}"):
                self._fault("bad-template", f"a lone `{found[0]}` in a text; write `{found[0] * 2}`", where)
        return tuple(name for name in places(text) if name not in extra and self.fact(name, where))

    def _fault(self, code: str, message: str, where: Where) -> None:
        self.faults.append(Fault(code, message, where))


def places(text: str) -> tuple[str, ...]:
    """Return what stands in the `{fact}` places of a text."""
    return tuple(found[1] for found in TEMPLATE.finditer(text) if found[1] is not None)


def comparable(one: str, other: str) -> bool:
    """Whether values of two types can be equal."""
    groups = ({"integer", "number"}, {"string", "enum"})
    return one == other or any(one in group and other in group for group in groups)


def tests_of(condition: Condition) -> Iterator[tuple[Test, bool]]:
    """Yield every atomic test with whether it stands under an odd number of `not`."""
    if isinstance(condition, Test):
        yield condition, False
    elif isinstance(condition, Not):
        yield from ((test, not negated) for test, negated in tests_of(condition.part))
    elif isinstance(condition, Layers):
        # What `where` leaves out of `every_layer` passes, as under a negation.
        yield from ((test, negated != condition.every) for test, negated in tests_of(condition.among))
        yield from tests_of(condition.that)
    else:
        for part in condition.parts:
            yield from tests_of(part)


def asks_layers(condition: Condition) -> bool:
    """Whether a condition ranges over layers, so that it rests on the list of them."""
    if isinstance(condition, Layers):
        return True
    if isinstance(condition, Not):
        return asks_layers(condition.part)
    return isinstance(condition, All | Any_) and any(map(asks_layers, condition.parts))


def facts_of(condition: Condition) -> frozenset[str]:
    """Return every fact that a condition reads."""
    return frozenset(name for test, _ in tests_of(condition) for name in (test.fact, *test.refers))


def passes_if_absent(condition: Condition, catalogue: Catalogue) -> Test | None:
    """Return a test that an absent fact without a default would pass and that does not say so, if there is one.

    `ne`, `not_in` and what stands under `not` hold for an absent fact; `absent: …` beside the test says what it means.
    """
    spoken = {test.fact for test, _ in tests_of(condition) if test.operator == "absent"}
    for test, negated in tests_of(condition):
        holds = (test.operator in NEGATED) != negated
        spec = catalogue[test.fact]
        if holds and test.operator != "absent" and test.fact not in spoken and not spec.has_default:
            return test
    return None
