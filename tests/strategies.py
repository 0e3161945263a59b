"""Hypothesis strategies: rule sets that are valid by construction, and records of facts to decide them on.

A rule set comes as plain data (for `tests/naive.py`) and as the YAML files that say the same (for the engine), its
overlays apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from hypothesis import strategies as st

# ------------------------------------------------------------------------------------------------------------ YAML


class VersionText(str):
    """A version constant: written without quotes, so that the reader must take it from the source's text."""

    __slots__ = ()


class Writer(yaml.CSafeDumper):
    """Block YAML without anchors, which our reader refuses."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_version(writer: Writer, text: VersionText) -> yaml.Node:
    return writer.represent_scalar(writer.resolve(yaml.ScalarNode, str(text), (True, False)), str(text))


Writer.add_representer(VersionText, write_version)


def to_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=Writer, sort_keys=False, width=10_000, allow_unicode=True)


def plain(data: Any) -> Any:
    """The same data with ordinary strings for versions."""
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [plain(value) for value in data]
    return str(data) if isinstance(data, str) else data


# ------------------------------------------------------------------------------------------------------- catalogue

FAMILIES = ["fa", "fb", "fc"]
OPTIONS = ["opt-a", "opt-b", "opt-c"]
NEW_OPTION = "opt-x"  # one that an overlay adds
FEATURES = ["alpha", "beta", "gamma"]
INTEGERS = [0, 1, 2, 3, 4, 6, 128]
STORAGE = {
    "format": {"type": "string", "doc": "Its format."},
    "width": {"type": "integer", "doc": "Its width."},
    "block": {"type": "integer", "doc": "Its block."},
}

# Few values a type, so that comparisons often hold.
VALUES: dict[str, list[Any]] = {
    "boolean": [True, False],
    "integer": INTEGERS,
    "number": [0.5, 1, 1.0, 2.5, 4],
    "string": ["a", "b", "a.b", "a.x.b", "a.b.c", "modelopt"],
    "version": [VersionText(text) for text in ("2.1", "2.10", "2.10.0", "2.10.0+cpu", "2.11.0.dev1", "3")],
    "arch": ["sm90", "sm100", "gfx942"],
}
STAGES = ["config", "checkpoint", "platform", "layout"]
GLOBS = ["a", "a.*", "a.**", "*.b", "**.b", "a.*.c", "a.x.b", "*", "**"]

MODULES = ["a", "a.b", "a.{model.kind}", "{model.kind}.b", "{model.other_kind}", "a.b.c"]  # that a list may cover

Spec = dict[str, Any]


def scalars(spec: Spec) -> st.SearchStrategy[Any]:
    """A value of a fact's type."""
    if "values" in spec:
        return st.sampled_from(spec["values"])
    if spec["type"] == "list":
        return st.lists(st.sampled_from(VALUES[spec["items"]]), max_size=3)
    return st.sampled_from(VALUES[spec["type"]])


@st.composite
def catalogues(draw: st.DrawFn) -> dict[str, Spec]:
    """The facts of a rule set, by name."""

    def fact(type_: str, *given_by: str, may_default: bool = True, **more: Any) -> Spec:
        spec: Spec = {"type": type_, "doc": "A fact.", "given_by": list(given_by), **more}
        derives = "derive" in spec or isinstance(spec.get("default"), Mapping)
        if not derives and draw(st.integers(0, 9)) == 0:
            spec["stage"] = draw(st.sampled_from(STAGES))
        if may_default and draw(st.integers(0, 3)) == 0:
            spec["default"] = draw(scalars(spec))
        return spec

    def flag(type_: str, **more: Any) -> Spec:
        spec = fact(type_, "flags", "caller", **more)
        if "default" not in spec and draw(st.booleans()):
            spec["null_means"] = "absent"
        return spec

    facts = {
        "model.runner": {"type": "enum", "values": ["target", "draft"], "doc": "The runner.", "given_by": ["caller"]},
        "model.family": fact("enum", "config", values=FAMILIES),
        "model.n": fact("integer", "config", **{"from": ["n"]}),
        "model.m": fact("integer", "config", **{"from": ["m"]}),
        "model.rate": fact("number", "config", **{"from": ["rate"]}),
        "model.kind": fact("string", "config", **{"from": ["kind"]}),
        "model.other_kind": fact("string", "config", **{"from": ["other_kind"]}),
        "model.tags": fact("list", "config", items="string", may_default=False, **{"from": ["tags"]}),
        "model.sizes": fact("list", "config", items="integer", **{"from": ["sizes"]}),
        "quant.method": fact("string", "config"),
        "server.eplb": flag("boolean"),
        "server.backend": flag("enum", values=["auto", "a", "b"]),
        "engine.backend": fact("enum", "caller", values=["auto", "a", "b"], may_default=False),
        "parallel.tp_size": flag("integer"),
        "platform.arch": fact("arch", "platform", "caller", null_means="absent"),
        "library.triton": fact("version", "platform", "caller", null_means="absent"),
        "layer.index": {"type": "integer", "doc": "Its number.", "given_by": ["headers"]},
        "layer.role": {"type": "enum", "values": ["main", "mtp"], "doc": "Its role.", "given_by": ["headers"]},
        "layer.size": fact("integer", "headers"),
        "layer.excluded": fact("boolean", "headers"),
        "layer.routed_storage": {"type": "record", "fields": STORAGE, "doc": "Routed.", "given_by": ["headers"]},
        "layer.shared_storage": {"type": "record", "fields": STORAGE, "doc": "Shared.", "given_by": ["headers"]},
    }
    facts["engine.backend"].pop("stage", None)  # it comes from `server.backend`, and so derives
    for layer, group in ((False, "moe"), (True, "layer")):
        for type_ in draw(st.lists(st.sampled_from(list(DERIVABLE)), min_size=2, max_size=3)):
            name = f"{group}.derived_{type_}"
            text = draw(expressions(Words(without(facts, name), layer=layer), type_))
            facts[name] = {**DERIVABLE[type_], "doc": "Derived.", "derive": text}
    words = Words({name: spec for name, spec in facts.items() if "derive" not in spec}, layer=False)
    text = draw(expressions(words, "integer"))
    facts["model.mixed"] = fact("integer", "config", derive=text, may_default=False, **{"from": ["mixed"]})
    if draw(st.booleans()):
        default = {"derive": draw(expressions(words, "integer"))}
        facts["quant.bits"] = fact("integer", "config", default=default, may_default=False)
    return facts


