"""A slow, obvious interpreter of the rule language, written from the design's text alone, to compare the engine with.

It knows nothing of the package: parsed YAML and one `--facts` line go in, plain dicts come out. Left out: overlays,
shadow mode, dependencies between features, `covers`, and every check made at load (rule sets are taken as valid).

Readings. Where the text leaves a choice, this is what a careful reader made of it; each hangs on the quoted sentence.

 1. "`force` and `forbid` are boolean facts" / "A request whose fact is unknown: decided as auto": each flag is a
    request of its own. The unknown one counts as not set, the known one still counts (force known true, forbid
    unknown: judged as forced, on becomes pending). An absent flag is false, an absent request fact is auto.
 2. "on is then pending": by any unknown request fact, `decided_by: request`; where line 7 already made it pending or
    off, that stands with `output-NAME`.
 3. "so is an error that a possible request would waive": an error of line 4 none of whose failed requirements
    protects correctness, while the force is unknown; an error of "none left" where an option has no failed
    correctness requirement, while the one request fact (which may name it) is unknown. Nothing further is simulated.
 4. "a gate may say `request: ignored`": it counts for an unknown force as well (on stays on; an unknown forbid or an
    unknown single request fact, which may say off, still makes it pending), and before line 1: forced and forbidden
    under such a gate is off, not an error. Such a decision is not `requested`.
 5. "`request: required` ... asked for by an unknown fact: pending at most": only the force (or the single fact)
    counts as asking; then it is judged as auto, and on or an error becomes pending by `request` (it may yet be off),
    off stays off.
 6. "before any requirement is judged" / "The first line that holds": lines 1, 2, `required` and "no MoE layer" report
    no outcomes.
 7. "no MoE layer: off with that note, an error if forced" / "one decision for each MoE layer": line 1 is the
    feature's; where it does not hold, "no MoE layer" comes before all other lines, even before an unknown or missing
    gate; only a gate known to apply that ignores requests makes a force count for nothing there.
 8. "an unknown list: decided once with every `layer.*` unknown": derived `layer.*` facts too. on becomes pending by
    `layers`, after line 7 and the unknown request had their say (`decided_by: request` wins).
 9. "all layers alike in state, option and outputs": `would_be` and outcomes of a layered decision are those of the
    layer that gives `decided_by` (the first in that state; mixed: the first not on; else the first). mixed has option
    null, would_be null and no outputs; error has every output at its `else`.
10. "`requires:` in the place of `that:` nests requirements under one `when`": the group has no outcome; each
    requirement in it is one of the gate's, its `when` being the group's and its own.
11. "`absent_passes: because ...`": says why, changes nothing (`ne`, `not_in`, `not` already hold for an absent fact).
12. "none of the gate's is unknown" (line 4), "something is unknown" (line 5): the gate's own requirements, not its
    options'. All failed with `on_failure: error` and one unknown falls through to line 5.
13. "if one before it is unknown: pending": where none passes and one is unknown it is pending too, `would_be` null.
    An option is failed if one of its requirements is, whatever is unknown beside it. `would_be` is null at line 5 and
    for an unknown option asked for by name.
14. "A pending choice: the first unknown before the option that would be": the unknown requirements of those options
    that are themselves unknown, pooled, ordered as elsewhere (correctness, `when` holds, file order). "the first
    failed of all options": pooled as well.
15. A choice made pending by line 7, by a request or by the unknown list has `option` null and that option as
    `would_be`.
16. "an output whose value is unknown makes it pending, one whose value is absent off": with both, absent wins (as
    failed wins over unknown). First in the order of declaration. `else` left out is null.
17. "`null` is absent in `model.* quant.* layer.*`; for a flag it means not set": in every other group it means not
    set. "groups under `assume` have what is not named absent": read as a null there, so a flag without default and
    without `null_means: absent` stays unknown. A fact given and also named in `unknown` is as given.
18. "`engine.X` ... is `server.X` unless that is `auto`": where the catalogue has a `server.X`; a null `server.X`
    without default makes it what that is.
19. "With `from` it [derive] is used where the key is absent": given, then derived, then `default`.
20. "Each field is a fact too and may be given by that name": a record given only so, by a known field, is there; by
    nulls alone it is unknown whether the record is absent. In a group under `assume` missing fields are absent.
21. "`every_layer` ... is false where no layer meets `where`": (some layer meets it) and (each: not where, or that),
    in Kleene's logic; over an unknown list both words are unknown, whatever `that` says. `where` left out is true.
22. "unknown: every comparison unknown": `any_item`/`every_item` of an unknown list are unknown even where the item
    test compares with an absent fact; `every_item` of an empty list is true even then.
23. "`*` within one, `**` across": `*` is any run without a dot, `**` any run; all else is literal.
24. "`derive` is a checked subset of Python expressions": `True` and, as in the YAML, `true`. "Absent in arithmetic
    gives absent (with unknown too)": `min max len` are arithmetic. Unknown divided by 0 is unknown. "unless both
    branches agree": equal known values, or both absent.
25. "Several gates": the gate whose `applies_to` is true decides although another's is unknown (they are disjoint).
    `applies_to` left out is true, `scope` left out is model, `runner` left out is target.
26. `decided_by` of a pending line 2 is `no-gate`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

Truth = bool | None  # None: unknown


class Missing(Enum):
    """What a reading is when it is no value."""

    ABSENT = "absent"
    UNKNOWN = "unknown"


ABSENT, UNKNOWN = Missing.ABSENT, Missing.UNKNOWN


class Version:
    """A version, compared by its release: `2.10.0+cpu` is `2.10`."""

    def __init__(self, text: str) -> None:
        self.text = text
        numbers = [int(part) for part in re.match(r"\d+(?:\.\d+)*", text).group().split(".")]  # type: ignore[union-attr]
        while numbers and numbers[-1] == 0:
            numbers.pop()
        self.release = tuple(numbers)


@dataclass
class Record:
    """A record's fields; `present` is None where all may be missing because the record is absent."""

    fields: dict[str, Any]
    present: Truth


