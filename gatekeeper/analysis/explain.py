"""A decision with everything around it: what would change it, what it waits for, and what every fact came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gatekeeper.analysis.answers import Question, answers, questions
from gatekeeper.analysis.changes import (
    Again,
    Found,
    Setting,
    facts_of_rule,
    passing,
    requirement_of,
    turn_on,
    without_request,
)
from gatekeeper.analysis.provenance import Scope, Told
from gatekeeper.conditions import FactRef, facts_of
from gatekeeper.decide import decide, decide_again
from gatekeeper.decision import Check, Decision, LayerDecision, Outcome, ranges
from gatekeeper.facts import Facts
from gatekeeper.log import quiet
from gatekeeper.rules import Feature, Gate, Requirement, RuleSet
from gatekeeper.values import UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """One requirement that did not pass, and in whose hands it is."""

    outcome: Outcome
    settings: tuple[Setting, ...]
    """Single settings with which it passes, whatever else then fails."""
    tried: tuple[str, ...]
    """Where there is no such setting: the facts that an operator sets and that it reads."""
    given: tuple[str, ...]
    """What it rests on that nobody sets, as far as it is known: `model.n_routed_experts`."""
    unknown: tuple[str, ...]
    """What it rests on that is not known yet."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "requirement": self.outcome.id,
            "option": self.outcome.option,
            "settings": [one.to_json() for one in self.settings],
            "tried": list(self.tried),
            "given": list(self.given),
            "unknown": list(self.unknown),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers that came to the same, for the same reason."""

    layers: str
    """``3-60``."""
    first: LayerDecision

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        keys = ("state", "option", "decided_by", "reason")
        outcomes = [one.to_json() for one in self.first.outcomes]
        return {"layers": self.layers, **{key: getattr(self.first, key) for key in keys}, "outcomes": outcomes}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionTold:
    """One option of a choice."""

    name: str
    state: str
    """`chosen`, `passed` (and another is chosen), `failed` or `unknown`; `waived`: would do by request alone."""
    degraded: str
    where: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"option": self.name, "state": self.state, "degraded": self.degraded or None, "where": self.where}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a feature came to what it came to for one runner, and what would change that."""

    rules: RuleSet = field(repr=False)
    decision: Decision
    feature: Feature
    gate: Gate | None
    layers: tuple[LayerGroup, ...]
    options: tuple[OptionTold, ...]
    found: Found | None
    """The changes that turn it on, or better a degraded option; None where it is on at its best."""
    withdrawn: tuple[tuple[Setting, str], ...]
    """Of an error: the ways to ask for less, and the state that each leads to."""
    obstacles: tuple[Obstacle, ...]
    questions: tuple[Question, ...]
    """What a pending decision waits for."""
    answered: Found | None
    """The answers with which a pending decision comes out as on."""
    facts: tuple[Told, ...]
    """All that the decision rests on, each fact before those that it is derived from."""

    @property
    def defaults(self) -> tuple[str, ...]:
        """The facts that nobody gave and that are at their defaults."""
        return tuple(sorted(one.name for one in self.facts if one.is_default))

    def refs(self, outcome: Outcome) -> tuple[str, ...]:
        """Return the references of the requirement that an outcome is of."""
        return requirement_of(self.gate, outcome).refs if self.gate else ()

    def shared_at(self, outcome: Outcome) -> str | None:
        """Return where the shared requirement stands that the gate takes here."""
        name = requirement_of(self.gate, outcome).shared if self.gate else ""
        return _place(self.rules.requirements[name]) if name else None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form of ``schema/explanation.schema.json``."""
        gate = self.gate
        return {
            "decision": self.decision.to_json(),
            "feature": {
                "name": self.feature.name,
                "summary": self.feature.summary,
                "refs": list(self.feature.refs),
                "where": _place(self.feature),
            },
            "gate": None if gate is None else {"name": gate.name, "refs": list(gate.refs), "where": _place(gate)},
            "requirements": [
                {"id": one.id, "option": one.option, "refs": list(self.refs(one)), "shared_at": self.shared_at(one)}
                for one in self.decision.outcomes
            ],
            "layers": [one.to_json() for one in self.layers],
            "options": [one.to_json() for one in self.options],
            "changes": None if self.found is None else self.found.to_json(),
            "without_request": [{**setting.to_json(), "state": state} for setting, state in self.withdrawn],
            "obstacles": [one.to_json() for one in self.obstacles],
            "waits_for": [one.to_json() for one in self.questions],
            "answers": None if self.answered is None else self.answered.to_json(),
            "facts": [one.to_json() for one in self.facts],
            "defaults": list(self.defaults),
        }


def _place(declared: Feature | Gate | Requirement) -> str:
    return f"{declared.where.file}:{declared.where.line}"


def explain(rules: RuleSet, facts: Facts, feature: str) -> Explanation:
    """Decide one feature and explain it. Raises `FactError` where there is no such feature."""
    with quiet():
        decision = decide(rules, facts, [feature])[feature]
        return _explained(rules, facts, decision, partial(decide_again, rules, feature))


def _explained(rules: RuleSet, facts: Facts, decision: Decision, again: Again) -> Explanation:
    gate = next((one for one in rules.gates[decision.feature] if one.name == decision.gate), None)
    scope = Scope(facts, decision)
    obstacles = () if gate is None else tuple(_obstacles(scope, decision, gate, again))
    groups = _layer_groups(decision)
    read = list(_facts_read(rules, decision, gate))
    asked = tuple(questions(rules, scope, _waiting(rules, decision, gate))) if is_pending(decision) else ()
    return Explanation(
        rules=rules,
        decision=decision,
        feature=rules.features[decision.feature],
        gate=gate,
        layers=groups,
        options=tuple(_options(decision, gate)),
        found=None if _is_at_its_best(decision) else turn_on(rules, facts, decision, again),
        withdrawn=tuple(without_request(rules, facts, decision, again)) if decision.state == "error" else (),
        obstacles=obstacles,
        questions=asked,
        answered=answers(rules, facts, decision, again) if asked else None,
        facts=tuple(scope.tell([*read, *(name for one in obstacles for name in (*one.given, *one.unknown))])),
    )


def is_pending(decision: Decision) -> bool:
    """Whether a decision, or that of a layer, waits for something."""
    return decision.state == "pending" or any(layer.state == "pending" for layer in decision.layers or ())


def _is_at_its_best(decision: Decision) -> bool:
    layers = decision.layers or ()
    # Layers may be on with different options or outputs, which makes the feature mixed.
    on = decision.state == "on" or (decision.state == "mixed" and all(one.state == "on" for one in layers))
    return on and not decision.degraded and not any(one.degraded for one in layers)


def _facts_read(rules: RuleSet, decision: Decision, gate: Gate | None) -> Iterator[str]:
    """Yield what the decision reads, in the order of the rules: what applies, what was asked, what is required."""
    feature = rules.features[decision.feature]
    for one in rules.gates[decision.feature] if gate is None else (gate,):
        yield from sorted(facts_of(one.applies_to))
    yield from feature.request.names
    if gate is None:
        return
    for rule in gate.demands:
        yield from sorted(facts_of_rule(rule))
    given = [*(one.value for one in feature.outputs.values()), *gate.outputs.values()]
    given += [value for option in gate.options for value in option.outputs.values()]
    yield from sorted(value.name for value in given if isinstance(value, FactRef))


def _waiting(rules: RuleSet, decision: Decision, gate: Gate | None) -> list[str]:
    """Return the facts that a pending decision may wait for."""
    feature = rules.features[decision.feature]
    if gate is None:
        return sorted({name for one in rules.gates[feature.name] for name in facts_of(one.applies_to)})
    names = set(feature.request.names)
    for outcome in unmet(decision):
        if outcome.state == "unknown":
            names |= facts_of_rule(requirement_of(gate, outcome))
    if (decision.decided_by or "").startswith("output-"):
        names |= set(_facts_read(rules, decision, gate))
    return sorted(names)


def _layer_groups(decision: Decision) -> tuple[LayerGroup, ...]:
    groups: dict[tuple[Any, ...], tuple[LayerDecision, list[int]]] = {}
    for position, layer in enumerate(decision.layers or ()):
        index = position if layer.index is None else layer.index
        key = (layer.state, layer.option, layer.decided_by, layer.reason)
        groups.setdefault(key, (layer, []))[1].append(index)
    return tuple(LayerGroup(layers=ranges(found), first=first) for first, found in groups.values())


def _options(decision: Decision, gate: Gate | None) -> Iterator[OptionTold]:
    # Over layers that differ, these are the options of the layer that made the state.
    for option in gate.options if gate and decision.outcomes else ():
        states = {one.state for one in decision.outcomes if one.option == option.name}
        state = next((word for word in ("failed", "unknown", "waived") if word in states), "passed")
        yield OptionTold(
            name=option.name,
            state="chosen" if option.name == decision.option else state,
            degraded=option.degraded,
            where=f"{option.where.file}:{option.where.line}",
        )


def unmet(decision: Decision) -> list[Outcome]:
    """Return every outcome that stands between the feature and on, each once, over all layers."""
    found: dict[tuple[str, str | None], Outcome] = {}
    for outcomes in (decision.outcomes, *(one.outcomes for one in decision.layers or () if one.state != "on")):
        for one in outcomes:
            if one.state in ("failed", "unknown"):
                found.setdefault((one.id, one.option), one)
    return list(found.values())


def _obstacles(scope: Scope, decision: Decision, gate: Gate, again: Again) -> Iterator[Obstacle]:
    catalogue = scope.facts.catalogue
    for outcome in () if _is_at_its_best(decision) else unmet(decision):
        settings = tuple(passing(outcome, scope.facts, again))
        inputs = sorted(catalogue.inputs(facts_of_rule(requirement_of(gate, outcome))))
        settable = [name for name in inputs if catalogue[name].controllable]
        tested = {name: None for check in outcome.checks if check.truth is not True for name in check_facts(check)}
        roots = {root: None for name in tested for root in scope.roots(name) if root not in settable}
        yield Obstacle(
            outcome=outcome,
            settings=settings,
            tried=() if settings else tuple(settable),
            given=tuple(name for name in roots if scope.reading(name).value is not UNKNOWN),
            unknown=tuple(n for n in inputs if scope.is_root(n) and scope.reading(n).value is UNKNOWN),
        )


def check_facts(check: Check) -> list[str]:
    """Return the facts on both sides of an atomic condition."""
    other = check.expected.get("fact") if isinstance(check.expected, dict) else None
    return [check.fact, *([other] if isinstance(other, str) else [])]