def without(facts: Mapping[str, Spec], name: str) -> dict[str, Spec]:
    """The facts that `name` may read, even where it is declared again: no derived one of its group."""
    group = name.split(".")[0] + ".derived_"
    return {each: spec for each, spec in facts.items() if each != name and not each.startswith(group)}


# ------------------------------------------------------------------------------------------------------ conditions


@dataclass
class Words:
    """What a condition may name: facts by type, and named conditions."""

    facts: Mapping[str, Spec]
    layer: bool  # whether it may name layer.* facts
    uses: list[str] = field(default_factory=list)
    every_layer: bool = False

    def names(self, type_: str | None = None, items: str | None = None) -> list[str]:
        """Those of a type, of lists those of one type of items."""
        found = []
        for name, spec in self.facts.items():
            if self.layer or not name.startswith("layer."):
                found.append((name, spec["type"]))
                fields = spec.get("fields", {})
                found += [(f"{name}.{each}", field_spec["type"]) for each, field_spec in fields.items()]
        return [
            name
            for name, of_type in found
            if type_ in (None, of_type) and items in (None, self.spec(name).get("items"))
        ]

    def spec(self, name: str) -> Spec:
        if name in self.facts:
            return self.facts[name]
        parent, _, each = name.rpartition(".")
        return self.facts[parent]["fields"][each]


@st.composite
def tests_of(draw: st.DrawFn, words: Words, name: str) -> Any:
    """A test of one fact, right for its type."""
    spec = words.spec(name)
    type_ = spec["type"]
    ways = [{"absent": draw(st.booleans())}]
    if type_ == "record":
        others = [other for other in words.names("record") if other != name]
        to_other = {"fact": draw(st.sampled_from(others))}
        return draw(st.sampled_from([to_other, to_other, {"ne": to_other}, {"eq": to_other}, *ways]))
    if type_ == "list":
        item = draw(st.sampled_from(VALUES[spec["items"]]))
        test = draw(item_tests(spec["items"]))
        if spec["items"] == "string" and draw(st.booleans()):
            return {"covers": draw(st.sampled_from(MODULES))}
        kinds = words.names(spec["items"])
        ways += [{"contains": item}, {"contains": {"fact": draw(st.sampled_from(kinds))}}]
        ways += [{"any_item": test}, {"every_item": test}, {"contains": item, "every_item": test}]
        return draw(st.sampled_from(ways))
    value, values = draw(scalars(spec)), draw(st.lists(scalars(spec), min_size=1, max_size=3))
    if name.startswith("feature."):
        ways += [value, value, {"absent": False}]
    ways += [value, value, values, values, {"eq": value}, {"ne": value}, {"in": values}, {"not_in": values}]
    if type_ != "enum":
        others = [other for other in words.names(type_) if other != name]
        if others:
            to_other = {"fact": draw(st.sampled_from(others))}
            ways += [to_other, {"eq": to_other}, {"ne": to_other}]
    if type_ in ("integer", "number", "version"):
        low, high = (draw(st.sampled_from(pair)) for pair in (["gt", "ge"], ["lt", "le"]))
        ways += [{low: value}, {high: value}, {low: value, high: draw(scalars(spec))}]
        others = [other for other in words.names(type_) if other != name]
        if others:
            ways += [{draw(st.sampled_from([low, high])): {"fact": draw(st.sampled_from(others))}}]
    if type_ == "integer":
        other = draw(st.sampled_from(words.names("integer")))
        ways += [{"divisible_by": draw(st.sampled_from([0, 1, 2, 3, 64]))}, {"divisible_by": {"fact": other}}]
    if type_ == "string":
        ways += [{"matches": draw(st.sampled_from(GLOBS))}, {"in": {"fact": "model.tags"}}]
        ways += [{"not_in": {"fact": "model.tags"}}]
    if len(ways) > 6 and draw(st.integers(0, 5)) == 0:
        ways = [{"ne": value, "absent": False}]
    return draw(st.sampled_from(ways))