# ---------------------------------------------------------------------------------------------------------- Kleene


def k_not(a: Truth) -> Truth:
    return None if a is None else not a


def k_all(truths: Iterable[Truth]) -> Truth:
    seen = list(truths)
    return False if False in seen else None if None in seen else True


def k_any(truths: Iterable[Truth]) -> Truth:
    return k_not(k_all(k_not(a) for a in truths))


# ---------------------------------------------------------------------------------------------------------- values


def same(a: Any, b: Any) -> bool:
    """Whether two known plain values are equal: booleans are not integers, 10 is 10.0, versions by release."""
    if isinstance(a, Version) or isinstance(b, Version):
        return as_version(a).release == as_version(b).release
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def as_version(value: Any) -> Version:
    return value if isinstance(value, Version) else Version(str(value))


def equal(a: Any, b: Any) -> Truth:
    """Whether two readings are equal, as the table and the paragraph on records say."""
    if a is ABSENT or b is ABSENT:
        return False
    if a is UNKNOWN or b is UNKNOWN:
        return None
    if isinstance(a, Record) and isinstance(b, Record):
        pairs = [field_equal(a.fields[name], b.fields[name]) for name in a.fields]
        return k_all([*pairs, True if a.present and b.present else None])
    return same(a, b)


def field_equal(a: Any, b: Any) -> Truth:
    if a is UNKNOWN or b is UNKNOWN:
        return None
    if a is ABSENT or b is ABSENT:
        return a is b
    return same(a, b)


def glob_matches(pattern: str, name: str) -> bool:
    regex = ""
    for piece in re.split(r"(\*\*|\*)", pattern):
        regex += {"**": ".*", "*": "[^.]*"}.get(piece, re.escape(piece))
    return re.fullmatch(regex, name) is not None


