"""A slow, obvious interpreter of the rule language, written from the design's text alone, to compare the engine with.

It knows nothing of the package: parsed YAML and one `--facts` line go in, plain dicts come out. Left out: `item` in
`derive`, `covers` for lists that hold patterns and for quantizers with rules of their own (whole names are there), and
every check made at load (rule sets are taken as valid).

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
20. "Each field is a fact too and may be given by that name": a record is there by a known field, and absent where all
    of its fields are; by nulls and unknown fields alone it is unknown whether it is absent. In a group under `assume`
    missing fields are absent.
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
27. "in a layer gate that layer's, in a model gate the feature's": `applies_to` and `request` ask for the feature's;
    `every_layer` and `any_layer`, in a model gate too, for each layer's. A layer's is unknown while that layer is
    pending, the feature's while it or any of its layers is. Where the other feature's list of layers is unknown or
    empty, the feature's is the layer's.
28. "`mixed`, whose option and outputs are given by layer only": as facts they are absent, as is the option of anything
    but on and an output that is null.
29. "Errors are final" says that none turns to on. One that is not forced, found while the list of layers is unknown,
    may still turn out to be off ("no MoE layer"), so until then the feature's facts are unknown: the promise binds.
30. "a shadow decision ... consumers and other gates see it as off": in every state, pending too, and whatever is asked.
    A gate's mode beats the feature's, which counts where no gate applies. As long as the gate is unknown, and those
    that may apply (or none) differ in their mode, the facts are unknown unless it is off anyhow.
31. "a request whose fact is unknown: ... for other gates the feature's facts are unknown": in every state, off and
    error too; a request that the gate ignores does not count.
32. An overlay drops first, replaces next, adds last. "whole": what takes the place of a requirement stands alone,
    without the `when` of the group and the overrides of the `use` that it replaces, at their place in file order. What
    is added comes last. Requirements of an option are replaced with their option. Shared requirements are amended
    before gates use them; a `use` keeps its overrides. "outputs whole": the gate's own, the feature's values stand.
33. "a pending outcome says at which stage it resolves": the latest stage of all unknown facts that it tests; the list
    of layers is known with the checkpoint, and over an unknown one every `layer.*` fact is unknown. A record's field
    has the record's stage. What is derived (also by default) has the latest stage of what it reads, one with `from` not
    before its group's; what a feature came to, that of the facts that it names, one of scope layer not before the list
    of layers. Over an empty list no `layer.*` fact is open.
34. `covers`: absent in the list, NAME or `quant.method` is false, else unknown in one of them unknown. A listed name
    covers itself; but for ModelOpt (globs "on the whole name or on a dotted part") also as any run of NAME's segments.
35. "any other word in the fact is an error that lists the options": of the decision, by `request`, where an option is
    to be chosen (line 6).
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
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
    number: int | None = None  # of this layer, among those that the runner loads
    decided: dict[str, Seen] = field(default_factory=dict)  # features decided so far, for one another

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
        loaded = [place for place in places if place.read("layer.role") == role]
        return [replace(place, number=number) for number, place in enumerate(loaded)]

    def read(self, name: str) -> Any:
        """What one fact is here: a value, ABSENT or UNKNOWN."""
        if name == "model.runner":
            return self.runner
        if name.startswith("feature."):
            return self.came_to(name)
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
            reading = derived(spec["derive"], spec, self)
        if reading is ABSENT and "default" in spec:
            default = spec["default"]
            by_rule = isinstance(default, Mapping) and "derive" in default
            reading = derived(default["derive"], spec, self) if by_rule else value_of(default, spec)
        return reading

    def came_to(self, name: str) -> Any:
        """What a fact `feature.NAME.*` is here: a feature is decided when another asks for it (there are no cycles)."""
        _, feature, *rest = name.split(".")
        if feature not in self.decided:
            decide_feature(feature, replace(self, layer=None, number=None))
        return self.decided[feature].read(rest, self.number)

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
        for each, field_spec in spec["fields"].items():
            full = f"{name}.{each}"
            holder, key = (whole, each) if whole is not None and each in whole else (source, full)
            if key in holder:
                fields[each] = ABSENT if holder[key] is None else value_of(holder[key], field_spec)
            else:
                fields[each] = ABSENT if self.assumed(name) and self.assumed(full) else UNKNOWN
        if all(reading is ABSENT for reading in fields.values()):
            return ABSENT
        known = any(not isinstance(reading, Missing) for reading in fields.values())
        return Record(fields, True if known else None)


def value_of(raw: Any, spec: Mapping[str, Any]) -> Any:
    if spec["type"] == "version":
        return as_version(raw)
    if spec["type"] == "number":
        return float(raw)
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


def derived(text: str, spec: Mapping[str, Any], place: Place) -> Any:
    """What a `derive` expression comes to here, as a value of the fact's type."""
    found = worth(ast.parse(text.strip(), mode="eval").body, place)
    return found if isinstance(found, Missing) else value_of(found, spec)


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
    if word == "covers":
        return covered(left, right, place)
    if isinstance(right, Mapping):
        right = place.read(right["fact"])
    return compared(word, left, right)


