"""Documents to features, gates and requirements: ids, references, types and templates checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any, TypeVar

from gatekeeper.catalogue import FactSpec, a_type, parse_catalogue
from gatekeeper.conditions import (
    ALWAYS,
    All,
    Any_,
    Condition,
    ConditionParser,
    FactRef,
    Test,
    comparable,
    facts_of,
    passes_if_absent,
)
from gatekeeper.disjoint import disjoint
from gatekeeper.errors import Fault, RuleError, Where
from gatekeeper.families import Family
from gatekeeper.formats import Format
from gatekeeper.rules import Feature, Gate, Option, Output, Request, Requirement, RuleSet
from gatekeeper.source import Document, WrittenFloat, nearest
from gatekeeper.values import ABSENT, Missing, Value

T = TypeVar("T")

LANGUAGE = 1
MANIFEST = "ruleset.yaml"
RESERVED_OPTIONS = frozenset({"auto", "on", "off"})


class RuleParser:
    """Builds one rule set from its documents by kind; every fault goes to `faults`."""

    def __init__(
        self, kinds: dict[str, list[Document]], faults: list[Fault], partial: frozenset[str] = frozenset()
    ) -> None:
        self.kinds = kinds
        self.faults = faults
        self.partial = partial
        """Files of which entries are left out."""
        self.catalogue = parse_catalogue(kinds["facts"], faults)
        self.conditions = ConditionParser(self.catalogue, self._named("conditions"), faults)
        self.shared: dict[str, Requirement] = {}
        self._absence_meant: set[str] = set()  # shared requirements that say what absent means
        self._outputs: dict[tuple[str, str], FactSpec] = {}
        self._unclear: set[int] = set()  # gates whose `applies_to` is at fault

    def build(self) -> RuleSet | None:
        for document in self.kinds["conditions"]:
            for name in document.data["conditions"]:
                self.conditions._use(name, document.where(("conditions", name)))
        for name, (document, raw) in self._named("requirements").items():
            self.shared[name] = self._requirement(document, {**raw, "id": name}, ("requirements", name), ALWAYS)
            if "absent_passes" in raw:
                self._absence_meant.add(name)
        features: dict[str, Feature] = {}
        gates: list[tuple[Document, Gate]] = []
        for document in self.kinds["feature"]:
            feature = self._feature(document)
            if feature.name in features:
                message = f"feature `{feature.name}` is declared in {features[feature.name].where} too"
                self._fault("duplicate-feature", message, document, ("feature",))
            features[feature.name] = feature
        for document in [*self.kinds["feature"], *self.kinds["gate"]]:
            name = document.data["feature"]
            if name not in features:
                self._fault(
                    "unknown-feature", f"unknown feature `{name}`{nearest(name, features)}", document, ("feature",)
                )
            elif document in self.kinds["gate"] or document.data.keys() & {"applies_to", "requires", "options"}:
                gates.append((document, self._gate(document, features[name])))
        self._check_gates(gates)
        manifest = self._manifest()
        families = self._parsed("family", Family.parse)
        formats = self._parsed("format", Format.parse)
        platforms, layouts = self._presets("platforms"), self._presets("layouts")
        if self.faults or manifest is None:
            return None
        return RuleSet(
            name=manifest["name"],
            version=_text(manifest["version"]),
            digest=content_digest(self.kinds),
            catalogue=self.catalogue,
            features=dict(sorted(features.items())),
            gates={name: tuple(gate for _, gate in gates if gate.feature == name) for name in sorted(features)},
            families=families,
            formats=formats,
            platforms=platforms,
            layouts=layouts,
        )

    def _named(self, kind: str) -> dict[str, tuple[Document, Any]]:
        """Return the entries of conditions.yaml or requirements.yaml; those of a base can't be declared again."""
        found: dict[str, tuple[Document, Any]] = {}
        for document in self.kinds[kind]:
            for name, raw in document.data[kind].items():
                if name in found:
                    first = found[name][0].where((kind, name))
                    message = f"{kind[:-1]} `{name}` is declared in {first} too; give this one another name"
                    self._fault(f"duplicate-{kind[:-1]}", message, document, (kind, name))
                found.setdefault(name, (document, raw))
        return found

    def _parsed(self, kind: str, parse: Callable[[Document], T]) -> dict[str, T]:
        found: dict[str, T] = {}
        for document in self.kinds[kind]:
            try:
                one = parse(document)
            except RuleError as error:
                self.faults += error.faults
                continue
            name = document.data[kind]
            if name in found:
                self._fault(f"duplicate-{kind}", f"{kind} `{name}` is declared twice", document, (kind,))
            found[name] = one
        return found

    def _manifest(self) -> dict[str, Any] | None:
        if not self.kinds["ruleset"]:
            if not any(f.where.file.endswith(MANIFEST) for f in self.faults):
                self.faults.append(Fault("no-manifest", f"expected a file `{MANIFEST}`", Where(MANIFEST)))
            return None
        document = self.kinds["ruleset"][0]
        data: dict[str, Any] = document.data
        if data["language"] != LANGUAGE:
            message = f"language {data['language']} is not known to this release, which reads language {LANGUAGE}"
            newer = data["language"] > LANGUAGE
            hint = "; install a later release of model-gatekeeper" if newer else "; write `language: 1`"
            self._fault("unknown-language", message + hint, document, ("language",))
        return data

    def _presets(self, kind: str) -> dict[str, dict[str, Value]]:
        presets = {}
        for document in self.kinds[kind]:
            for name, raw in document.data[kind].items():
                facts = raw["sets"]
                for fact, value in facts.items():
                    where = document.where((kind, name, "sets", fact))
                    spec = self.conditions.fact(fact, where)
                    if spec is not None and value is not None:
                        try:
                            spec.coerce(value)
                        except ValueError as error:
                            self.faults.append(Fault("wrong-value", f"`{fact}`: {error}", where))
                presets[name] = facts
        return presets

    def _fault(self, code: str, message: str, document: Document, path: Iterable[str | int]) -> None:
        self.faults.append(Fault(code, message, document.where(path)))

    def _feature(self, document: Document) -> Feature:
        data = document.data
        where = document.where(("feature",))
        outputs = {}
        for name, raw in data.get("outputs", {}).items():
            at = document.where(("outputs", name))
            spec = _output_spec(name, raw, at)
            value = ABSENT if "value" not in raw else self._output_value(spec, raw["value"], at)
            otherwise = ABSENT if raw["else"] is None else self._coerced(spec, raw["else"], at)
            self._outputs[data["feature"], name] = spec
            if isinstance(value, FactRef) and data.get("scope") != "layer":
                self._check_output_scope(value, at)
            outputs[name] = Output(name=name, type=raw["type"], value=value, otherwise=otherwise)
        return Feature(
            name=data["feature"],
            summary=data["summary"],
            scope=data.get("scope", "model"),
            request=self._request(document),
            outputs=outputs,
            where=where,
        )

    def _request(self, document: Document) -> Request:
        raw = document.data.get("request", {})
        request = Request(fact=raw) if isinstance(raw, str) else Request(**raw)
        for name in request.names:
            where = document.where(("request",))
            spec = self.conditions.fact(name, where)
            if spec is None:
                continue
            wanted = ("string", "enum") if request.fact else ("boolean",)
            if spec.type not in wanted:
                kind = "one fact" if request.fact else "flags"
                message = f"`{name}` is {a_type(spec.type)}; a request by {kind} needs a {wanted[0]}"
                self.faults.append(Fault("wrong-type", message, where))
            if self.catalogue.is_layer_fact(name):
                self.faults.append(Fault("layer-fact", f"`{name}` differs from layer to layer; a request can't", where))
        return request

    def _output_value(self, spec: FactSpec, raw: Any, where: Where) -> Value | FactRef | Missing:
        if isinstance(raw, dict):
            other = self.conditions.fact(raw["fact"], where)
            if other is not None and not comparable(other.type, spec.type):
                message = f"output `{spec.name}` is {a_type(spec.type)}, `{raw['fact']}` {a_type(other.type)}"
                self.faults.append(Fault("wrong-type", message, where))
            return FactRef(raw["fact"])
        return self._coerced(spec, raw, where)

    def _coerced(self, spec: FactSpec, raw: Any, where: Where) -> Value | Missing:
        try:
            return spec.coerce(raw)
        except ValueError as error:
            self.faults.append(Fault("wrong-value", f"output `{spec.name}`: {error}", where))
            return ABSENT

    def _gate(self, document: Document, feature: Feature) -> Gate:
        data = document.data
        scopes: Condition = ALWAYS
        before = len(self.faults)
        if "applies_to" in data:
            scopes = self.conditions.parse(document, data["applies_to"], ("applies_to",))
            for name in sorted(facts_of(scopes)):
                if name in self.catalogue and self.catalogue.is_layer_fact(name):
                    message = f"`applies_to` can't read `{name}`, which differs from layer to layer"
                    self._fault("layer-fact", message, document, ("applies_to",))
        if len(self.faults) > before:
            self._unclear.add(id(document))
        declared = document in self.kinds["feature"]
        requires = self._requirements(document, data.get("requires", []), ("requires",), feature)
        options = [
            self._option(document, raw, ("options", index), feature)
            for index, raw in enumerate(data.get("options", []))
            if raw is not None
        ]
        for own in [[], *([*option.requires] for option in options)]:
            self._check_ids([*requires, *own])
        for name in {o.name for o in options if sum(o.name == p.name for p in options) > 1}:
            self._fault("duplicate-id", f"option `{name}` stands twice", document, ("options",))
        outputs = {} if declared else self._gate_outputs(document, data.get("outputs", {}), ("outputs",), feature)
        for output in feature.outputs.values():
            given = output.value is not ABSENT or output.name in outputs
            missing = [o.name for o in options if output.name not in o.outputs]
            if not given and (missing or not options) and document.file not in self.partial:
                by = f" with option `{missing[0]}`" if missing else ""
                self._fault("no-output", f"nothing gives output `{output.name}`{by}", document, ())
        return Gate(
            feature=feature.name,
            name=data.get("gate", feature.name),
            applies_to=scopes,
            request="honoured" if declared else data.get("request", "honoured"),
            on_failure=data.get("on_failure", "off"),
            requires=tuple(requires),
            options=tuple(options),
            outputs=outputs,
            refs=tuple(data.get("refs", ())),
            where=document.where(("gate",) if "gate" in data else ("feature",)),
        )

    def _option(self, document: Document, raw: dict[str, Any], path: tuple[str | int, ...], feature: Feature) -> Option:
        if raw["option"] in RESERVED_OPTIONS:
            self._fault("wrong-value", f"an option can't be called `{raw['option']}`", document, (*path, "option"))
        requires = self._requirements(document, raw.get("requires", []), (*path, "requires"), feature)
        for requirement in requires:
            if requirement.on_failure == "error":
                message = "an option's requirement has no `on_failure`; the gate has one for when no option is left"
                self.faults.append(Fault("wrong-value", message, requirement.where))
        return Option(
            name=raw["option"],
            requires=tuple(requires),
            outputs=self._gate_outputs(document, raw.get("outputs", {}), (*path, "outputs"), feature),
            degraded=raw.get("degraded", ""),
            where=document.where((*path, "option")),
        )

    def _gate_outputs(
        self, document: Document, raw: dict[str, Any], path: tuple[str | int, ...], feature: Feature
    ) -> dict[str, Value | FactRef]:
        result: dict[str, Value | FactRef] = {}
        for name, value in raw.items():
            where = document.where((*path, name))
            if name not in feature.outputs:
                message = f"feature `{feature.name}` has no output `{name}`{nearest(name, feature.outputs)}"
                self.faults.append(Fault("unknown-output", message, where))
                continue
            given = self._output_value(self._outputs[feature.name, name], value, where)
            if isinstance(given, FactRef) and feature.scope == "model":
                self._check_output_scope(given, where)
            if not isinstance(given, Missing):
                result[name] = given
        return result

    def _requirements(
        self,
        document: Document,
        raw: list[Any],
        path: tuple[str | int, ...],
        feature: Feature,
        outer: Condition = ALWAYS,
    ) -> list[Requirement]:
        found: list[Requirement] = []
        for index, one in enumerate(raw):
            if one is None:  # left out, for it is at fault
                continue
            at = (*path, index)
            when = outer
            if "when" in one:
                when = _both(outer, self.conditions.parse(document, one["when"], (*at, "when")))
            if "requires" in one:
                found += self._requirements(document, one["requires"], (*at, "requires"), feature, when)
            elif "use" in one:
                found += self._taken(document, one, at, outer, when)
            else:
                found.append(self._requirement(document, one, at, outer))
        if feature.scope == "model":
            for requirement in found:
                for name in sorted(facts_of(All((requirement.when, requirement.that)))):
                    self._check_model_scope(name, requirement)
        return found

    def _check_output_scope(self, value: FactRef, where: Where) -> None:
        if value.name in self.catalogue and self.catalogue.is_layer_fact(value.name):
            message = (
                f"`{value.name}` differs from layer to layer; give a fact of the whole model, or use `scope: layer`"
            )
            self.faults.append(Fault("layer-fact", message, where))

    def _check_model_scope(self, name: str, requirement: Requirement) -> None:
        in_layers = any(
            isinstance(part, Test) and name in (part.fact, *part.refers)
            for part in _outside_layers(All((requirement.when, requirement.that)))
        )
        if in_layers and name in self.catalogue and self.catalogue.is_layer_fact(name):
            message = (
                f"`{name}` differs from layer to layer; test it under every_layer or any_layer, or use `scope: layer`"
            )
            self.faults.append(Fault("layer-fact", message, requirement.where))

    def _taken(
        self, document: Document, raw: dict[str, Any], path: tuple[str | int, ...], outer: Condition, when: Condition
    ) -> list[Requirement]:
        name, where = raw["use"], document.where((*path, "use"))
        if name not in self.shared:
            message = f"unknown requirement `{name}`{nearest(name, self.shared)}"
            self.faults.append(Fault("unknown-requirement", message, where))
            return []
        shared = self.shared[name]
        if raw.get("protects") == "correctness" and name not in self._absence_meant:
            self._check_absence(name, shared.that, where)
        return [
            replace(
                shared,
                # An own `when` takes the place of the shared one.
                when=when if "when" in raw else _both(outer, shared.when),
                protects=raw.get("protects", shared.protects),
                on_failure=raw.get("on_failure", shared.on_failure),
                where=where,
            )
        ]

    def _requirement(
        self, document: Document, raw: dict[str, Any], path: tuple[str | int, ...], outer: Condition
    ) -> Requirement:
        where = document.where(path)
        when = self.conditions.parse(document, raw["when"], (*path, "when")) if "when" in raw else ALWAYS
        that = self.conditions.parse(document, raw["that"], (*path, "that"))
        self.conditions.template(raw["reason"], document.where((*path, "reason")), frozenset({"difference"}))
        if raw["protects"] == "correctness" and "absent_passes" not in raw:
            self._check_absence(raw["id"], that)
        return Requirement(
            id=raw["id"],
            protects=raw["protects"],
            when=_both(outer, when),
            that=that,
            reason=raw["reason"],
            on_failure=raw.get("on_failure", "off"),
            refs=tuple(raw.get("refs", ())),
            where=where,
        )

    def _check_absence(self, name: str, that: Condition, where: Where | None = None) -> None:
        known = [fact for fact in facts_of(that) if fact in self.catalogue]
        test = passes_if_absent(that, self.catalogue) if len(known) == len(facts_of(that)) else None
        if test is not None:
            message = (
                f"`{name}` protects correctness, and an absent `{test.fact}` would pass it; "
                "write `absent: false` beside the test, or `absent_passes: because …`"
            )
            self.faults.append(Fault("absent-passes", message, where or test.where))

    def _check_ids(self, requires: list[Requirement]) -> None:
        seen: dict[str, Requirement] = {}
        for requirement in requires:
            if requirement.id in seen:
                message = (
                    f"requirement `{requirement.id}` stands twice in this gate, first at {seen[requirement.id].where}"
                )
                self.faults.append(Fault("duplicate-id", message, requirement.where))
            seen[requirement.id] = requirement

    def _check_gates(self, gates: list[tuple[Document, Gate]]) -> None:
        for (first, one), (document, other) in combinations(gates, 2):
            if one.feature != other.feature:
                continue
            for unnamed in (each for each in (first, document) if "gate" not in each.data):
                if unnamed in self.kinds["gate"]:
                    message = f"`{other.feature}` has several gates, so each needs a name; add `gate:`"
                    self._fault("missing-key", message, unnamed, ("feature",))
            if one.name == other.name:
                message = f"gate `{other.feature}/{other.name}` stands in {one.where} too"
                self._fault("duplicate-gate", message, document, ("gate",))
            elif not {id(first), id(document)} & self._unclear and not disjoint(one.applies_to, other.applies_to):
                message = (
                    f"`{other.name}` and `{one.name}` ({one.where}) could both apply; "
                    "test one fact against different constants in their `applies_to`"
                )
                self._fault("overlapping-gates", message, document, ("applies_to",))