def ordered(a: Any, b: Any) -> tuple[Any, Any]:
    if isinstance(a, Version) or isinstance(b, Version):
        return as_version(a).release, as_version(b).release
    return a, b


def compare(word: str, a: Any, b: Any) -> bool:
    """One comparison of two known values, neither a record."""
    if word == "eq":
        return same(a, b)
    if word == "in":
        return any(same(a, item) for item in b)
    if word == "contains":
        return any(same(item, b) for item in a)
    if word == "divisible_by":
        return b != 0 and a % b == 0
    if word == "matches":
        return glob_matches(b, a)
    left, right = ordered(a, b)
    if word == "gt":
        return bool(left > right)
    if word == "ge":
        return bool(left >= right)
    if word == "lt":
        return bool(left < right)
    if word == "le":
        return bool(left <= right)
    raise ValueError(f"unknown operator `{word}`")


def compared(word: str, a: Any, b: Any) -> Truth:
    """One comparison of two readings: absent on either side is false, else unknown on either side unknown."""
    if word == "ne":
        return k_not(compared("eq", a, b))
    if word == "not_in":
        return k_not(compared("in", a, b))
    if word == "eq":
        return equal(a, b)
    if a is ABSENT or b is ABSENT:
        return False
    if a is UNKNOWN or b is UNKNOWN:
        return None
    return compare(word, a, b)


# ----------------------------------------------------------------------------------------------------------- facts

NULL_IS_ABSENT = ("model", "quant", "layer")


@dataclass(frozen=True)
class Place:
    """Where facts are read: the whole model, or one layer of it (`layer` None: no layer, or the list is unknown)."""

    rules: Mapping[str, Any]
    record: Mapping[str, Any]
    layer: Mapping[str, Any] | None = None

    @property
    def runner(self) -> str:
        return str(self.record.get("runner") or "target")

    def layers(self) -> list[Place] | None:
        """The layers this runner loads; None where the list is unknown."""
        listed = self.record.get("layers")
        if listed is None:
            return None
        role = {"target": "main", "draft": "mtp"}[self.runner]
        places = [replace(self, layer=layer) for layer in listed]
        return [place for place in places if place.read("layer.role") == role]

    def read(self, name: str) -> Any:
        """What one fact is here: a value, ABSENT or UNKNOWN."""
        if name == "model.runner":
            return self.runner
        if name not in self.rules["facts"]:
            parent, _, field = name.rpartition(".")
            if parent not in self.rules["facts"]:
                raise ValueError(f"unknown fact `{name}`")
            whole = self.read(parent)
            return whole if isinstance(whole, Missing) else whole.fields[field]
        if name.startswith("layer.") and self.layer is None:
            return UNKNOWN
        spec = self.rules["facts"][name]
        reading = ABSENT if "derive" in spec and "from" not in spec else self.given(name, spec)
        if reading is ABSENT and "derive" in spec:
            reading = derive(spec["derive"], self)
        if reading is ABSENT and "default" in spec:
            default = spec["default"]
            derived = isinstance(default, Mapping) and "derive" in default
            reading = derive(default["derive"], self) if derived else value_of(default, spec)
        return reading

    def given(self, name: str, spec: Mapping[str, Any]) -> Any:
        source = self.source(name)
        if spec["type"] == "record":
            return self.given_record(name, spec)
        if source.get(name) is not None:
            return value_of(source[name], spec)
        if name == "layer.role":
            return "main"
        return self.unset(name, spec) if name in source or self.assumed(name) else UNKNOWN

    def source(self, name: str) -> Mapping[str, Any]:
        return (self.layer or {}) if name.startswith("layer.") else self.record.get("facts", {})

    def assumed(self, name: str) -> bool:
        group = name.split(".")[0]
        return group in self.record.get("assume", []) and name not in self.record.get("unknown", [])

    def unset(self, name: str, spec: Mapping[str, Any]) -> Any:
        """What a null is: absent, or a flag that is not set."""
        group, _, rest = name.partition(".")
        if group in NULL_IS_ABSENT:
            return ABSENT
        if group == "engine" and f"server.{rest}" in self.rules["facts"]:
            typed = self.read(f"server.{rest}")
            return UNKNOWN if typed == "auto" else typed
        return ABSENT if "default" in spec or spec.get("null_means") == "absent" else UNKNOWN

    def given_record(self, name: str, spec: Mapping[str, Any]) -> Any:
        source, fields = self.source(name), {}
        whole = source.get(name)
        named = [
            f for f in spec["fields"] if f"{name}.{f}" in source or f"{name}.{f}" in self.record.get("unknown", [])
        ]
        if whole is None and not named:
            return ABSENT if name in source or self.assumed(name) else UNKNOWN
        for field, field_spec in spec["fields"].items():
            full = f"{name}.{field}"
            holder, key = (whole, field) if whole is not None and field in whole else (source, full)
            if key in holder:
                fields[field] = ABSENT if holder[key] is None else value_of(holder[key], field_spec)
            else:
                fields[field] = ABSENT if self.assumed(name) and self.assumed(full) else UNKNOWN
        known = any(not isinstance(reading, Missing) for reading in fields.values())
        return Record(fields, True if whole is not None or known else None)


