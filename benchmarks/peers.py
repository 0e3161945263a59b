"""A gate for other rule engines, all of which are two-valued, from one formula that each spells in its own language.

How they are told of three values: an absent fact is the text `-` (a number: -2), an unknown one the text `?` (-1), and
each test is asked twice, whether it surely holds and whether it surely fails. So no engine meets a missing key.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import handwritten
from benchmarks.handwritten import show
from gatekeeper.catalogue import Catalogue
from gatekeeper.conditions import ALWAYS, All, Any_, Condition, FactRef, Not, Test, facts_of
from gatekeeper.operators import NEGATED
from gatekeeper.rules import Feature, Gate, Requirement
from gatekeeper.values import ABSENT, plain

Formula = tuple[Any, ...]
"""`("and" | "or", parts)`, `("not", part)`, `("==" | ">", name, constant)`, `("in", name, constants)`, `("same", name,
name)`, `("if", test, word, otherwise)`, `("word", text)`."""


class Formulas:
    """The formulas of a gate's decision and of its requirements."""

    def __init__(self, catalogue: Catalogue, feature: Feature, gate: Gate) -> None:
        self.catalogue, self.force = catalogue, str(feature.request.force)
        demands = [(one.waivable, *self._requirement(one.when, one.that)) for one in gate.requires]
        idle = [self.sure(one.when, False) if one.when != ALWAYS else None for one in gate.requires]
        self.requirements = [(holds, fails, i) for (_, holds, fails), i in zip(demands, idle, strict=True)]
        """Of each requirement, whether it surely holds, surely fails, and (None: always does) surely does not apply."""
        applies, foreign = self.sure(gate.applies_to, True), self.sure(gate.applies_to, False)
        force, forbid = _flat(feature.request.force), _flat(feature.request.forbid)
        forced, forbidden = ("==", force, True), ("==", forbid, True)
        asked = [("not", ("==", name, "?")) for name in (force, forbid)]
        hard = ("or", [fails for waivable, _, fails in demands if not waivable])
        every = ("or", [fails for _, _, fails in demands])
        holds = [("or", [forced, holds]) if waivable else holds for waivable, holds, _ in demands]
        bad = ("or", [forbidden, foreign, ("and", [applies, hard])])
        off = ("or", [forbidden, foreign, ("and", [applies, every])])
        self.states: dict[str, Formula] = {
            "error": ("and", [forced, bad]),
            "off": ("and", [("not", forced), off]),
            "on": ("and", [("not", forbidden), *asked, applies, *holds]),
        }
        """Of each state, when it is decided; none of them: pending."""

    @property
    def flat(self) -> list[Formula]:
        """All formulas of `requirements`, one after the other."""
        return [one for three in self.requirements for one in three if one is not None]

    def decision(self) -> Formula:
        """The state as one formula."""
        result: Formula = ("word", "pending")
        for state in ("on", "off", "error"):
            result = ("if", self.states[state], ("word", state), result)
        return result

    def _requirement(self, when: Condition, that: Condition) -> tuple[Formula, Formula]:
        either = Any_((Not(when), that))
        return self.sure(either, True), self.sure(either, False)

    def sure(self, condition: Condition, wanted: bool) -> Formula:
        """The formula of a condition that surely holds, or surely fails."""
        if isinstance(condition, Not):
            return self.sure(condition.part, not wanted)
        if isinstance(condition, All | Any_):
            if not condition.parts:
                return ("==", _flat("model.family"), "") if isinstance(condition, All) != wanted else _ALWAYS
            word = "and" if isinstance(condition, All) == wanted else "or"
            return (word, [self.sure(part, wanted) for part in condition.parts])
        assert isinstance(condition, Test)
        if condition.operator in NEGATED:
            raise NotImplementedError(condition.operator)
        return self._test(condition, wanted)

    def _test(self, test: Test, wanted: bool) -> Formula:
        if isinstance(test.operand, FactRef):
            fields = self.catalogue[test.fact].fields
            left = [_flat(f"{test.fact}.{key}") for key in fields]
            right = [_flat(f"{test.operand.name}.{key}") for key in fields]
            return self._records(left, right, wanted)
        name, unknown = _flat(test.fact), self.missing(test.fact, "unknown")
        word = {"eq": "==", "in": "in", "gt": ">"}[test.operator]
        holds = (word, name, plain(test.operand))  # type: ignore[arg-type]
        return holds if wanted else ("and", [("not", ("==", name, unknown)), ("not", holds)])

    def _records(self, left: list[str], right: list[str], wanted: bool) -> Formula:
        def is_(name: str, kind: str) -> Formula:
            return ("==", name, self.missing(name.replace("__", "."), kind))

        pairs = list(zip(left, right, strict=True))
        gone = [("and", [is_(name, "absent") for name in side]) for side in (left, right)]
        if wanted:
            same = [part for a, b in pairs for part in (("same", a, b), ("not", is_(a, "unknown")))]
            return ("and", [*same, ("not", gone[0])])
        differ = [
            ("and", [("not", ("same", a, b)), ("not", is_(a, "unknown")), ("not", is_(b, "unknown"))]) for a, b in pairs
        ]
        return ("or", [*differ, *gone])

    def missing(self, fact: str, kind: str) -> Any:
        """What stands for a fact that is absent or unknown."""
        number = self.catalogue[fact].type == "integer"
        return {"absent": -2 if number else "-", "unknown": -1 if number else "?"}[kind]

    def facts(self, names: list[str], values: Mapping[str, Any]) -> dict[str, Any]:
        """Facts as the peers take them."""
        kind = {name: "absent" if values.get(name) is ABSENT else "unknown" for name in names}
        return {
            _flat(name): plain(values[name])
            if name in values and values[name] is not ABSENT
            else self.missing(name, kind[name])
            for name in names
        }