@st.composite
def item_tests(draw: st.DrawFn, type_: str) -> Any:
    value = draw(st.sampled_from(VALUES[type_]))
    ways: list[Any] = [value, [value, VALUES[type_][0]], {"ne": value}, {"eq": value}, {"not_in": [value]}]
    if type_ == "string":
        return draw(st.sampled_from([*ways, {"matches": draw(st.sampled_from(GLOBS))}]))
    return draw(st.sampled_from([*ways, {"ge": value}, {"lt": value}, {"divisible_by": value}]))


@st.composite
def conditions(draw: st.DrawFn, words: Words, depth: int = 2) -> dict[str, Any]:
    """A condition: often one test, sometimes a tree."""
    inner = conditions(words, depth - 1)
    kinds = ["test"] * 5 + ["tests"]
    if depth > 0:
        kinds += ["all", "any", "any", "not", "mixed"] + ["use"] * bool(words.uses)
        kinds += ["every_layer", "any_layer"] * words.every_layer
    kind = draw(st.sampled_from(kinds))
    if kind in ("test", "tests", "mixed"):
        layered = [name for name in words.names() if name.startswith("layer.")]
        decided = [name for name in words.names() if name.startswith("feature.")]
        pool = words.names() + layered + decided * 3  # where layers and other features may be asked, they matter
        names = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=1 if kind == "test" else 2, unique=True))
        condition = {name: draw(tests_of(words, name)) for name in names}
        return condition | ({"not": draw(inner)} if kind == "mixed" else {})
    if kind in ("all", "any"):
        return {kind: draw(st.lists(inner, min_size=1, max_size=3))}
    if kind == "not":
        return {"not": draw(inner)}
    if kind == "use":
        names = draw(st.lists(st.sampled_from(words.uses), min_size=1, max_size=2, unique=True))
        return {"use": names[0] if len(names) == 1 and draw(st.booleans()) else names}
    per_layer = conditions(Words(words.facts, layer=True), 1)
    body = {"where": draw(per_layer)} if draw(st.booleans()) else {}
    return {kind: {**body, "that": draw(per_layer)}}


# ----------------------------------------------------------------------------------------------------- expressions

DERIVABLE: dict[str, Spec] = {
    "integer": {"type": "integer"},
    "boolean": {"type": "boolean"},
    "number": {"type": "number"},
    "string": {"type": "string"},
    "version": {"type": "version"},
    "list": {"type": "list", "items": "string"},
    "enum": {"type": "enum", "values": FAMILIES},
}
CONSTANTS = {
    "integer": ["0", "1", "2", "3", "4", "64"],
    "number": ["0.5", "1.0", "2.5"],
    "boolean": ["true", "false"],
    "string": ["'a'", "'b'", "'a.b'"],
    "version": ["'2.10'", "'2.9'"],
    "list": ["['a', 'b']", "['a.b']", "[]"],
    "enum": [f"'{family}'" for family in FAMILIES],
}


@st.composite
def expressions(draw: st.DrawFn, words: Words, type_: str, depth: int = 2) -> str:
    """A `derive` expression that gives a value of this type."""
    names = words.names(type_, "string" if type_ == "list" else None) if type_ != "enum" else ["model.family"]
    if depth == 0 or (type_ not in ("integer", "boolean") and draw(st.booleans())):
        return draw(st.sampled_from(names * 3 + CONSTANTS[type_] if draw(st.booleans()) else names or CONSTANTS[type_]))

    def inner(of: str = type_) -> str:
        return draw(expressions(words, of, depth - 1))

    if type_ == "boolean":
        return f"({draw(tests_in_expressions(words, inner))})"
    ways = ["if", "coalesce", "coalesce"]
    if type_ in ("integer", "number"):
        ways += ["+", "-", "*", "/", "/", "//", "%", "min", "max", "-x"] + ["len"] * (type_ == "integer")
    way = draw(st.sampled_from(ways))
    if way == "if":
        return f"({inner()} if {inner('boolean')} else {inner()})"
    if way == "len":
        return f"len({draw(st.sampled_from(words.names('list')))})"
    if way == "-x":
        return f"-{inner()}"
    if way in ("coalesce", "min", "max"):
        return f"{way}({inner()}, {inner()})"
    return f"({inner()} {way} {inner()})"