def value_of(raw: Any, spec: Mapping[str, Any]) -> Any:
    if spec["type"] == "version":
        return Version(str(raw))
    if spec["type"] == "list":
        return [value_of(item, {"type": spec["items"]}) for item in raw]
    return raw


# ---------------------------------------------------------------------------------------------------------- derive

ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%"}
COMPARISONS = {
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.In: "in",
    ast.NotIn: "not_in",
}


def derive(text: str, place: Place) -> Any:
    """What a `derive` expression comes to here."""
    return worth(ast.parse(text.strip(), mode="eval").body, place)


def worth(node: ast.expr, place: Place) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return node.id == "true"
    if isinstance(node, ast.List | ast.Tuple):
        return [worth(item, place) for item in node.elts]
    if isinstance(node, ast.Attribute):
        return place.read(ast.unparse(node))
    if isinstance(node, ast.BinOp):
        return arithmetic(ARITHMETIC[type(node.op)], worth(node.left, place), worth(node.right, place))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return arithmetic("-", 0, worth(node.operand, place))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return reading(k_not(truth(worth(node.operand, place))))
    if isinstance(node, ast.BoolOp):
        truths = [truth(worth(value, place)) for value in node.values]
        return reading(k_all(truths) if isinstance(node.op, ast.And) else k_any(truths))
    if isinstance(node, ast.Compare):
        sides = [worth(side, place) for side in [node.left, *node.comparators]]
        words = [COMPARISONS[type(op)] for op in node.ops]
        return reading(k_all(compared(word, sides[i], sides[i + 1]) for i, word in enumerate(words)))
    if isinstance(node, ast.IfExp):
        test, yes, no = truth(worth(node.test, place)), worth(node.body, place), worth(node.orelse, place)
        if test is None:
            agree = yes is no is ABSENT or equal(yes, no) is True
            return yes if agree else UNKNOWN
        return yes if test else no
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return called(node.func.id, [worth(arg, place) for arg in node.args])
    raise ValueError(f"not allowed in derive: {ast.unparse(node)}")


def truth(value: Any) -> Truth:
    return False if value is ABSENT else None if value is UNKNOWN else bool(value)


def reading(a: Truth) -> Any:
    return UNKNOWN if a is None else a


def missing_of(values: list[Any]) -> Missing | None:
    return ABSENT if ABSENT in values else UNKNOWN if UNKNOWN in values else None


def arithmetic(sign: str, a: Any, b: Any) -> Any:
    missing = missing_of([a, b])
    if missing:
        return missing
    if sign == "+":
        return a + b
    if sign == "-":
        return a - b
    if sign == "*":
        return a * b
    if b == 0:
        return ABSENT
    if sign == "//":
        return a // b
    if sign == "%":
        return a % b
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else ABSENT
    return a / b