def _flat(name: str) -> str:
    return name.replace(".", "__")


_ALWAYS: Formula = ("not", ("==", _flat("model.family"), ""))


def infix(formula: Formula, words: Mapping[str, str]) -> str:
    """A formula in a language that writes its operators between their sides."""
    word, *rest = formula
    if word in ("and", "or"):
        return "(" + f" {words[word]} ".join(infix(part, words) for part in rest[0]) + ")"
    if word == "not":
        return f"{words['not']}({infix(rest[0], words)})"
    if word == "if":
        test, yes, no = (infix(part, words) for part in rest)
        return f"({test} ? {yes} : {no})"
    if word == "word":
        return json.dumps(rest[0])
    if word == "same":
        return f"{rest[0]} == {rest[1]}"
    return f"{rest[0]} {word} {json.dumps(rest[1])}"


def jsonlogic(formula: Formula) -> Any:
    """A formula as JsonLogic."""
    word, *rest = formula
    if word in ("and", "or"):
        return {word: [jsonlogic(part) for part in rest[0]]}
    if word == "not":
        return {"!": [jsonlogic(rest[0])]}
    if word == "if":
        return {"if": [jsonlogic(part) for part in rest]}
    if word == "word":
        return rest[0]
    left = {"var": rest[0]}
    if word == "same":
        return {"===": [left, {"var": rest[1]}]}
    return {{"==": "==="}.get(word, word): [left, rest[1]]}