@st.composite
def tests_in_expressions(draw: st.DrawFn, words: Words, inner: Callable[[str], str]) -> str:
    """What gives a boolean: comparisons, and what joins them."""
    way = draw(st.sampled_from(["compare", "compare", "equal", "in", "present", "and", "or", "not", "if", "record"]))
    if way == "compare":
        type_ = draw(st.sampled_from(["integer", "integer", "number", "version"]))
        left = draw(st.sampled_from(words.names("version"))) if type_ == "version" else inner(type_)
        # Two texts have no order, so a version stands in the chain but once.
        sides = [left, *(inner(type_) for _ in range(draw(st.sampled_from([1, 1, 2])) if type_ != "version" else 1))]
        return (
            "".join(f"{side} {draw(st.sampled_from(['<', '<=', '>', '>=', '==']))} " for side in sides[:-1]) + sides[-1]
        )
    if way == "equal":
        type_ = draw(st.sampled_from(["integer", "string", "boolean", "enum"]))
        left = "model.family" if type_ == "enum" else inner(type_)
        return f"{left} {draw(st.sampled_from(['==', '!=']))} {inner(type_)}"
    if way == "in":
        type_, constants = draw(st.sampled_from([("integer", "[1, 2, 128]"), ("string", "['a', 'a.b']")]))
        right = draw(st.sampled_from([constants, "model.sizes" if type_ == "integer" else "model.tags"]))
        return f"{inner(type_)} {draw(st.sampled_from(['in', 'not in']))} {right}"
    if way == "present":
        return f"present({draw(st.sampled_from(words.names()))})"
    if way == "record" and words.layer:
        return "layer.routed_storage == layer.shared_storage"
    if way == "not":
        return f"not {inner('boolean')}"
    if way == "if":
        return f"{inner('boolean')} if {inner('boolean')} else {inner('boolean')}"
    return f"{inner('boolean')} {'or' if way == 'or' else 'and'} {inner('boolean')}"


# ---------------------------------------------------------------------------------------------------- requirements


def has_negation(data: Any, rules: Mapping[str, Any]) -> bool:
    """Whether an absent fact may make a condition hold: by `ne`, `not_in`, `not` or `where`, in named ones too."""
    if isinstance(data, Mapping):
        used = data.get("use", [])
        names = [used] if isinstance(used, str) else used
        return (
            any(key in ("ne", "not_in", "not", "where") for key in data)
            or any(has_negation(value, rules) for value in data.values())
            or any(has_negation(rules["conditions"][name]["that"], rules) for name in names)
        )
    return isinstance(data, list) and any(has_negation(value, rules) for value in data)


@dataclass
class Made:
    """A feature as it was made, for those that ask for it and for what amends it."""

    feature: dict[str, Any]
    words: Words
    gates: list[dict[str, Any]] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    only_by: dict[str, list[str]] = field(default_factory=dict)  # who gives each output

    @property
    def name(self) -> str:
        return str(self.feature["feature"])

    @property
    def model_words(self) -> Words:
        """What its `applies_to` may name."""
        uses = [use for use in self.words.uses if use.startswith("model-")]
        return replace(self.words, layer=False, every_layer=False, uses=uses)

    def facts(self) -> dict[str, Spec]:
        """What it came to, as facts."""
        states = ["on", "off", "error"] + ["mixed"] * self.words.layer
        facts: dict[str, Spec] = {"state": {"type": "enum", "values": states}}
        facts["option"] = {"type": "string", "values": [*OPTIONS, NEW_OPTION]}
        facts |= {f"outputs.{name}": spec for name, spec in self.feature.get("outputs", {}).items()}
        return {f"feature.{self.name}.{name}": spec for name, spec in facts.items()}


@dataclass
class Context:
    """A rule set as it grows."""

    rules: dict[str, Any]
    made: list[Made] = field(default_factory=list)
    count: int = 0

    def words(self, *, layer: bool, every_layer: bool = False) -> Words:
        uses = [name for name in self.rules["conditions"] if layer or name.startswith("model-")]
        facts = {**self.rules["facts"], **{name: spec for made in self.made for name, spec in made.facts().items()}}
        return Words(facts, layer=layer, uses=uses, every_layer=every_layer)

    def next_id(self, stem: str) -> str:
        self.count += 1
        return f"{stem}-{self.count}"


PROTECTS = ["correctness", "correctness", "support", "speed"]


@st.composite
def requirements(draw: st.DrawFn, context: Context, words: Words, *, of_option: bool = False) -> dict[str, Any]:
    """One requirement of a gate's own (or an option's)."""
    body: dict[str, Any] = {"id": context.next_id("need"), "protects": draw(st.sampled_from(PROTECTS))}
    return body | draw(bodies(context, words, of_option=of_option))


