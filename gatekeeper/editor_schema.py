"""JSON Schemas for editors: the shipped ones with what one rule set declares written into them.

Facts become properties with their docs, values are suggested, and names of every kind are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeAlias

from gatekeeper.conditions import comparable
from gatekeeper.data import data_folder
from gatekeeper.diagnostics import diagnostics
from gatekeeper.fact_spec import FAMILY_FACT, FEATURE_GROUP, FactSpec, a_type
from gatekeeper.markdown import code, prose
from gatekeeper.operators import OPERATORS
from gatekeeper.rules import RuleSet
from gatekeeper.source import load_schema
from gatekeeper.values import Missing, plain, shown

Schema: TypeAlias = dict[str, Any]

_JSON_TYPES: Mapping[str, tuple[str, ...]] = {
    "boolean": ("boolean",),
    "integer": ("integer",),
    "number": ("number",),
    "string": ("string",),
    "enum": ("string",),
    # Their text counts, be it `2.10` or `"2.10"`.
    "version": ("string", "number"),
    "arch": ("string", "number"),
}
_OUTCOMES = ("failed", "passed", "unknown", "not_applicable", "waived")


def editor_schemas(rules: RuleSet) -> dict[str, Schema]:
    """Return the schema of every kind of file, by kind, with what `rules` declare written into it."""
    files = data_folder("schema").glob("*.schema.json")
    schemas = {kind: deepcopy(load_schema(kind)) for kind in sorted(f.name.removesuffix(".schema.json") for f in files)}
    _Enrichment(rules, schemas).enrich()
    comment = f"Written by `gatekeeper schema` for {rules.name} {rules.version}; after a change there, write it again."
    return {kind: {"$comment": comment, **schema} for kind, schema in schemas.items()}


@dataclass(frozen=True, slots=True)
class _Values:
    """Scalars as JSON Schema knows them."""

    types: tuple[str, ...]
    listed: tuple[Any, ...] = ()
    closed: bool = False
    """Whether nothing but what is listed will do; else it is suggested."""

    def schema(self, shapes: Mapping[str, Schema] | None = None) -> Schema:
        """Return the schema of one of them, or of something of another shape, by its JSON type.

        A shape stands under `if`, so that an editor's complaint is about what the author wrote; and none at the top,
        so that completing the key does not begin a list or a mapping.
        """
        shapes = shapes or {}
        if self.closed and not shapes:
            return {"enum": [*self.listed]}
        schema: Schema = {"type": [*self.types, *shapes]}
        if self.closed:
            schema["oneOf"] = [{"enum": [*self.listed]}, {"type": [*shapes]}]
        elif self.listed:
            schema["defaultSnippets"] = [{"label": shown(value), "body": value} for value in self.listed]
        if shapes:
            schema["allOf"] = [{"if": {"type": kind}, "then": shape} for kind, shape in shapes.items()]
        return schema


class _Enrichment:
    """Writes what a rule set declares into the schemas of its files."""

    def __init__(self, rules: RuleSet, schemas: dict[str, Schema]) -> None:
        self.rules = rules
        self.facts = rules.catalogue
        self.schemas = schemas

    def enrich(self) -> None:
        """Change the schemas in place."""
        self._conditions()
        self._names()
        self._presets()
        self._families()
        self._tables()
        self._gates()

    def _conditions(self) -> None:
        defs = self.schemas["common"]["$defs"]
        words = defs["test"]["properties"]
        for kind in (*_JSON_TYPES, "list", "record"):
            alike = [spec for spec in self.facts.values() if comparable(kind, spec.type)]
            defs[f"{kind}_fact"] = _one_of({spec.name: self._about(spec) for spec in alike})
        defs["fact_name"] |= _items({name: self._about(spec) for name, spec in sorted(self.facts.items())})
        del defs["condition"]["patternProperties"]
        for name, spec in sorted(self.facts.items()):
            test = self._test(spec, words)
            if not self._listed(spec):  # then it is that of every fact of the type
                kind = f"{spec.items}_list" if spec.type == "list" else spec.type
                defs[f"{kind}_test"], test = test, {"$ref": f"#/$defs/{kind}_test"}
            defs["condition"]["properties"][name] = {**self._shown(spec), **test}

    def _test(self, spec: FactSpec, words: Mapping[str, Schema]) -> Schema:
        """Return the schema of what may stand behind a fact in a condition."""
        operators = {
            word: {**self._operand(spec, operator.operand, words[word]), "description": words[word]["description"]}
            for word, operator in OPERATORS.items()
            if spec.type in operator.left
        }
        operators["absent"] = words["absent"]
        if "eq" in operators:
            operators["fact"] = {"$ref": f"#/$defs/{spec.type}_fact", "description": words["fact"]["description"]}
        mapping: Schema = {"properties": operators, "additionalProperties": False, "minProperties": 1}
        if spec.type not in _JSON_TYPES:  # no shorthand
            return {"type": "object", **mapping}
        values = self._values(spec)
        return values.schema({"array": {"items": values.schema(), "minItems": 1}, "object": mapping})

    def _operand(self, spec: FactSpec, kind: str, shipped: Schema) -> Schema:
        """Return the schema of what may stand behind an operator of a fact."""
        if kind == "same" and spec.type == "record":
            return {"type": "object", **_reference("record")}
        if kind == "same":
            return self._values(spec).schema({"object": _reference(spec.type)})
        if kind == "item":
            return _Values(_JSON_TYPES[spec.items]).schema({"object": _reference(spec.items)})
        if kind == "list":
            items = {"items": self._values(spec).schema(), "minItems": 1}
            return _Values(()).schema({"array": items, "object": _reference("list")})
        return shipped

    def _values(self, spec: FactSpec) -> _Values:
        """Return what a scalar fact can be."""
        listed, types = self._listed(spec), _JSON_TYPES[spec.type]
        if any(isinstance(word, bool) for word in listed):
            types = (*types, "boolean")
        return _Values(types, listed, closed=spec.type == "enum")

    def _listed(self, spec: FactSpec) -> tuple[Any, ...]:
        """Return all that an enum has, else what is known or can be chosen."""
        if spec.type == "enum":
            return (*(word == "true" for word in spec.values if word in ("true", "false")), *spec.values)
        known = tuple(self.rules.families) if spec.name == FAMILY_FACT else spec.known_values
        return () if spec.type == "boolean" else tuple(dict.fromkeys((*known, *map(plain, spec.controllable))))

    def _given(self, names: str = "", *, null: bool = False) -> Schema:
        """Return the schema of a mapping from facts (those that match `names`) to their values."""
        found = {
            name: {**self._shown(spec), **self._value(spec, null=null)}
            for name, spec in sorted(self.facts.items())
            if re.search(names, name) and not spec.only_derived and spec.group != FEATURE_GROUP
        }
        return {"properties": found, "additionalProperties": False}

    def _value(self, spec: FactSpec, *, null: bool) -> Schema:
        """Return the schema of a fact's value as a table or a preset gives it; null is absent."""
        absent = ("null",) if null else ()
        if spec.type == "record":
            fields = {
                key: {**self._shown(field), **self._value(field, null=null)} for key, field in spec.fields.items()
            }
            return {"type": ["object", *absent], "properties": fields, "additionalProperties": False}
        if spec.type == "list":
            return {"type": ["array", *absent], "items": {"type": [*_JSON_TYPES[spec.items]]}}
        values = self._values(spec)
        listed = (*values.listed, None) if null and values.closed else values.listed
        least = {} if spec.minimum is None else {"minimum": spec.minimum}
        return {**_Values((*values.types, *absent), listed, values.closed).schema(), **least}

    def _names(self) -> None:
        defs = self.schemas["common"]["$defs"]
        named = {name: prose(one.doc) for name, one in self.rules.conditions.items()}
        use = defs["condition"]["properties"]["use"]
        several = {"items": _items(named), "minItems": use.pop("minItems")}
        del use["items"]
        use |= {"title": "use", **_one_of(named, "array"), "allOf": [{"if": {"type": "array"}, "then": several}]}
        shared = {name: prose(one.reason) for name, one in self.rules.requirements.items()}
        defs["requirement"]["properties"]["use"] |= _one_of(shared)
        lints = {one.code: prose(one.means) for one in diagnostics().values() if one.severity == "warning"}
        defs["allow"]["items"]["properties"]["code"] |= _one_of(lints)
        groups = sorted({spec.group for spec in self.facts.values()})
        defs["groups"]["items"] |= _items({group: f"The facts `{group}.*`." for group in groups})
        defs["facts"] |= self._given(null=True)
        del defs["facts"]["propertyNames"]

    def _presets(self) -> None:
        for kind in ("platforms", "layouts"):
            sets = self.schemas[kind]["properties"][kind]["additionalProperties"]["properties"]["sets"]
            sets |= self._given(sets.pop("propertyNames")["pattern"])

    def _families(self) -> None:
        own = self.schemas["family"]["properties"]
        own["facts"] |= self._given(own["facts"].pop("propertyNames")["pattern"])
        pattern, paths = own["from"].pop("propertyNames")["pattern"], own["from"]["additionalProperties"]
        names = [name for name in sorted(self.facts) if re.search(pattern, name)]
        own["from"] |= {
            "properties": {name: {**paths, **self._shown(self.facts[name])} for name in names},
            "additionalProperties": False,
        }
        del own["gateless"]["propertyNames"]
        reason = own["gateless"]["additionalProperties"]
        own["gateless"] |= {
            "properties": {
                name: {**reason, "description": f"{feature.summary} {reason['description']}"}
                for name, feature in self.rules.features.items()
            },
            "additionalProperties": False,
        }

    def _tables(self) -> None:
        table = self.schemas["table"]["properties"]
        table["table"] |= self._features()
        for place in (table["base"], table["rows"]["items"]):
            for kind, presets in (("platform", self.rules.platforms), ("layout", self.rules.layouts)):
                docs = {
                    name: code(", ".join(f"{f}={shown(v)}" for f, v in sets.items())) for name, sets in presets.items()
                }
                place["properties"][kind] |= _one_of(docs)
        expect = table["rows"]["items"]["properties"]["expect"]["properties"]
        for state in _OUTCOMES:
            expect[state]["items"]["defaultSnippets"] = _snippets(self._requirements())

    def _features(self) -> Schema:
        return _one_of({name: prose(feature.summary) for name, feature in self.rules.features.items()})

    def _requirements(self) -> Mapping[str, str]:
        """Return the requirements of all gates with their reasons, by id."""
        gates = [gate for gates in self.rules.gates.values() for gate in gates]
        return {one.id: prose(one.reason) for gate in gates for one in gate.demands}

    def _gates(self) -> None:
        asked = [spec for name, spec in self.facts.items() if not self.facts.is_layer_fact(name)]
        request = self.schemas["feature"]["properties"]["request"]
        del request["pattern"]
        request |= _one_of(
            {spec.name: self._about(spec) for spec in asked if spec.type in ("string", "enum")}, "object"
        )
        for part in request["properties"].values():
            part["$ref"] = "common.schema.json#/$defs/boolean_fact"
        self.schemas["gate"]["properties"]["feature"] |= self._features()
        self._amendments()

    def _amendments(self) -> None:
        amendment = self.schemas["amendment"]
        own = amendment["properties"]
        gates = {
            f"{name}/{gate.name}": prose(self.rules.features[name].summary)
            for name, gates in self.rules.gates.items()
            for gate in gates
        }
        shared = {name: prose(one.reason) for name, one in self.rules.requirements.items()}
        own["amends"] |= _one_of({**gates, **shared})
        # What an overlay drops is not in its rule set, so these are suggestions.
        names = self._requirements()
        own["replace"]["items"]["properties"]["requirement"]["properties"]["id"]["defaultSnippets"] = _snippets(names)
        own["drop"]["items"]["properties"]["requirement"]["defaultSnippets"] = _snippets(names)
        # Editors map folders to schemas, and both kinds of file are in gates/.
        gate = self.schemas["gate"]
        self.schemas["gate"] = {
            "$schema": gate.pop("$schema"),
            "if": {"required": ["amends"]},
            "then": {"$ref": "amendment.schema.json"},
            "else": gate,
        }

    def _shown(self, spec: FactSpec) -> Schema:
        """Return what an editor shows of a fact."""
        return {"title": spec.name, "description": spec.doc, "markdownDescription": self._about(spec)}

    def _about(self, spec: FactSpec) -> str:
        """Return the documentation of a fact in Markdown."""
        kind = f"{a_type(spec.type)} of {spec.items}s" if spec.type == "list" else a_type(spec.type)
        lines = [prose(spec.doc), kind[0].upper() + kind[1:]]
        if spec.minimum is not None:
            lines[-1] += f", {shown(spec.minimum)} or more"
        if spec.default_derive is not None:
            lines[-1] += f"; where it is absent, {code(spec.default_derive.text)}"
        elif not isinstance(spec.default, Missing):
            lines[-1] += f"; where it is absent, {code(shown(spec.default))}"
        lines[-1] += "."
        if spec.derive is not None:
            lines.append(f"Derived: {code(spec.derive.text)}.")
        if spec.from_:
            lines.append(f"In config.json: {_codes(spec.from_)}.")
        if spec.given_by:
            lines.append(f"Given by {', '.join(spec.given_by)}.")
        if spec.fields:
            lines.append(f"Fields: {_codes(spec.fields)}.")
        if spec.values or spec.known_values:
            lines.append(f"{'Values' if spec.values else 'Known values'}: {_codes(spec.values or spec.known_values)}.")
        if spec.controllable:
            lines.append(f"An operator can set it to {_codes(map(shown, spec.controllable))}.")
        lines.append(f"Known from the stage {self.facts.stage_of(spec.name)} on.")
        return "\n\n".join(lines)


def _reference(kind: str) -> Schema:
    fact = {"$ref": f"#/$defs/{kind}_fact", "description": "Another fact in the place of a constant."}
    return {"properties": {"fact": fact}, "required": ["fact"], "additionalProperties": False}


def _one_of(docs: Mapping[str, str], *others: str) -> Schema:
    """Return the schema of a name, each with its own docs in Markdown, or of something of another JSON type."""
    # An editor tells alternatives apart by their titles.
    names = [{"const": name, "title": name, "markdownDescription": text} for name, text in docs.items()]
    return {"type": ["string", *others], "anyOf": [*names, *({"type": other} for other in others)] or [False]}


def _items(docs: Mapping[str, str]) -> Schema:
    """Return the schema of names in a list; there alternatives would be offered as lists of their own."""
    return {"enum": [*docs], "markdownEnumDescriptions": [*docs.values()]} if docs else {"not": {}}


def _snippets(docs: Mapping[str, str]) -> list[Schema]:
    """Return suggestions that forbid nothing else."""
    return [{"label": name, "body": name, "markdownDescription": text} for name, text in docs.items()]


def _codes(words: Iterable[str]) -> str:
    return ", ".join(map(code, words))