def called(function: str, values: list[Any]) -> Any:
    if function == "coalesce":
        return next((value for value in values if value is not ABSENT), ABSENT)
    if function == "present":
        (value,) = values
        return there(value)
    missing = missing_of(values)
    if missing:
        return missing
    return {"min": min, "max": max, "len": len}[function](*values)  # type: ignore[operator]


def there(value: Any) -> Any:
    """Whether a reading is not absent: True, False or UNKNOWN."""
    if isinstance(value, Record):
        return reading(value.present)
    return UNKNOWN if value is UNKNOWN else value is not ABSENT


# ------------------------------------------------------------------------------------------------------ conditions


def holds(condition: Mapping[str, Any], place: Place) -> Truth:
    """The truth of a condition: a conjunction of its entries."""
    return k_all(entry_holds(key, value, place) for key, value in condition.items())


def entry_holds(key: str, value: Any, place: Place) -> Truth:
    if key == "all":
        return k_all(holds(part, place) for part in value)
    if key == "any":
        return k_any(holds(part, place) for part in value)
    if key == "not":
        return k_not(holds(value, place))
    if key == "use":
        names = [value] if isinstance(value, str) else value
        return k_all(holds(place.rules["conditions"][name]["that"], place) for name in names)
    if key in ("every_layer", "any_layer"):
        return layers_hold(key, value, place)
    return test_holds(place.read(key), value, place)


def layers_hold(word: str, body: Mapping[str, Any], place: Place) -> Truth:
    layers = place.layers()
    if layers is None:
        return None
    met = [holds(body.get("where", {}), layer) for layer in layers]
    that = [holds(body["that"], layer) for layer in layers]
    if word == "any_layer":
        return k_any(k_all([w, t]) for w, t in zip(met, that, strict=True))
    return k_all([k_any(met), *(k_any([k_not(w), t]) for w, t in zip(met, that, strict=True))])


def test_holds(left: Any, test: Any, place: Place) -> Truth:
    if isinstance(test, list):
        return compared("in", left, test)
    if not isinstance(test, Mapping):
        return compared("eq", left, test)
    if "fact" in test:
        return compared("eq", left, place.read(test["fact"]))
    return k_all(operator_holds(word, left, right, place) for word, right in test.items())


def operator_holds(word: str, left: Any, right: Any, place: Place) -> Truth:
    if word == "absent":
        is_there = there(left)
        return None if is_there is UNKNOWN else is_there is not right
    if word in ("any_item", "every_item"):
        if isinstance(left, Missing):
            return False if left is ABSENT else None
        items = [test_holds(item, right, place) for item in left]
        return k_any(items) if word == "any_item" else k_all(items)
    if isinstance(right, Mapping):
        right = place.read(right["fact"])
    return compared(word, left, right)


# ---------------------------------------------------------------------------------------------------- requirements


@dataclass(frozen=True)
class Requirement:
    """One requirement of a gate with its shared text and its groups' conditions filled in."""

    id: str
    protects: str
    when: tuple[Mapping[str, Any], ...]
    that: Mapping[str, Any]
    on_failure: str


@dataclass(frozen=True)
class Outcome:
    """What one requirement came to; `when` is whether it surely applies."""

    requirement: Requirement
    state: str
    when: bool

    @property
    def rank(self) -> tuple[bool, bool]:
        """Correctness first, then those whose `when` holds; file order is kept by a stable sort."""
        return (self.requirement.protects != "correctness", not self.when)


def requirements_of(items: list[Any], rules: Mapping[str, Any], when: tuple[Any, ...] = ()) -> list[Requirement]:
    found = []
    for item in items:
        body = dict(item)
        if "use" in body:
            name = body.pop("use")
            body = {**rules["requirements"][name], **body, "id": name}
        whens = (*when, body["when"]) if "when" in body else when
        if "requires" in body:
            found += requirements_of(body["requires"], rules, whens)
        else:
            on_failure = body.get("on_failure", "off")
            found.append(Requirement(body["id"], body["protects"], whens, body["that"], on_failure))
    return found