@st.composite
def bodies(draw: st.DrawFn, context: Context, words: Words, *, of_option: bool = False) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if draw(st.integers(0, 2)) == 0:
        body["when"] = draw(conditions(words, 1))
    body["that"] = draw(conditions(words))
    body["reason"] = "This does not hold."
    if not of_option and draw(st.integers(0, 2)) == 0:
        body["on_failure"] = draw(st.sampled_from(["error", "error", "off"]))
    if has_negation(body, context.rules):
        body["absent_passes"] = "because what is not there does no harm"
    return body


@st.composite
def requirement_lists(draw: st.DrawFn, context: Context, words: Words, *, of_option: bool = False) -> list[Any]:
    """What stands under `requires`: own ones, shared ones, and one group at most."""
    shared = [name for name in context.rules["requirements"] if words.layer or name.startswith("model-")]
    items: list[Any] = []
    for _ in range(draw(st.integers(0 if of_option else 1, 2 if of_option else 3))):
        kind = draw(st.sampled_from(["own", "own", "own", "group"] + ["use", "use"] * bool(shared)))
        if kind == "own" or (of_option and kind == "use"):
            items.append(draw(requirements(context, words, of_option=of_option)))
        elif kind == "use":
            item: dict[str, Any] = {"use": shared.pop(draw(st.integers(0, len(shared) - 1)))}
            if draw(st.integers(0, 3)) == 0:
                item["when"] = draw(conditions(words, 0).filter(lambda when: not has_negation(when, context.rules)))
            if draw(st.integers(0, 3)) == 0:
                item["protects"] = draw(st.sampled_from(PROTECTS))
            if draw(st.integers(0, 3)) == 0:
                item["on_failure"] = draw(st.sampled_from(["error", "off"]))
            items.append(item)
        else:
            when = conditions(words, 1).filter(lambda when: not has_negation(when, context.rules))
            count = draw(st.integers(1, 2))
            inside = [draw(requirements(context, words, of_option=of_option)) for _ in range(count)]
            items.append({"when": draw(when), "requires": inside})
    return items


# -------------------------------------------------------------------------------------------------------- features


def output_values(words: Words, spec: Spec) -> st.SearchStrategy[Any]:
    """A value of an output: a literal or a fact."""
    facts = [{"fact": name} for name in words.names(spec["type"], spec.get("items"))]
    return scalars(spec) | st.sampled_from(facts) if facts else scalars(spec)


@st.composite
def given_outputs(draw: st.DrawFn, made: Made, *by: str) -> dict[str, Any]:
    """The values of those outputs that a gate or an option is to give, under `outputs`."""
    outputs = made.feature.get("outputs", {})
    given = {name: draw(output_values(made.words, outputs[name])) for name, who in made.only_by.items() if who[0] in by}
    return {"outputs": given} if given else {}


@st.composite
def option_bodies(draw: st.DrawFn, context: Context, made: Made, option: str) -> dict[str, Any]:
    body: dict[str, Any] = {"option": option}
    if draw(st.integers(0, 3)) == 0:
        body["degraded"] = "Slower."
    body |= draw(given_outputs(made, "option"))
    needs = draw(requirement_lists(context, made.words, of_option=True))
    return body | ({"requires": needs} if needs else {})


@st.composite
def requests(draw: st.DrawFn, rules: dict[str, Any], name: str, options: list[str]) -> dict[str, Any]:
    """A feature's `request`, its facts added to the catalogue."""
    kind = draw(st.sampled_from(["none", "flags", "flags", "one", "one", "derived"]))
    doc = {"doc": "What was asked for.", "given_by": ["flags", "caller"]}
    default: dict[str, Any] = draw(st.sampled_from([{"default": "auto"}, {"null_means": "absent"}]))
    if kind == "none":
        return {}
    if kind == "flags":
        words = draw(st.sampled_from([["force", "forbid"], ["force", "forbid"], ["force"], ["forbid"]]))
        for word in words:
            missing = draw(st.sampled_from([{"default": False}, {"null_means": "absent"}]))
            rules["facts"][f"server.{word}_{name}"] = {"type": "boolean", **doc, **missing}
        return {"request": {word: f"server.{word}_{name}" for word in words}}
    spec = {"type": "enum", "values": ["auto", "on", "off", *options], **doc, **default}
    rules["facts"][f"server.use_{name}"] = spec
    if kind == "one":
        return {"request": f"server.use_{name}"}
    rules["facts"][f"engine.requested_{name}"] = {
        "type": "enum",
        "values": list(spec["values"]),
        "doc": "What was asked for of this runner.",
        "derive": f"server.use_{name} if model.runner == 'target' else 'auto'",
    }
    return {"request": f"engine.requested_{name}"}