def covered(listed: Any, template: str, place: Place) -> Truth:
    method = place.read("quant.method")
    parts = [place.read(part[1:-1]) if part[0] == "{" else part for part in re.findall(r"\{[^}]*\}|[^{]+", template)]
    missing = missing_of([listed, method, *parts])
    if missing:
        return False if missing is ABSENT else None
    segments = "".join(parts).split(".")
    runs = {tuple(segments[start:end]) for start in range(len(segments)) for end in range(start + 1, len(segments) + 1)}
    if method == "modelopt":
        runs = {tuple(segments), *((segment,) for segment in segments)}
    return any(tuple(name.split(".")) in runs for name in listed)


# ---------------------------------------------------------------------------------------------------------- stages

STAGES = ("config", "checkpoint", "platform", "layout")
STAGE_OF_GROUP = {"layer": "checkpoint", "platform": "platform", "library": "platform", "env": "platform"}
STAGE_OF_GROUP |= {"parallel": "layout", "server": "layout", "engine": "layout"}
LAYERS = "layer.*"  # the list of them


def latest(stages: Iterable[str]) -> str:
    return max(stages, key=STAGES.index, default="config")


def stage_of(name: str, rules: Mapping[str, Any]) -> str:
    """When a fact can be known at the earliest."""
    if name.startswith("feature."):
        return latest(stage_of(read, rules) for read in read_by_feature(name.split(".")[1], rules))
    spec = rules["facts"].get(name) or rules["facts"].get(name.rpartition(".")[0], {})
    if "stage" in spec:
        return str(spec["stage"])
    default = spec.get("default")
    texts = [spec.get("derive"), default.get("derive") if isinstance(default, Mapping) else None]
    trees = [ast.parse(text.strip(), mode="eval") for text in texts if text is not None]
    reads = {ast.unparse(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    group = STAGE_OF_GROUP.get(name.split(".")[0], "config")
    own = [] if "derive" in spec and "from" not in spec else [group]
    return latest([*own, *(stage_of(read, rules) for read in reads)])


def read_by_feature(name: str, rules: Mapping[str, Any]) -> set[str]:
    """The facts that a feature's declaration and gates name."""
    feature = rules["features"][name]
    request = feature.get("request")
    reads = set(request.values()) if isinstance(request, Mapping) else {request} - {None}
    reads |= named_in([spec.get("value") for spec in feature.get("outputs", {}).values()], rules)
    for gate in gates_of(name, rules):
        options = gate.body.get("options", [])
        needs = [*gate.body.get("requires", []), *(need for one in options for need in one.get("requires", []))]
        for need in requirements_of(needs, rules):
            reads |= named_in([*need.when, need.that], rules)
        outputs = [gate.body.get("outputs", {}), *(one.get("outputs", {}) for one in options)]
        reads |= named_in([gate.body.get("applies_to", {}), *outputs], rules)
    return reads - {LAYERS} | ({LAYERS} if feature.get("scope") == "layer" else set())


def named_in(data: Any, rules: Mapping[str, Any]) -> set[str]:
    """The facts that conditions or output values name."""
    if isinstance(data, list):
        return {name for item in data for name in named_in(item, rules)}
    if not isinstance(data, Mapping):
        return set()
    found = set()
    for key, value in data.items():
        if key == "use":
            names = [value] if isinstance(value, str) else value
            found |= named_in([rules["conditions"][name]["that"] for name in names], rules)
        elif key == "fact":
            found.add(value)
        elif key == "covers":
            found |= {"quant.method", *re.findall(r"\{([^}]*)\}", value)}
        else:
            found |= {key} if "." in key else {LAYERS} if key in ("every_layer", "any_layer") else set()
            found |= named_in(value, rules)
    return found


def open_facts(condition: Mapping[str, Any], place: Place) -> set[str]:
    """The unknown facts that a condition tests."""
    found: set[str] = set()
    for key, value in condition.items():
        if key in ("all", "any"):
            found |= {name for part in value for name in open_facts(part, place)}
        elif key == "not":
            found |= open_facts(value, place)
        elif key == "use":
            names = [value] if isinstance(value, str) else value
            found |= {name for one in names for name in open_facts(place.rules["conditions"][one]["that"], place)}
        elif key in ("every_layer", "any_layer"):
            layers = place.layers()
            found |= {LAYERS} if layers is None else set()
            for layer in layers or [replace(place, layer=None)]:
                asked_of = open_facts(value.get("where", {}), layer) | open_facts(value["that"], layer)
                found |= {name for name in asked_of if layers != [] or not name.startswith("layer.")}
        else:
            found |= {name for name in named_in({key: value}, place.rules) if is_open(place.read(name))}
    return found


def is_open(reading: Any) -> bool:
    if isinstance(reading, Record):
        return reading.present is None or UNKNOWN in reading.fields.values()
    return reading is UNKNOWN


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
    resolves_at: str | None = None

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
    resolves_at = None
    if state == "unknown":
        facts = {name for part in (*requirement.when, requirement.that) for name in open_facts(part, place)}
        resolves_at = latest(stage_of(name, place.rules) for name in facts)
    return Outcome(requirement, state, when is True, resolves_at)


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
    return Ask(forced=True, option=said)


# ---------------------------------------------------------------------------------------------------------- states


@dataclass(frozen=True)
class Gate:
    """A gate and the declaration of its feature."""

    feature: Mapping[str, Any]
    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.body.get("gate", self.body["feature"]))

    @property
    def mode(self) -> str:
        return str(self.body.get("mode", self.feature.get("mode", "enforce")))


def answer(feature: Mapping[str, Any], state: str, by: str | None, **more: Any) -> dict[str, Any]:
    outputs = {name: spec.get("else") for name, spec in feature.get("outputs", {}).items()}
    blank = {"option": None, "would_be": None, "outputs": outputs, "outcomes": []}
    return {"state": state, "decided_by": by, **blank, **more}


def naive_decide(rule_set: Mapping[str, Any], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Decide every feature of a rule set on one `--facts` line; one dict a feature, sorted by name."""
    place = Place(laid_over(rule_set), record)
    for name in place.rules["features"]:
        if name not in place.decided:
            decide_feature(name, place)
    return [place.decided[name].decision for name in sorted(place.rules["features"])]


def gates_of(name: str, rules: Mapping[str, Any]) -> list[Gate]:
    return [Gate(rules["features"][name], body) for body in rules["gates"] if body["feature"] == name]


def decide_feature(name: str, place: Place) -> None:
    """Decide one feature and note it down for the others."""
    feature, gates = place.rules["features"][name], gates_of(name, place.rules)
    applies = [holds(gate.body.get("applies_to", {}), place) for gate in gates]
    gate = next((gate for gate, truth in zip(gates, applies, strict=True) if truth), None)
    as_asked = asked(feature, {option["option"] for g in gates for option in g.body.get("options", [])}, place)
    ask = as_asked.without_force() if gate and gate.body.get("request") == "ignored" else as_asked

    def once(where: Place) -> dict[str, Any]:
        return decide_once(feature, gate, applies, ask, where)

    layers: list[dict[str, Any]] | None = None
    if feature.get("scope", "model") == "model":
        found = once(place)
    else:
        found, layers = decide_layers(feature, ask, place, once)
    modes = {one.mode for one, truth in zip(gates, applies, strict=True) if truth is not False}
    modes = {gate.mode} if gate else modes | {feature.get("mode", "enforce")}
    about = {
        "feature": name,
        "gate": gate.name if gate else None,
        "mode": gate.mode if gate else feature.get("mode", "enforce"),
        "request": as_asked.word,
        "requested": ask.forced,
    }
    decision = {**about, **found, "layers": layers}
    may_be_off = feature.get("scope") == "layer" and layers is None and found["state"] == "error" and not ask.forced
    open_gates = [one for one, truth in zip(gates, applies, strict=True) if not gate and truth is not False]
    may_be_off |= found["state"] == "error" and any(one.body.get("request") == "ignored" for one in open_gates)
    place.decided[name] = Seen(feature, decision, modes, settled=not ask.unknown and not may_be_off)


@dataclass(frozen=True)
class Seen:
    """A decision as other gates see it; `modes` are those that it may turn out to have."""

    feature: Mapping[str, Any]
    decision: Mapping[str, Any]
    modes: set[str]
    settled: bool

    def read(self, rest: list[str], layer: int | None) -> Any:
        """The fact `feature.NAME.` and `rest`, in one layer or (None) as a whole."""
        layers = self.decision["layers"] or []
        one = layers[layer] if layers and layer is not None else self.decision
        states = {one["state"], *(each["state"] for each in layers if layer is None)}
        off = answer(self.feature, "off", None)
        if self.modes == {"shadow"}:
            one = off
        elif "pending" in states or not self.settled or ("shadow" in self.modes and one["state"] != "off"):
            return UNKNOWN
        if rest == ["outputs", rest[-1]]:
            raw = one["outputs"].get(rest[-1])
            return ABSENT if raw is None else value_of(raw, self.feature["outputs"][rest[-1]])
        found = one[rest[0]]
        return ABSENT if found is None else found


def decide_once(
    feature: Mapping[str, Any], gate: Gate | None, applies: list[Truth], ask: Ask, place: Place
) -> dict[str, Any]:
    """The lines, for one layer or for the model."""
    if ask.forbidden:  # line 1
        return answer(feature, "error" if ask.forced else "off", "request")
    if gate is None:  # line 2
        state = "pending" if None in applies else "error" if ask.forced else "off"
        return answer(feature, state, "no-gate")
    if gate.body.get("request") == "required" and not (ask.forced or ask.maybe_forced):
        return answer(feature, "off", "request")
    found = decide_gate(gate, ask, place)
    if gate.body.get("request") == "required" and not ask.forced and found["state"] == "error":
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
    outcomes = [{"id": o.requirement.id, "state": o.state, "resolves_at": o.resolves_at} for o in every]

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

    if ask.option is not None:
        if ask.option not in of_option:
            return "error", "request", None
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
        value = option.get("outputs", {}).get(name, gate.body.get("outputs", {}).get(name, spec.get("value")))
        if isinstance(value, Mapping):
            value = shown_value(place.read(value["fact"]))
        values[name] = value
    return values


def shown_value(value: Any) -> Any:
    return value.text if isinstance(value, Version) else value


# -------------------------------------------------------------------------------------------------------- overlays

GATE_WORDS = ("applies_to", "requires", "options", "on_failure")


def laid_over(rule_set: Mapping[str, Any]) -> dict[str, Any]:
    """The rule set with each gate apart from its declaration, and what its `overlays` add and amend in their order."""
    rules = {
        kind: copy.deepcopy(rule_set.get(kind, {})) for kind in ("facts", "features", "requirements", "conditions")
    }
    rules["gates"] = copy.deepcopy(rule_set.get("gates", []))
    amendments: list[dict[str, Any]] = []
    for overlay in rule_set.get("overlays", []):
        for kind in ("facts", "features", "requirements", "conditions"):
            rules[kind] |= copy.deepcopy(overlay.get(kind, {}))
        rules["gates"] += copy.deepcopy(overlay.get("gates", []))
        amendments += copy.deepcopy(overlay.get("amendments", []))
    for name, feature in rules["features"].items():
        if any(word in feature for word in GATE_WORDS):
            gate = {word: feature.pop(word) for word in GATE_WORDS if word in feature}
            rules["gates"].append({"feature": name, **gate})
    for amendment in sorted(amendments, key=lambda one: "/" in one["amends"]):
        if "/" in amendment["amends"]:
            amend_gate(amendment, rules)
        else:
            amend_shared(amendment, rules)
    return rules


def amend_shared(amendment: Mapping[str, Any], rules: Mapping[str, Any]) -> None:
    name = amendment["amends"]
    for change in amendment.get("replace", []):
        rules["requirements"][name] = change["requirement"]
    if "drop" in amendment:
        lists = [gate["requires"] for gate in rules["gates"] if "requires" in gate]
        lists += [one["requires"] for gate in rules["gates"] for one in gate.get("options", []) if "requires" in one]
        for items in lists:
            items[:] = without(name, items)


def without(name: str, items: list[Any]) -> list[Any]:
    """A list of requirements less the one of this id, also where it stands in a group."""
    left = [item for item in items if name not in (item.get("id"), item.get("use"))]
    return [{**item, "requires": without(name, item["requires"])} if "requires" in item else item for item in left]


def amend_gate(amendment: Mapping[str, Any], rules: Mapping[str, Any]) -> None:
    feature, _, name = amendment["amends"].partition("/")
    (gate,) = (
        body for body in rules["gates"] if (body["feature"], body.get("gate", body["feature"])) == (feature, name)
    )
    options = gate.get("options", [])
    for change in amendment.get("drop", []):
        if "requirement" in change:
            gate["requires"] = without(change["requirement"], gate["requires"])
        else:
            options[:] = [option for option in options if option["option"] != change["option"]]
    for change in amendment.get("replace", []):
        if "requirement" in change:
            gate["requires"] = replaced(change["requirement"], gate["requires"])
        elif "option" in change:
            options[:] = [change["option"] if o["option"] == change["option"]["option"] else o for o in options]
        else:
            gate |= {word: change[word] for word in ("applies_to", "request", "outputs") if word in change}
    for change in amendment.get("add", []):
        if "requirement" in change:
            gate["requires"] = [*gate.get("requires", []), change["requirement"]]
        else:
            names = [option["option"] for option in options]
            options.insert(names.index(change["before"]) if "before" in change else len(names), change["option"])


def replaced(new: dict[str, Any], items: list[Any]) -> list[Any]:
    """A list of requirements with another in the place of that of its id; a group is split around it."""
    for number, item in enumerate(items):
        before, after = items[:number], items[number + 1 :]
        if new["id"] in (item.get("id"), item.get("use")):
            return [*before, new, *after]
        inner = replaced(new, item.get("requires", []))
        if new in inner:
            first, last = inner[: inner.index(new)], inner[inner.index(new) + 1 :]
            return [*before, {**item, "requires": first}, new, {**item, "requires": last}, *after]
    return items