def judge(requirement: Requirement, place: Place, waive: bool) -> Outcome:
    when = k_all(holds(condition, place) for condition in requirement.when)
    if when is False:
        return Outcome(requirement, "not_applicable", False)
    formula = k_any([k_not(when), holds(requirement.that, place)])
    state = {True: "passed", False: "failed", None: "unknown"}[formula]
    if waive and state != "passed" and requirement.protects != "correctness":
        state = "waived"
    return Outcome(requirement, state, when is True)


def in_state(outcomes: Iterable[Outcome], state: str) -> list[Outcome]:
    return sorted((outcome for outcome in outcomes if outcome.state == state), key=lambda outcome: outcome.rank)


def harms_correctness(outcomes: Iterable[Outcome]) -> bool:
    return any(o.state == "failed" and o.requirement.protects == "correctness" for o in outcomes)


# --------------------------------------------------------------------------------------------------------- request


@dataclass(frozen=True)
class Ask:
    """What the operator asked for; the `maybe_` fields: an unknown fact may ask for it."""

    forced: bool = False
    forbidden: bool = False
    option: str | None = None
    maybe_forced: bool = False
    maybe_forbidden: bool = False
    maybe_option: bool = False

    @property
    def unknown(self) -> bool:
        return self.maybe_forced or self.maybe_forbidden

    @property
    def word(self) -> str:
        if self.forced and self.forbidden:
            return "both"
        if self.forbidden:
            return "off"
        if self.unknown:
            return "unknown"
        return self.option or ("on" if self.forced else "auto")

    def without_force(self) -> Ask:
        return replace(self, forced=False, option=None, maybe_forced=False, maybe_option=False)


def asked(feature: Mapping[str, Any], options: set[str], place: Place) -> Ask:
    request = feature.get("request")
    if request is None:
        return Ask()
    if isinstance(request, Mapping):
        force, forbid = (place.read(request[word]) if word in request else False for word in ("force", "forbid"))
        return Ask(
            forced=force is True,
            forbidden=forbid is True,
            maybe_forced=force is UNKNOWN,
            maybe_forbidden=forbid is UNKNOWN,
        )
    said = place.read(request)
    if said is UNKNOWN:
        return Ask(maybe_forced=True, maybe_forbidden=True, maybe_option=bool(options))
    if said in (ABSENT, "auto"):
        return Ask()
    if said in ("on", "off"):
        return Ask(forced=said == "on", forbidden=said == "off")
    if said not in options:
        raise ValueError(f"`{request}` is `{said}`, expected auto, on, off or one of {sorted(options)}")
    return Ask(forced=True, option=said)


# ---------------------------------------------------------------------------------------------------------- states


@dataclass(frozen=True)
class Gate:
    """A gate and its declaration; `body` is the same mapping as `feature` where they share a file."""

    feature: Mapping[str, Any]
    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.body.get("gate", self.body["feature"]))

    @property
    def shared(self) -> bool:
        return "outputs" in self.body and self.body is self.feature

    @property
    def request(self) -> Any:
        return None if self.body is self.feature else self.body.get("request")


def answer(feature: Mapping[str, Any], state: str, by: str | None, **more: Any) -> dict[str, Any]:
    outputs = {name: spec.get("else") for name, spec in feature.get("outputs", {}).items()}
    blank = {"option": None, "would_be": None, "outputs": outputs, "outcomes": []}
    return {"state": state, "decided_by": by, **blank, **more}


