"""Documents to a RuleSet: features, conditions, presets and what holds between gates; gates are parse_gates.py's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeVar

from gatekeeper.amendments import GateAmender, amend_shared
from gatekeeper.catalogue import STAGES
from gatekeeper.conditions import All, ConditionParser, FactRef, facts_of
from gatekeeper.content import content_digest
from gatekeeper.disjoint import overlapping
from gatekeeper.errors import Fault, RuleError, Where
from gatekeeper.fact_spec import FEATURE_GROUP, a_type
from gatekeeper.families import Family
from gatekeeper.feature_facts import declared_facts, output_spec
from gatekeeper.formats import Format
from gatekeeper.parse_catalogue import parse_catalogue
from gatekeeper.parse_gates import GateParser
from gatekeeper.rules import Feature, Gate, NamedCondition, Output, Request, Requirement, RuleSet
from gatekeeper.source import Document, nearest
from gatekeeper.values import ABSENT, Value
from gatekeeper.waivers import read_waivers

T = TypeVar("T")

LANGUAGE = 1
MANIFEST = "ruleset.yaml"
_DECIDES = frozenset({"applies_to", "requires", "options"})


class RuleParser:
    """Builds one rule set from its documents by kind; every fault goes to `faults`."""

    def __init__(
        self, kinds: dict[str, list[Document]], faults: list[Fault], partial: frozenset[str] = frozenset()
    ) -> None:
        self.kinds = kinds
        self.faults = faults
        """What is wrong; `partial` are files of which entries are left out for that."""
        decided = declared_facts(kinds["feature"], kinds["gate"])
        self.catalogue = parse_catalogue(kinds["facts"], faults, decided)
        self.named = self._named("conditions")
        self.conditions = ConditionParser(self.catalogue, self.named, faults)
        self.gates = GateParser(self.conditions, faults, partial)

    def build(self, own: frozenset[str]) -> RuleSet | None:
        """Return the rule set, or None where there are faults; `own` are its files without those of a base."""
        conditions = self._conditions()
        self._shared_requirements()
        features = self._features()
        gates = self._gates(features)
        order = self._order(features, gates)
        self._check_gates(features, gates)
        manifest = self._manifest()
        families = self._parsed("family", Family.parse)
        formats = self._parsed("format", Format.parse)
        platforms, layouts = self._presets("platforms"), self._presets("layouts")
        if self.faults or manifest is None:
            return None
        taken = {f"condition {name}" for name in self.conditions.used}
        overlays = [document.data for document in self.kinds["overlay"]]
        return RuleSet(
            name="+".join([manifest["name"], *(one["name"] for one in overlays)]),
            version="+".join([_text(manifest["version"]), *(_text(one["version"]) for one in overlays)]),
            digest=content_digest(self.kinds),
            catalogue=self.catalogue,
            features=dict(sorted(features.items())),
            gates={name: tuple(found) for name, found in sorted(_by_feature(features, gates).items())},
            order=order,
            conditions=conditions,
            requirements=dict(self.gates.shared),
            used=frozenset(taken | {f"requirement {name}" for name in self.gates.taken}),
            files=own,
            families=families,
            formats=formats,
            platforms=platforms,
            layouts=layouts,
        )

    def _conditions(self) -> dict[str, NamedCondition]:
        found = {}
        for name, (document, raw) in self.named.items():
            where = document.where(("conditions", name))
            that, allow = self.conditions.named(name, where), read_waivers(document, raw, ("conditions", name))
            found[name] = NamedCondition(name=name, doc=raw["doc"], that=that, allow=allow, where=where)
        return found

    def _shared_requirements(self) -> None:
        for name, (document, raw) in self._named("requirements").items():
            at = ("requirements", name)
            self.gates.shared[name] = self.gates.shared_requirement(document, name, raw, at)
        for document in self.kinds["amendment"]:
            if "/" not in document.data["amends"]:
                amend_shared(self.gates, document)

    def _features(self) -> dict[str, Feature]:
        features: dict[str, Feature] = {}
        for document in self.kinds["feature"]:
            feature = self._feature(document)
            if feature.name in features:
                message = f"feature `{feature.name}` is declared in {features[feature.name].where} too"
                self._fault("duplicate-feature", message, document, ("feature",))
            features[feature.name] = feature
        return features

    def _gates(self, features: dict[str, Feature]) -> list[Gate]:
        found: list[Gate] = []
        named: dict[tuple[str, str], int] = {}
        unnamed: dict[str, list[Document]] = {}
        declared = [document for document in self.kinds["feature"] if document.data.keys() & _DECIDES]
        for document in [*declared, *self.kinds["gate"]]:
            name = document.data["feature"]
            if name not in features:
                hint = nearest(name, features) or "; declare it in a file of features/"
                message = f"unknown feature `{name}`{hint}"
                self._fault("unknown-feature", message, document, ("feature",))
                continue
            in_gates = "summary" not in document.data
            gate = self.gates.gate(document, features[name], declared=not in_gates)
            if in_gates and "gate" not in document.data:
                unnamed.setdefault(name, []).append(document)
            key = (gate.feature, gate.name)
            if key in named:
                message = f"gate `{name}/{gate.name}` stands in {found[named[key]].where} too"
                self._fault("duplicate-gate", message, document, ("gate",))
            named.setdefault(key, len(found))
            found.append(gate)
        for name, documents in unnamed.items():
            if sum(gate.feature == name for gate in found) > 1:
                for document in documents:
                    message = f"`{name}` has several gates, so each needs a name; add `gate:`"
                    self._fault("missing-key", message, document, ("feature",))
        self._amend(features, found, named)
        return found

    def _amend(self, features: dict[str, Feature], gates: list[Gate], named: dict[tuple[str, str], int]) -> None:
        for document in self.kinds["amendment"]:
            feature, slash, gate = document.data["amends"].partition("/")
            if not slash:
                continue
            if (feature, gate) in named:
                index = named[feature, gate]
                gates[index] = GateAmender(self.gates, features[feature], gates[index], document).amended()
            else:
                hint = nearest(document.data["amends"], ["/".join(key) for key in named])
                self._fault("unknown-gate", f"unknown gate `{document.data['amends']}`{hint}", document, ("amends",))

    def _order(self, features: dict[str, Feature], gates: list[Gate]) -> tuple[str, ...]:
        """Return the features, each after those that its gates read; and tell the catalogue what each one reads."""
        reads: dict[str, set[str]] = {name: set(feature.request.names) for name, feature in features.items()}
        for name, feature in features.items():
            reads[name] |= {one.value.name for one in feature.outputs.values() if isinstance(one.value, FactRef)}
        for gate in gates:
            reads[gate.feature] |= facts_of_gate(gate)
        self.catalogue.decided_from = {name: frozenset(facts) for name, facts in reads.items()}
        graph = {
            name: {fact.split(".")[1] for fact in facts if fact.startswith(f"{FEATURE_GROUP}.")} & features.keys()
            for name, facts in reads.items()
        }
        try:
            return tuple(TopologicalSorter({name: sorted(graph[name]) for name in sorted(graph)}).static_order())
        except CycleError as error:
            chain = " on ".join(f"`{name}`" for name in reversed(error.args[1]))
            where = features[error.args[1][0]].where
            self.faults.append(Fault("cycle", f"features depend on each other in a circle: {chain}", where))
            return ()

    def _check_gates(self, features: dict[str, Feature], gates: list[Gate]) -> None:
        for gate in gates:
            self.gates.check(gate, features[gate.feature])
            for requirement in gate.demands:
                self._check_stage(requirement)
        for name, found in _by_feature(features, gates).items():
            for one, other in overlapping([gate for gate in found if (name, gate.name) not in self.gates.unclear]):
                message = (
                    f"`{other.name}` and `{one.name}` ({one.where}) could both apply; "
                    "test one fact against different constants in their `applies_to`"
                )
                self.faults.append(
                    Fault("overlapping-gates", message, self.gates.scopes.get((name, other.name), other.where))
                )

    def _check_stage(self, requirement: Requirement) -> None:
        due = requirement.at
        if due is None:
            return
        for fact in sorted(facts_of(All((requirement.when, requirement.that))) & self.catalogue.keys()):
            stage = self.catalogue.stage_of(fact)
            if STAGES.index(stage) > STAGES.index(due):
                message = f"`{requirement.id}` is due at stage {due}, and `{fact}` is known from stage {stage} on"
                self.faults.append(Fault("late-fact", message, requirement.where))

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
        for manifest in (document, *self.kinds["overlay"]):
            language = manifest.data["language"]
            if language != LANGUAGE:
                message = f"language {language} is not known to this release, which reads language {LANGUAGE}"
                newer = language > LANGUAGE
                hint = "; install a later release of model-gatekeeper" if newer else "; write `language: 1`"
                self._fault("unknown-language", message + hint, manifest, ("language",))
        data: dict[str, Any] = document.data
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
        scope = data.get("scope", "model")
        outputs = {}
        for name, raw in data.get("outputs", {}).items():
            at = document.where(("outputs", name))
            spec = output_spec(name, raw, at)
            value = ABSENT if "value" not in raw else self.gates.output_value(spec, raw["value"], at, scope)
            otherwise = ABSENT if raw["else"] is None else self.gates.coerced(spec, raw["else"], at)
            outputs[name] = Output(name=name, spec=spec, doc=raw.get("doc", ""), value=value, otherwise=otherwise)
        return Feature(
            name=data["feature"],
            summary=data["summary"],
            scope=scope,
            request=self._request(document),
            mode=data.get("mode", "enforce"),
            outputs=outputs,
            refs=tuple(data.get("refs", ())),
            allow=read_waivers(document, data),
            where=document.where(("feature",)),
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
                need = "one fact needs a string or an enum; name a flag by `{force: …}` or `{forbid: …}`"
                need = need if request.fact else "flags needs a boolean"
                message = f"`{name}` is {a_type(spec.type)}; a request by {need}"
                self.faults.append(Fault("wrong-type", message, where))
            if self.catalogue.is_layer_fact(name):
                self.faults.append(Fault("layer-fact", f"`{name}` differs from layer to layer; a request can't", where))
            if spec.group == FEATURE_GROUP:
                message = f"`{name}` is what a feature came to, and nobody asks by it; test it in a requirement"
                self.faults.append(Fault("wrong-value", message, where))
        return request


def _by_feature(features: Iterable[str], gates: Iterable[Gate]) -> dict[str, list[Gate]]:
    found: dict[str, list[Gate]] = {name: [] for name in features}
    for gate in gates:
        found[gate.feature].append(gate)
    return found


def facts_of_gate(gate: Gate) -> frozenset[str]:
    """Return every fact that a gate's answer rests on."""
    conditions = [gate.applies_to, *(part for one in gate.demands for part in (one.when, one.that))]
    outputs = [gate.outputs, *(option.outputs for option in gate.options)]
    given = {value.name for values in outputs for value in values.values() if isinstance(value, FactRef)}
    return facts_of(All(tuple(conditions))) | given


def _text(value: Any) -> str:
    return str(getattr(value, "text", value))