def schema(formula: Formula, domain: Mapping[str, list[Any]]) -> Any:
    """A formula as a JSON Schema, which can't compare two properties: the pairs that are equal are listed."""
    word, *rest = formula
    if word in ("and", "or"):
        return {{"and": "allOf", "or": "anyOf"}[word]: [schema(part, domain) for part in rest[0]]}
    if word == "not":
        return {"not": schema(rest[0], domain)}
    if word == "same":
        both = [{"properties": {name: {"const": value} for name in rest}} for value in domain[rest[0]]]
        return {"anyOf": both}
    test = {"==": "const", "in": "enum", ">": "exclusiveMinimum"}[word]
    return {"properties": {rest[0]: {test: rest[1]}}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One engine with the gate in it."""

    name: str
    prepare: Callable[[dict[str, Any]], Any]
    """Facts to what the engine takes; not part of the time."""
    state: Callable[[Any], str]
    truths: Callable[[Any], Sequence[Any]]
    """The truth of each of `Formulas.flat`."""


class Answers:
    """What no peer gives and each user of one has to add: ids, states, sentences and values, from truths alone."""

    def __init__(self, formulas: Formulas, gate: Gate) -> None:
        self._force = formulas.force
        self._rows = [
            (one.id, one.waivable, idle is not None, _parts(one.reason), _facts_of(one, formulas.catalogue))
            for one, (_, _, idle) in zip(gate.requires, formulas.requirements, strict=True)
        ]

    def __call__(self, values: Mapping[str, Any], truths: Sequence[Any]) -> list[Any]:
        """Return what `handwritten.reasons` returns."""
        get, truth, found = values.get, iter(truths), []
        forced = get(self._force) is True
        for name, waivable, may_idle, parts, facts in self._rows:
            holds, fails = next(truth), next(truth)
            if may_idle and next(truth):
                found.append((name, "not_applicable", "", None))
            elif holds:
                found.append((name, "passed", "", None))
            else:
                state = "waived" if waivable and forced else "failed" if fails else "unknown"
                words = [
                    text
                    if fact is None
                    else handwritten.difference(values)
                    if fact == "difference"
                    else show(get(fact))
                    for text, fact in parts
                ]
                found.append((name, state, "".join(words), {fact: get(fact) for fact in facts}))
        return found


def _parts(reason: str) -> list[tuple[str, str | None]]:
    """A reason as texts and facts, in turn."""
    pieces = re.split(r"\{([\w.]+)\}", reason)
    return [("", piece) if position % 2 else (piece, None) for position, piece in enumerate(pieces)]


def _facts_of(one: Requirement, catalogue: Catalogue) -> list[str]:
    specs = [catalogue[name] for name in sorted(facts_of(All((one.when, one.that))))]
    return [name for spec in specs for name in ([f"{spec.name}.{key}" for key in spec.fields] or [spec.name])]


C_LIKE = {"and": "&&", "or": "||", "not": "!"}
WORDS = {"and": "and", "or": "or", "not": "not "}


def rust_cel(formulas: Formulas, domain: Mapping[str, list[Any]]) -> Peer:
    cel = importlib.import_module("cel")
    state = cel.compile(infix(formulas.decision(), C_LIKE))
    truths = cel.compile("[" + ", ".join(infix(one, C_LIKE) for one in formulas.flat) + "]")
    return Peer(
        name="common-expression-language",
        prepare=dict,
        state=state.execute,
        truths=truths.execute,
    )


def zen_engine(formulas: Formulas, domain: Mapping[str, list[Any]]) -> Peer:
    zen = importlib.import_module("zen")
    state = zen.compile_expression(infix(formulas.decision(), WORDS))
    truths = zen.compile_expression("[" + ", ".join(infix(one, WORDS) for one in formulas.flat) + "]")
    return Peer(name="zen-engine", prepare=dict, state=state.evaluate, truths=truths.evaluate)


def jsonschema_rs(formulas: Formulas, domain: Mapping[str, list[Any]]) -> Peer:
    library = importlib.import_module("jsonschema_rs")
    states = [(word, library.validator_for(schema(one, domain)).is_valid) for word, one in formulas.states.items()]
    every = library.validator_for({"allOf": [schema(one, domain) for one in formulas.flat]})
    count = len(formulas.flat)

    def truths(facts: Any) -> list[bool]:
        failed = {error.schema_path[1] for error in every.iter_errors(facts)}
        return [index not in failed for index in range(count)]

    return Peer(
        name="jsonschema-rs",
        prepare=dict,
        state=lambda facts: next((word for word, is_valid in states if is_valid(facts)), "pending"),
        truths=truths,
    )


def rule_engine(formulas: Formulas, domain: Mapping[str, list[Any]]) -> Peer:
    library = importlib.import_module("rule_engine")
    state = library.Rule(infix(formulas.decision(), WORDS))
    truths = library.Rule("[" + ", ".join(infix(one, WORDS) for one in formulas.flat) + "]")
    return Peer(name="rule-engine", prepare=dict, state=state.evaluate, truths=truths.evaluate)


def cel_python(formulas: Formulas, domain: Mapping[str, list[Any]]) -> Peer:
    celpy = importlib.import_module("celpy")
    environment = celpy.Environment(runner_class=celpy.CompiledRunner)
    state = environment.program(environment.compile(infix(formulas.decision(), C_LIKE)))
    listed = "[" + ", ".join(infix(one, C_LIKE) for one in formulas.flat) + "]"
    truths = environment.program(environment.compile(listed))
    return Peer(
        name="cel-python",
        prepare=lambda facts: {name: celpy.json_to_cel(value) for name, value in facts.items()},
        state=lambda facts: str(state.evaluate(facts)),
        truths=truths.evaluate,
    )


def json_logic(formulas: Formulas, domain: Mapping[str, list[Any]]) -> Peer:
    apply = importlib.import_module("json_logic").jsonLogic
    state, truths = jsonlogic(formulas.decision()), [jsonlogic(one) for one in formulas.flat]
    return Peer(
        name="json-logic",
        prepare=dict,
        state=lambda facts: apply(state, facts),
        truths=lambda facts: [apply(one, facts) for one in truths],
    )


PEERS = (rust_cel, zen_engine, jsonschema_rs, rule_engine, cel_python, json_logic)