@st.composite
def features(draw: st.DrawFn, context: Context, name: str) -> None:
    """One feature with its gates, put into the rule set; it may ask for those made before it."""
    rules = context.rules
    layer, choice = draw(st.booleans()), draw(st.booleans())
    gate_count = draw(st.sampled_from([1, 1, 2, 3]))
    one_file = gate_count == 1 and draw(st.booleans())

    feature: dict[str, Any] = {"feature": name, "summary": "A feature."}
    made = Made(feature, context.words(layer=layer, every_layer=not layer))
    made.options += OPTIONS[: draw(st.integers(1, 3))] if choice else []
    if layer or draw(st.booleans()):
        feature["scope"] = "layer" if layer else "model"
    if draw(st.integers(0, 5)) == 0:
        feature["mode"] = draw(st.sampled_from(["shadow", "shadow", "enforce"]))
    feature |= draw(requests(rules, name, made.options))
    types = draw(st.lists(st.sampled_from(["integer", "string", "boolean"] * 2 + ["version", "list"]), max_size=2))
    for number, type_ in enumerate(types):
        ways = ["feature", "feature"] + ["gate", "both"] * (not one_file) + ["option", "option"] * choice
        made.only_by[f"out_{number}"] = [draw(st.sampled_from(ways))]
        spec: dict[str, Any] = {"type": type_, **({"items": "string"} if type_ == "list" else {})}
        if made.only_by[f"out_{number}"][0] in ("feature", "both"):
            spec["value"] = draw(output_values(made.words, spec))
        spec["else"] = draw(st.none() | scalars(spec))
        feature.setdefault("outputs", {})[f"out_{number}"] = spec

    families = draw(st.permutations(FAMILIES))
    for number in range(gate_count):
        gate: dict[str, Any] = feature if one_file else {"feature": name}
        made.gates.append(gate)
        if gate_count > 1 or (not one_file and draw(st.booleans())):
            gate["gate"] = f"gate_{number}"
        if gate_count > 1:
            gate["applies_to"] = {"model.family": families[number]}
            if gate_count == 2 and number == 1 and draw(st.booleans()):
                gate["applies_to"] = {"model.family": families[1:]}
            if draw(st.integers(0, 3)) == 0:
                gate["applies_to"] |= {"model.n": draw(st.sampled_from(INTEGERS))}
        elif draw(st.integers(0, 3)) == 0:
            gate["applies_to"] = draw(conditions(made.model_words, 1))
        if not one_file:
            if "request" in feature and draw(st.integers(0, 2)) == 0:
                gate["request"] = draw(st.sampled_from(["required", "ignored"]))
            if draw(st.integers(0, 7)) == 0:
                gate["mode"] = draw(st.sampled_from(["shadow", "enforce"]))
            gate |= draw(given_outputs(made, "gate", "both"))
            rules["gates"].append(gate)
        gate["requires"] = draw(requirement_lists(context, made.words))
        if choice:
            if draw(st.booleans()):
                gate["on_failure"] = draw(st.sampled_from(["error", "off"]))
            gate["options"] = [
                draw(option_bodies(context, made, option)) for option in draw(st.permutations(made.options))
            ]
    rules["features"][name] = feature
    context.made.append(made)


@st.composite
def rule_sets(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, str], list[dict[str, str]]]:
    """A valid rule set of some features: as plain data, as its files (path -> YAML), and those of its overlays."""
    manifest = {"name": "random", "version": "1.0.0", "language": 1}
    rules: dict[str, Any] = {"manifest": manifest, "facts": draw(catalogues()), "features": {}, "gates": []}
    rules |= {"requirements": {}, "conditions": {}, "overlays": []}
    context = Context(rules)
    for stem, layer in (("model", False), ("layer", True)):
        for number in range(draw(st.integers(0, 2))):
            that = draw(conditions(context.words(layer=layer), 1))
            rules["conditions"][f"{stem}-condition-{number}"] = {"doc": "A condition.", "that": that}
    for stem, layer in (("model", False), ("layer", True)):
        for number in range(draw(st.integers(0, 2))):
            body = {"protects": draw(st.sampled_from(PROTECTS)), **draw(bodies(context, context.words(layer=layer)))}
            rules["requirements"][f"{stem}-need-{number}"] = body
    names = draw(st.permutations(FEATURES))
    for name in names[: draw(st.sampled_from([1, 1, 2, 2, 3]))]:
        draw(features(context, name))
    if draw(st.integers(0, 2)) == 0:
        draw(overlays(context))
    files = files_of(rules)
    return plain(rules), files, [files_of({"manifest": manifest, **overlay}) for overlay in rules["overlays"]]


