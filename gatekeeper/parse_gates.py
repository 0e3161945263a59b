"""Documents to gates, options and requirements: references, types, templates and ids checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gatekeeper.conditions import (
    ALWAYS,
    All,
    Any_,
    Condition,
    ConditionParser,
    FactRef,
    Not,
    Test,
    comparable,
    facts_of,
    passes_if_absent,
    places,
)
from gatekeeper.errors import Fault, Where
from gatekeeper.fact_spec import FactSpec, a_type
from gatekeeper.rules import Feature, Gate, Option, Requirement
from gatekeeper.source import Document, nearest
from gatekeeper.values import ABSENT, Missing, Value
from gatekeeper.waivers import read_waivers

Path_ = tuple[str | int, ...]

RESERVED_OPTIONS = frozenset({"auto", "on", "off"})


class GateParser:
    """Parses the gates of one rule set; every fault goes to `faults`."""

    def __init__(self, conditions: ConditionParser, faults: list[Fault], partial: frozenset[str]) -> None:
        self.catalogue = conditions.catalogue
        self.conditions = conditions
        self.faults = faults
        self.shared: dict[str, Requirement] = {}
        """Shared requirements by name."""
        self.dropped: dict[str, str] = {}
        """Shared requirements that an overlay takes out of every gate, with the sentence that says so."""
        self.weakened: dict[str, str] = {}
        """Shared requirements that protect correctness no longer, likewise."""
        self.taken: set[str] = set()
        """Shared requirements that some gate uses."""
        self.scopes: dict[tuple[str, str], Where] = {}
        """Where each gate's `applies_to` stands."""
        self.unclear: set[tuple[str, str]] = set()
        """Gates whose `applies_to` is at fault."""
        self._partial = partial
        self._absence_meant: set[str] = set()
        self._warnings: list[str] = []

    def shared_requirement(self, document: Document, name: str, raw: Mapping[str, Any], path: Path_) -> Requirement:
        """Parse a requirement of requirements.yaml, or what an overlay puts in its place."""
        if "absent_passes" in raw:
            self._absence_meant.add(name)
        return replace(self._requirement(document, {**raw, "id": name}, path, ALWAYS), shared=name)

    def gate(self, document: Document, feature: Feature, *, declared: bool) -> Gate:
        """Parse the gate of a document (`declared`: of one that declares the feature too)."""
        data = document.data
        self._warnings = []
        name = data.get("gate", feature.name)
        requires = self._requirements(document, data.get("requires", []), ("requires",), feature)
        options = [
            self.option(document, raw, ("options", index), feature)
            for index, raw in enumerate(data.get("options", []))
            if raw is not None
        ]
        outputs = {} if declared else self.outputs(document, data.get("outputs", {}), ("outputs",), feature)
        return Gate(
            feature=feature.name,
            name=name,
            applies_to=self.applies_to(document, data, (), (feature.name, name)),
            request="honoured" if declared else data.get("request", "honoured"),
            mode=None if declared else data.get("mode"),
            on_failure=data.get("on_failure", "off"),
            requires=tuple(requires),
            options=tuple(options),
            outputs=outputs,
            refs=tuple(data.get("refs", ())),
            allow=() if declared else read_waivers(document, data),
            warnings=tuple(self._warnings),
            where=document.where(("gate",) if "gate" in data else ("feature",)),
        )

    def applies_to(self, document: Document, data: Mapping[str, Any], path: Path_, gate: tuple[str, str]) -> Condition:
        """Parse `applies_to`, which is about the model as a whole."""
        if "applies_to" not in data:
            return ALWAYS
        before = len(self.faults)
        at = (*path, "applies_to")
        self.scopes[gate] = document.where(at)
        condition = self.conditions.parse(document, data["applies_to"], at)
        for name in sorted(facts_of(condition)):
            if name in self.catalogue and self.catalogue.is_layer_fact(name):
                message = f"`applies_to` can't read `{name}`, which differs from layer to layer; ask it in `requires`"
                self._fault("layer-fact", message, document.where(at))
        if len(self.faults) > before:
            self.unclear.add(gate)
        return condition

    def check(self, gate: Gate, feature: Feature) -> None:
        """Check what can be said only of a whole gate, with its amendments: ids, and outputs that nothing gives."""
        for own in [(), *(option.requires for option in gate.options)]:
            self._check_ids([*gate.requires, *own])
        names = [option.name for option in gate.options]
        for option in gate.options:
            if names.count(option.name) > 1:
                self._fault("duplicate-id", f"option `{option.name}` stands twice", option.where)
        for output in feature.outputs.values():
            given = output.value is not ABSENT or output.name in gate.outputs
            missing = [one.name for one in gate.options if output.name not in one.outputs]
            if not given and (missing or not gate.options) and gate.where.file not in self._partial:
                by = f" with option `{missing[0]}`" if missing else ""
                cure = "give it a `value`, or let `outputs` of the gate or of each option give one"
                self._fault("no-output", f"nothing gives output `{output.name}`{by}; {cure}", gate.where)

    def option(self, document: Document, raw: dict[str, Any], path: Path_, feature: Feature) -> Option:
        """Parse one option."""
        if raw["option"] in RESERVED_OPTIONS:
            message = f"an option can't be called `{raw['option']}`"
            self._fault("wrong-value", message, document.where((*path, "option")))
        requires = self._requirements(document, raw.get("requires", []), (*path, "requires"), feature)
        for requirement in requires:
            if requirement.on_failure == "error":
                message = "an option's requirement has no `on_failure`; the gate has one for when no option is left"
                self._fault("wrong-value", message, requirement.where)
        return Option(
            name=raw["option"],
            requires=tuple(requires),
            outputs=self.outputs(document, raw.get("outputs", {}), (*path, "outputs"), feature),
            degraded=raw.get("degraded", ""),
            refs=tuple(raw.get("refs", ())),
            allow=read_waivers(document, raw, path),
            where=document.where((*path, "option")),
        )

    def outputs(
        self, document: Document, raw: Mapping[str, Any], path: Path_, feature: Feature
    ) -> dict[str, Value | FactRef]:
        """Parse the values that a gate or an option gives to outputs of the feature."""
        result: dict[str, Value | FactRef] = {}
        for name, value in raw.items():
            where = document.where((*path, name))
            if name not in feature.outputs:
                message = f"feature `{feature.name}` has no output `{name}`{nearest(name, feature.outputs)}"
                self._fault("unknown-output", message, where)
                continue
            given = self.output_value(feature.outputs[name].spec, value, where, feature.scope)
            if not isinstance(given, Missing):
                result[name] = given
        return result

    def output_value(self, spec: FactSpec, raw: Any, where: Where, scope: str) -> Value | FactRef | Missing:
        """Parse what an output is: a value, or a fact."""
        if not isinstance(raw, dict):
            return self.coerced(spec, raw, where)
        name = raw["fact"]
        other = self.conditions.fact(name, where)
        if other is not None and not comparable(other.type, spec.type):
            message = f"output `{spec.name}` is {a_type(spec.type)}, `{name}` {a_type(other.type)}"
            self._fault("wrong-type", message, where)
        if scope == "model" and self._differs_by_layer(name):
            message = f"`{name}` differs from layer to layer; give a fact of the whole model, or use `scope: layer`"
            self._fault("layer-fact", message, where)
        return FactRef(name)

    def coerced(self, spec: FactSpec, raw: Any, where: Where) -> Value | Missing:
        """Return a written value as the type of an output."""
        try:
            self.conditions.no_fact(raw)
            return spec.coerce(raw)
        except ValueError as error:
            self._fault("wrong-value", f"output `{spec.name}`: {error}", where)
            return ABSENT

    def _requirements(
        self, document: Document, raw: list[Any], path: Path_, feature: Feature, outer: Condition = ALWAYS
    ) -> list[Requirement]:
        found: list[Requirement] = []
        for index, one in enumerate(raw):
            if one is not None:  # left out, for it is at fault
                found += self.requirements(document, one, (*path, index), feature, outer)
        return found

    def requirements(
        self, document: Document, raw: dict[str, Any], path: Path_, feature: Feature, outer: Condition = ALWAYS
    ) -> list[Requirement]:
        """Parse one entry under `requires`: a requirement, a shared one, or a group under one `when`."""
        when = outer
        if "when" in raw:
            when = _both(outer, self.conditions.parse(document, raw["when"], (*path, "when")))
        if "requires" in raw:
            return self._requirements(document, raw["requires"], (*path, "requires"), feature, when)
        if "use" in raw:
            found = self._taken(document, raw, path, outer, when)
        else:
            found = [self._requirement(document, raw, path, outer)]
        if feature.scope == "model":
            for requirement in found:
                self._check_model_scope(requirement)
        return found

    def _taken(
        self, document: Document, raw: dict[str, Any], path: Path_, outer: Condition, when: Condition
    ) -> list[Requirement]:
        name, where = raw["use"], document.where((*path, "use"))
        if name not in self.shared:
            hint = nearest(name, self.shared) or "; requirements.yaml declares them"
            message = f"unknown requirement `{name}`{hint}"
            self._fault("unknown-requirement", message, where)
            return []
        self.taken.add(name)
        shared = self.shared[name]
        protects = raw.get("protects", shared.protects)
        if name in self.dropped:
            if protects == "correctness":
                self._warnings.append(self.dropped[name])
            return []
        if name in self.weakened and protects != "correctness":
            self._warnings.append(self.weakened[name])
        if raw.get("protects") == "correctness" and name not in self._absence_meant:
            self._check_absence(name, shared.that, where)
        return [
            replace(
                shared,
                # An own `when` takes the place of the shared one.
                when=when if "when" in raw else _both(outer, shared.when),
                protects=protects,
                on_failure=raw.get("on_failure", shared.on_failure),
                where=where,
            )
        ]

    def _requirement(self, document: Document, raw: Mapping[str, Any], path: Path_, outer: Condition) -> Requirement:
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
            at=raw.get("at"),
            refs=tuple(raw.get("refs", ())),
            allow=read_waivers(document, raw, path),
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
            self._fault("absent-passes", message, where or test.where)

    def _check_model_scope(self, requirement: Requirement) -> None:
        whole = All((requirement.when, requirement.that))
        tested = {name for test in _outside_layers(whole) for name in (test.fact, *test.refers)}
        for name in sorted(filter(self._differs_by_layer, tested)):
            message = (
                f"`{name}` differs from layer to layer; test it under every_layer or any_layer, or use `scope: layer`"
            )
            self._fault("layer-fact", message, requirement.where)
        for name in sorted({*filter(self._differs_by_layer, places(requirement.reason))}):
            message = f"the reason names `{name}`, which differs from layer to layer, in a gate of the whole model"
            self._fault("layer-fact", message, requirement.where)

    def _differs_by_layer(self, name: str) -> bool:
        return name in self.catalogue and self.catalogue.is_layer_fact(name)

    def _check_ids(self, requires: list[Requirement]) -> None:
        seen: dict[str, Requirement] = {}
        for requirement in requires:
            if requirement.id in seen:
                message = (
                    f"requirement `{requirement.id}` stands twice in this gate, first at {seen[requirement.id].where}"
                )
                self._fault("duplicate-id", message, requirement.where)
            seen[requirement.id] = requirement

    def _fault(self, code: str, message: str, where: Where) -> None:
        self.faults.append(Fault(code, message, where))


def _outside_layers(condition: Condition) -> Iterable[Test]:
    if isinstance(condition, All | Any_):
        for part in condition.parts:
            yield from _outside_layers(part)
    elif isinstance(condition, Test):
        yield condition
    elif isinstance(condition, Not):
        yield from _outside_layers(condition.part)


def _both(one: Condition, other: Condition) -> Condition:
    if one is ALWAYS or other is ALWAYS:
        return other if one is ALWAYS else one
    return All((one, other))