def naive_decide(rule_set: Mapping[str, Any], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Decide every feature of a rule set on one `--facts` line; one dict a feature, sorted by name."""
    place = Place(rule_set, record)
    return [decide_feature(name, place) for name in sorted(rule_set["features"])]


def gates_of(name: str, rules: Mapping[str, Any]) -> list[Gate]:
    feature = rules["features"][name]
    bodies = [body for body in rules.get("gates", []) if body["feature"] == name]
    if any(key in feature for key in ("gate", "applies_to", "requires", "options")):
        bodies.append(feature)
    return [Gate(feature, body) for body in bodies]


def decide_feature(name: str, place: Place) -> dict[str, Any]:
    feature, gates = place.rules["features"][name], gates_of(name, place.rules)
    applies = [holds(gate.body.get("applies_to", {}), place) for gate in gates]
    gate = next((gate for gate, truth in zip(gates, applies, strict=True) if truth), None)
    as_asked = asked(feature, {option["option"] for g in gates for option in g.body.get("options", [])}, place)
    ask = as_asked.without_force() if gate and gate.request == "ignored" else as_asked

    def once(where: Place) -> dict[str, Any]:
        return decide_once(feature, gate, applies, ask, where)

    layers: list[dict[str, Any]] | None = None
    if feature.get("scope", "model") == "model":
        found = once(place)
    else:
        found, layers = decide_layers(feature, ask, place, once)
    about = {"feature": name, "gate": gate.name if gate else None, "request": as_asked.word, "requested": ask.forced}
    return {**about, **found, "layers": layers}


def decide_once(
    feature: Mapping[str, Any], gate: Gate | None, applies: list[Truth], ask: Ask, place: Place
) -> dict[str, Any]:
    """The lines, for one layer or for the model."""
    if ask.forbidden:  # line 1
        return answer(feature, "error" if ask.forced else "off", "request")
    if gate is None:  # line 2
        state = "pending" if None in applies else "error" if ask.forced else "off"
        return answer(feature, state, "no-gate")
    if gate.request == "required" and not (ask.forced or ask.maybe_forced):
        return answer(feature, "off", "request")
    found = decide_gate(gate, ask, place)
    if gate.request == "required" and not ask.forced and found["state"] == "error":
        return {**found, "state": "pending", "decided_by": "request"}
    return found


def decide_layers(
    feature: Mapping[str, Any], ask: Ask, place: Place, once: Callable[[Place], dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """A feature of scope layer: what its layers come to together, and each layer's decision."""
    places = place.layers()
    if places is None:
        found = once(place)
        if found["state"] != "on":
            return found, None
        kept = {"would_be": found["option"], "outcomes": found["outcomes"]}
        return answer(feature, "pending", "layers", **kept), None
    if not places and ask.forbidden:
        return once(place), []
    if not places:
        return answer(feature, "error" if ask.forced else "off", "layers"), []
    layers = []
    for one in places:
        shown = {"index": shown_value(one.read("layer.index")), "role": one.read("layer.role")}
        layers.append({**shown, **once(one)})
    return together(feature, layers), layers


def together(feature: Mapping[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
    def alike(layer: dict[str, Any]) -> bool:
        return all(layer[key] == layers[0][key] for key in ("state", "option", "outputs"))

    if all(alike(layer) for layer in layers):
        first = layers[0]
        return {key: first[key] for key in ("state", "decided_by", "option", "would_be", "outputs", "outcomes")}
    errors = [layer for layer in layers if layer["state"] == "error"]
    not_on = [layer for layer in layers if layer["state"] != "on"]
    if errors:
        return answer(feature, "error", errors[0]["decided_by"], outcomes=errors[0]["outcomes"])
    first = (not_on or layers)[0]
    return answer(feature, "mixed", first["decided_by"], outputs={}, outcomes=first["outcomes"])


def decide_gate(gate: Gate, ask: Ask, place: Place) -> dict[str, Any]:
    """Lines 3 to 7, for one layer or for the model."""
    feature, options = gate.feature, gate.body.get("options", [])
    needs = requirements_of(gate.body.get("requires", []), place.rules)
    own = [judge(need, place, ask.forced) for need in needs]
    of_option = {}
    for option in options:
        needs = requirements_of(option.get("requires", []), place.rules)
        of_option[option["option"]] = [judge(need, place, ask.option == option["option"]) for need in needs]
    every = [*own, *(outcome for outcomes in of_option.values() for outcome in outcomes)]
    outcomes = [{"id": outcome.requirement.id, "state": outcome.state} for outcome in every]

    def came_to(state: str, by: str | None, would_be: str | None = None) -> dict[str, Any]:
        return answer(feature, state, by, would_be=would_be, outcomes=outcomes)

    failed, unknown = in_state(own, "failed"), in_state(own, "unknown")
    if ask.forced and harms_correctness(own):  # line 3
        return came_to("error", failed[0].requirement.id)
    if failed:  # line 4
        if all(outcome.requirement.on_failure == "error" for outcome in failed):
            if not unknown:
                waivable = ask.maybe_forced and not harms_correctness(own)
                return came_to("pending", "request") if waivable else came_to("error", failed[0].requirement.id)
        else:
            return came_to("off", failed[0].requirement.id)
    if unknown:  # line 5
        return came_to("pending", unknown[0].requirement.id)
    chosen = None
    if options:  # line 6
        state, by, chosen = choose(gate, ask, of_option)
        if state != "on":
            return came_to(state, by, chosen)
    outputs = outputs_of(gate, chosen, place)  # line 7
    for missing, state in ((ABSENT, "error" if ask.forced else "off"), (UNKNOWN, "pending")):
        for name, value in outputs.items():
            if value is missing:
                return came_to(state, f"output-{name}", chosen if state == "pending" else None)
    if ask.unknown:
        return came_to("pending", "request", chosen)
    return answer(feature, "on", None, option=chosen, outputs=outputs, outcomes=outcomes)


def choose(gate: Gate, ask: Ask, of_option: Mapping[str, list[Outcome]]) -> tuple[str, str | None, str | None]:
    """Line 6: state, decided_by, and the option chosen (or that would be)."""

    def state_of(outcomes: list[Outcome]) -> str:
        states = [outcome.state for outcome in outcomes]
        return "failed" if "failed" in states else "unknown" if "unknown" in states else "passed"

    if ask.option is not None and ask.option in of_option:
        outcomes = of_option[ask.option]
        state = state_of(outcomes)
        if state == "passed":
            return "on", None, ask.option
        by = in_state(outcomes, state)[0].requirement.id
        return ("pending", by, None) if state == "unknown" else ("error", by, None)

    open_before: list[Outcome] = []
    would_be = None
    for option, outcomes in of_option.items():
        if state_of(outcomes) == "passed":
            would_be = option
            break
        if state_of(outcomes) == "unknown":
            open_before += outcomes
    if open_before:
        return "pending", in_state(open_before, "unknown")[0].requirement.id, would_be
    if would_be is not None:
        return "on", None, would_be
    failed = in_state([outcome for outcomes in of_option.values() for outcome in outcomes], "failed")
    state = "error" if ask.forced else gate.body.get("on_failure", "off")
    if state == "error" and ask.maybe_option and not all(map(harms_correctness, of_option.values())):
        return "pending", "request", None
    return state, failed[0].requirement.id, None


def outputs_of(gate: Gate, chosen: str | None, place: Place) -> dict[str, Any]:
    """Each output's value, ABSENT or UNKNOWN: the option's beats the gate's beats the feature's."""
    option = next((option for option in gate.body.get("options", []) if option["option"] == chosen), {})
    values = {}
    for name, spec in gate.feature.get("outputs", {}).items():
        given_by_gate = {} if gate.shared else gate.body.get("outputs", {})
        value = option.get("outputs", {}).get(name, given_by_gate.get(name, spec.get("value")))
        if isinstance(value, Mapping):
            value = shown_value(place.read(value["fact"]))
        values[name] = value
    return values


def shown_value(value: Any) -> Any:
    return value.text if isinstance(value, Version) else value