def files_of(rules: Mapping[str, Any]) -> dict[str, str]:
    """The files of a rule set or an overlay: path -> YAML."""
    files = {"ruleset.yaml": to_yaml(rules["manifest"])}
    for name, feature in rules.get("features", {}).items():
        files[f"features/{name}.yaml"] = to_yaml(feature)
    for gate in rules.get("gates", []):
        files[f"gates/{gate['feature']}/{gate.get('gate', gate['feature'])}.yaml"] = to_yaml(gate)
    for number, amendment in enumerate(rules.get("amendments", [])):
        files[f"gates/amendment_{number}.yaml"] = to_yaml(amendment)
    for kind in ("facts", "conditions", "requirements"):
        if rules.get(kind):
            files["facts/facts.yaml" if kind == "facts" else f"{kind}.yaml"] = to_yaml({kind: rules[kind]})
    return files


# -------------------------------------------------------------------------------------------------------- overlays

BECAUSE = {"because": "because this site needs it so"}


@st.composite
def overlays(draw: st.DrawFn, context: Context) -> None:
    """One or two overlays, put into the rule set: what they amend, and sometimes a feature of their own."""
    rules = context.rules
    found: list[dict[str, Any]] = [{"amendments": []} for _ in range(draw(st.integers(1, 2)))]
    if len(context.made) > 1 and draw(st.integers(0, 2)) == 0:
        name = context.made[-1].name
        found[0]["features"] = {name: rules["features"].pop(name)}
        found[0]["gates"] = [gate for gate in rules["gates"] if gate["feature"] == name]
        rules["gates"] = [gate for gate in rules["gates"] if gate["feature"] != name]
    amended = [name for name in rules["requirements"] if draw(st.integers(0, 3)) == 0]
    for name in amended:
        words = context.words(layer=name.startswith("layer-"))
        # A shared requirement may be used by the first feature, so its new text asks for none.
        words.facts = rules["facts"]
        new = {"protects": draw(st.sampled_from(PROTECTS)), **draw(bodies(context, words))}
        change = draw(st.sampled_from([{"replace": [{"requirement": new, **BECAUSE}]}, {"drop": [BECAUSE]}]))
        draw(st.sampled_from(found))["amendments"].append({"amends": name, **change})
    for made in context.made:
        for gate in made.gates:
            changes = draw(gate_changes(context, made, gate, amended)) if draw(st.booleans()) else {}
            if changes:
                amends = f"{made.name}/{gate.get('gate', made.name)}"
                # The last overlay: what the others hold is there by then.
                found[-1]["amendments"].append({"amends": amends, **changes})
    rules["overlays"] = [overlay for overlay in found if overlay["amendments"] or "features" in overlay]


@st.composite
def gate_changes(draw: st.DrawFn, context: Context, made: Made, gate: Spec, taken: list[str]) -> dict[str, Any]:
    """What is added to, replaced in and dropped from one gate, each part at most once."""
    needs = [inner for item in gate["requires"] for inner in item.get("requires", [item])]
    ids = [name for name in (need.get("id", need.get("use")) for need in needs) if name not in taken]
    options = [option["option"] for option in gate.get("options", [])] if len(made.gates) == 1 else []
    ways = ["add"] + ["replace", "replace", "drop"] * bool(ids) + ["applies_to", "outputs"]
    ways += ["request"] * ("request" in made.feature) + ["add option", "replace option", "drop option"] * bool(options)
    changes: dict[str, Any] = {}

    def change(word: str, **what: Any) -> None:
        changes.setdefault(word, []).append({**what, **BECAUSE})

    for way in draw(st.lists(st.sampled_from(ways), min_size=1, max_size=3, unique=True)):
        if way == "add":
            change("add", requirement=draw(requirements(context, made.words)))
        elif way in ("replace", "drop") and ids:
            name = ids.pop(draw(st.integers(0, len(ids) - 1)))
            new = {**draw(requirements(context, made.words)), "id": name}
            change(way, requirement=new if way == "replace" else name)
        elif way == "applies_to":
            condition = draw(conditions(made.model_words, 1))
            if len(made.gates) > 1:  # the models of other gates must be left to them
                condition = {**gate["applies_to"], "model.n": draw(st.sampled_from(INTEGERS))}
            change("replace", applies_to=condition)
        elif way == "outputs" and "outputs" in made.feature:
            given = draw(given_outputs(made, "gate", "both", *draw(st.sampled_from([[], ["feature"]]))))
            change("replace", outputs=given.get("outputs", {}))
        elif way == "request":
            change("replace", request=draw(st.sampled_from(["honoured", "ignored", "required"])))
        elif way == "add option":
            before = draw(st.sampled_from([{}, *({"before": option} for option in options)]))
            change("add", option=draw(option_bodies(context, made, NEW_OPTION)), **before)
            for name in (f"server.use_{made.name}", f"engine.requested_{made.name}"):
                if name in context.rules["facts"]:
                    context.rules["facts"][name]["values"].append(NEW_OPTION)
        elif way == "replace option" and options:
            option = options.pop(draw(st.integers(0, len(options) - 1)))
            change("replace", option=draw(option_bodies(context, made, option)))
        elif way == "drop option" and len(options) > 1:
            # What is dropped is gone when others are added before it.
            named = {one.get("before") for one in changes.get("add", [])}
            name = draw(st.sampled_from([option for option in options if option not in named]))
            options.remove(name)
            change("drop", option=name)
    return changes