def _outside_layers(condition: Condition) -> Iterable[Condition]:
    if isinstance(condition, All | Any_):
        for part in condition.parts:
            yield from _outside_layers(part)
    elif isinstance(condition, Test):
        yield condition
    elif hasattr(condition, "part"):
        yield from _outside_layers(condition.part)


def _both(one: Condition, other: Condition) -> Condition:
    if one is ALWAYS or other is ALWAYS:
        return other if one is ALWAYS else one
    return All((one, other))


def _output_spec(name: str, raw: dict[str, Any], where: Where) -> FactSpec:
    values, items = tuple(raw.get("values", ())), raw.get("items", "string")
    return FactSpec(name=name, type=raw["type"], doc="", where=where, values=values, items=items)


def _text(value: Any) -> str:
    return str(getattr(value, "text", value))


def content_digest(kinds: Mapping[str, list[Document]]) -> str:
    """Return the SHA-256 of what the documents say; how they are laid out or commented does not count."""
    content = [[kind, document.data] for kind, documents in sorted(kinds.items()) for document in documents]
    texts = sorted(json.dumps(_canonical(one), sort_keys=True, ensure_ascii=False) for one in content)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """Return content as the digest sees it: a number that a version may be read from counts as written."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return {"number": value.text} if isinstance(value, WrittenFloat) else value