# --------------------------------------------------------------------------------------------------------- records


def given_names(rules: Mapping[str, Any], *, layer: bool) -> Iterator[tuple[str, Spec]]:
    """The facts that a record may give."""
    for name, spec in rules["facts"].items():
        derived_only = "derive" in spec and "from" not in spec
        if not derived_only and name not in ("model.runner", "layer.role") and name.startswith("layer.") == layer:
            yield name, spec


@st.composite
def given_facts(draw: st.DrawFn, rules: Mapping[str, Any], *, layer: bool, complete: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, spec in given_names(rules, layer=layer):
        states = ["known"] * 6 + ["null"] + ([] if complete else ["missing"])
        state = draw(st.sampled_from(states))
        if state == "null":
            facts[name] = None
        elif state == "known" and spec["type"] != "record":
            facts[name] = plain(draw(requested_words(name, spec)))
        elif state == "known":
            facts |= draw(given_records(name, spec, complete=complete))
    return facts


def requested_words(name: str, spec: Spec) -> st.SearchStrategy[Any]:
    """A fact's value; what is asked for is rarely `off`, which would hide everything else."""
    if name.startswith("server.use_"):
        return st.sampled_from([word for word in spec["values"] for _ in range(1 if word == "off" else 3)])
    if name.startswith("server.forbid_"):
        return st.sampled_from([False] * 5 + [True])
    return scalars(spec)


@st.composite
def given_records(draw: st.DrawFn, name: str, spec: Spec, *, complete: bool) -> dict[str, Any]:
    record = {}
    for each, field_spec in spec["fields"].items():
        state = draw(st.sampled_from(["known"] * 6 + ["null"] + ([] if complete else ["missing"])))
        if state != "missing":
            record[each] = draw(st.sampled_from(VALUES[field_spec["type"]][:2])) if state == "known" else None
    if not complete and any(value is not None for value in record.values()) and draw(st.integers(0, 4)) == 0:
        return {f"{name}.{each}": value for each, value in record.items()}
    return {name: record}


@st.composite
def records(draw: st.DrawFn, rules: Mapping[str, Any], *, complete: bool = False) -> dict[str, Any]:
    """One `--facts` line; `complete`: each fact is known or null, and the layers are listed."""
    record: dict[str, Any] = {"runner": draw(st.sampled_from(["target", "target", "draft"]))}
    record["facts"] = draw(given_facts(rules, layer=False, complete=complete))
    if complete or draw(st.integers(0, 6)) > 0:
        layers = []
        for index in range(draw(st.sampled_from([1, 1, 2, 2, 3, 0]))):
            facts = draw(given_facts(rules, layer=True, complete=complete)) | {"layer.index": index + 3}
            if record["runner"] == "draft" or draw(st.booleans()):
                facts["layer.role"] = draw(st.sampled_from(["main", "mtp"]))
            layers.append(facts)
        if layers and draw(st.integers(0, 3)) == 0:
            layers.append({**layers[0], "layer.index": 60})
        record["layers"] = layers
    if draw(st.booleans()):
        groups = ["model", "quant", "server", "engine", "parallel", "platform", "library"]
        record["assume"] = sorted(draw(st.sets(st.sampled_from(groups), max_size=4)))
        left = [name for name, _ in given_names(rules, layer=False) if name not in record["facts"]]
        if left and draw(st.booleans()):
            record["unknown"] = sorted(draw(st.sets(st.sampled_from(left), max_size=3)))
    return record


@st.composite
def hide(draw: st.DrawFn, record: Mapping[str, Any], rules: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record with a random part of it unknown; with `rules`, also of what its `assume` stands for."""
    hidden = copy.deepcopy(dict(record))
    share = draw(st.sampled_from([1, 1, 2, 4, 8]))  # eighths of the facts

    def pick() -> bool:
        return draw(st.integers(0, 7)) < share

    assumed = record.get("assume", [])
    more = [name for name, _ in given_names(rules, layer=False) if name.split(".")[0] in assumed] if rules else []
    for name in dict.fromkeys([*hidden["facts"], *more]):
        if pick():
            hidden["facts"].pop(name, None)
            if name.split(".")[0] in assumed:
                hidden["unknown"] = sorted({*hidden.get("unknown", []), name})
    for layer in hidden.get("layers") or []:
        for name in [name for name in layer if name not in ("layer.index", "layer.role")]:
            if pick():
                del layer[name]
            elif isinstance(layer[name], Mapping):
                layer[name] = {each: value for each, value in layer[name].items() if not pick()}
    if "layers" in hidden and draw(st.integers(0, 9)) == 0:
        del hidden["layers"]
    return hidden
