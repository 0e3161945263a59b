"""One gate against the facts of one scope: the states of the design, the first line that holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gatekeeper.asked import Asked
from gatekeeper.catalogue import STAGES
from gatekeeper.closures import LAYERS, Closure
from gatekeeper.compile import compile_condition
from gatekeeper.compile_gate import compile_truths
from gatekeeper.conditions import All, FactRef, asks_layers, facts_of
from gatekeeper.decision import Outcome, OutcomeState, State
from gatekeeper.evidence import collect, sentence
from gatekeeper.facts import Facts
from gatekeeper.rules import Feature, Gate, Option, Requirement, RuleSet
from gatekeeper.values import ABSENT, UNKNOWN, Missing, Readings, Truth, Values, plain


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one judgement of a gate came to, before it is a decision."""

    state: State
    decided_by: str | None = None
    reason: str = ""
    option: str | None = None
    degraded: str = ""
    would_be: str | None = None
    outputs: tuple[tuple[str, Any], ...] = ()
    outcomes: tuple[Outcome, ...] = ()

    def same(self, other: Verdict) -> bool:
        return (self.state, self.option, self.outputs) == (other.state, other.option, other.outputs)


@dataclass(frozen=True, slots=True)
class Judged:
    """One requirement against one scope."""

    requirement: Demand
    state: OutcomeState
    when: Truth
    was: OutcomeState | None = None

    @property
    def open(self) -> bool:
        return self.state == "unknown"

    @property
    def failed(self) -> bool:
        return self.state == "failed"


@dataclass(frozen=True, slots=True)
class Demand:
    """A requirement of a gate, or of one of its options."""

    rule: Requirement
    option: str | None

    def judge(self, when: Truth, holds: Truth, *, waive: bool) -> Judged:
        if when is False:
            return Judged(self, "not_applicable", when)
        state: OutcomeState = {True: "passed", False: "failed", None: "unknown"}[holds]  # type: ignore[assignment]
        if holds is not True and waive and self.rule.waivable:
            return Judged(self, "waived", when, was=state)
        return Judged(self, state, when)


class CompiledGate:
    """One gate as functions."""

    def __init__(self, rules: RuleSet, gate: Gate) -> None:
        self.rule = gate
        self.applies: Closure = compile_condition(gate.applies_to, rules.catalogue)
        self.demands = [Demand(one, None) for one in gate.requires]
        self.demands += [Demand(one, option.name) for option in gate.options for one in option.requires]
        self._catalogue = rules.catalogue

    @cached_property
    def _truths(self) -> Callable[[Values], list[tuple[Truth, Truth]]]:
        # Compiled when the gate is first asked: most never are.
        return compile_truths([one.rule for one in self.demands], self._catalogue)

    def judge(self, values: Values, asked: Asked) -> list[Judged]:
        """Judge the gate's own requirements and those of its options, in file order."""
        return [
            one.judge(when, holds, waive=asked.forced if one.option is None else asked.option == one.option)
            for one, (when, holds) in zip(self.demands, self._truths(values), strict=True)
        ]


class Judge:
    """One judgement: a gate against the values of one scope."""

    def __init__(self, rules: RuleSet, feature: Feature, facts: Facts, values: Values, layer: Readings | None) -> None:
        layers = facts.runner_layer_values
        self.rules = rules
        self.feature = feature
        self.facts = facts
        self.layer = layer
        self.values: Values = values if layers is None else {**values, LAYERS: layers}

    def verdict(self, asked: Asked, gate: CompiledGate | None, undecided: list[CompiledGate]) -> Verdict:
        name = self.feature.name
        if asked.forbidden:
            if asked.forced:
                return Verdict("error", "request", f"Both forced and forbidden: unset one of {self._flags()}.")
            return Verdict("off", "request", f"Forbidden by {self._flags(forbid=True)}.")
        if gate is None:
            if undecided:
                facts = sorted({n for g in undecided for n in facts_of(g.rule.applies_to) if n not in self.values})
                return Verdict("pending", "no-gate", f"Which gate applies depends on {_listed(facts)}.")
            reason = self._gateless(name)
            return Verdict("error" if asked.forced else "off", "no-gate", reason)
        required = gate.rule.request == "required"
        if required and not asked.forced and not asked.may_force:
            return Verdict("off", "request", f"Off unless asked for; set {self._flags()}.")
        verdict = self._judged(asked, gate)
        if verdict.state == "on" and asked.unknown:
            return self._open(verdict)
        if verdict.state == "error" and required and not asked.forced:
            return self._open(verdict)
        return verdict

    def _open(self, verdict: Verdict) -> Verdict:
        """The same, but for a request that is not known yet."""
        reason = f"Whether it is asked for is not known yet: {self._flags()}."
        would_be = verdict.option if verdict.state == "on" else None
        return Verdict("pending", "request", reason, would_be=would_be, outcomes=verdict.outcomes)

    def _flags(self, *, forbid: bool = False) -> str:
        request = self.feature.request
        names = (request.forbid or request.fact,) if forbid else request.names
        return _listed([f"{n} = {_show(self.values.get(n))}" if n == request.fact else n for n in names])

    def _gateless(self, feature: str) -> str:
        family = self.rules.families.get(str(self.values.get("model.family")))
        why = family.gateless.get(feature) if family else None
        return f"No gate for this model: {why}" if why else "No gate for this model."

    def _judged(self, asked: Asked, gate: CompiledGate) -> Verdict:
        everything = gate.judge(self.values, asked)
        judged = [one for one in everything if one.requirement.option is None]
        options = [
            (option, [one for one in everything if one.requirement.option == option.name])
            for option in gate.rule.options
        ]
        outcomes = tuple(map(self._outcome, everything))
        verdict = self._from_requires(asked, judged) or (
            self._chosen(asked, gate, options) if options else self._on(gate, None, asked)
        )
        waived = [one.id for one in outcomes if one.state == "waived" and one.option in (None, verdict.option)]
        if verdict.state == "on" and waived:
            verdict = replace(verdict, reason=f"On by request, which waives {_listed(waived)}.")
        return replace(verdict, outcomes=outcomes)

    def _from_requires(self, asked: Asked, judged: list[Judged]) -> Verdict | None:
        """States 3 to 5: what the gate's own requirements come to; None where they leave it on."""
        failed = [one for one in judged if one.failed]
        unknown = [one for one in judged if one.open]
        if failed:
            first = _first_failed(failed)
            if asked.forced and any(not one.requirement.rule.waivable for one in failed):
                return self._because("error", first, forced=True)
            final = all(one.requirement.rule.on_failure == "error" for one in failed)
            if not final:
                return self._because("off", first)
            if not unknown:
                waivable = all(one.requirement.rule.waivable for one in failed)
                if asked.may_force and waivable:
                    return self._open(Verdict("error"))
                return self._because("error", first)
        return self._because("pending", _first_unknown(unknown)) if unknown else None

    def _chosen(self, asked: Asked, gate: CompiledGate, options: list[tuple[Option, list[Judged]]]) -> Verdict:
        """State 6: the first option that passes, or the one asked for by name."""
        if asked.option is not None:
            return self._asked_for(asked.option, gate, options, asked)
        unknown: list[Judged] = []
        for option, judged in options:
            if any(one.failed for one in judged):
                continue
            if any(one.open for one in judged):
                unknown += [one for one in judged if one.open]
                continue
            if unknown:
                return replace(self._because("pending", _first_unknown(unknown)), would_be=option.name)
            return self._on(gate, option, asked)
        if unknown:
            return self._because("pending", _first_unknown(unknown))
        first = _first_failed([one for _, judged in options for one in judged if one.failed])
        if asked.forced:
            return self._because("error", first, forced=True)
        if gate.rule.on_failure == "error":
            rescued = any(all(o.requirement.rule.waivable for o in judged if o.failed) for _, judged in options)
            return self._open(Verdict("error")) if asked.may_force and rescued else self._because("error", first)
        return self._because("off", first)

    def _asked_for(
        self, name: str, gate: CompiledGate, options: list[tuple[Option, list[Judged]]], asked: Asked
    ) -> Verdict:
        """An option asked for by name: that one, pending while it is unknown, else an error that names what works."""
        judged = next((ones for option, ones in options if option.name == name), None)
        if judged is None:
            named = _listed([option.name for option, _ in options])
            return Verdict("error", "request", f"`{name}` is no option of this gate, which has {named}.")
        failed = [one for one in judged if one.failed]
        if failed:
            verdict = self._because("error", _first_failed(failed), forced=True)
            works = [o.name for o, ones in options if not any(one.failed or one.open for one in ones)]
            hint = f" What would work: {_listed(works)}." if works else " No other option works either."
            return replace(verdict, reason=verdict.reason + hint)
        unknown = [one for one in judged if one.open]
        if unknown:
            return self._because("pending", _first_unknown(unknown))
        return self._on(gate, next(option for option, _ in options if option.name == name), asked)

    def _on(self, gate: CompiledGate, option: Option | None, asked: Asked) -> Verdict:
        """State 7: on, unless an output has no value."""
        outputs: dict[str, Any] = {}
        missing: list[tuple[str, Missing, str]] = []
        for name, output in self.feature.outputs.items():
            given = next(
                source[name]
                for source in (option.outputs if option else {}, gate.rule.outputs, {name: output.value})
                if name in source
            )
            value = self.values.get(given.name, UNKNOWN) if isinstance(given, FactRef) else given
            if isinstance(value, Missing):
                missing.append((name, value, given.name if isinstance(given, FactRef) else name))
            else:
                outputs[name] = plain(value)
        chosen = option.name if option else None
        # What is absent is final; what is unknown may still come.
        for name, kind, fact in sorted(missing, key=lambda one: one[1] is UNKNOWN):
            if kind is ABSENT:
                reason = f"Output `{name}` has no value: `{fact}` is absent."
                return Verdict("error" if asked.forced else "off", f"output-{name}", reason)
            reason = f"Output `{name}` is not known yet: `{fact}` is unknown."
            return Verdict("pending", f"output-{name}", reason, would_be=chosen)
        degraded = option.degraded if option else ""
        return Verdict("on", option=chosen, degraded=degraded, outputs=tuple(outputs.items()))

    def otherwise(self) -> tuple[tuple[str, Any], ...]:
        return tuple((name, plain(output.otherwise)) for name, output in self.feature.outputs.items())

    def _because(self, state: State, judged: Judged, *, forced: bool = False) -> Verdict:
        reason = self._sentence(judged.requirement.rule)
        if state == "pending":
            rule = judged.requirement.rule
            names = self._unknown(rule)
            on = _listed(names) or "the MoE layers"
            reason = f"Depends on {on}, not known yet (stage {self._stage(rule)}). Should it fail: {reason}"
        elif forced:
            reason += " A request does not waive this."
        return Verdict(state, judged.requirement.rule.id, reason)

    def _unknown(self, rule: Requirement) -> list[str]:
        return sorted(name for name in facts_of(All((rule.when, rule.that))) if not self._is_known(name))

    def _stage(self, rule: Requirement) -> str:
        """Return the stage at which all that a requirement lacks is known."""
        stages = [self.rules.catalogue.stage_of(name) for name in self._unknown(rule)]
        if LAYERS not in self.values and asks_layers(All((rule.when, rule.that))):
            stages.append("checkpoint")
        return max(stages, key=STAGES.index, default=STAGES[0])

    def _is_known(self, name: str) -> bool:
        fields = self.rules.catalogue[name].fields
        if fields:
            return all(self._is_known(f"{name}.{key}") for key in fields)
        layers: Any = self.values.get(LAYERS)
        # Under every_layer and any_layer it is asked of each layer.
        by_layer = layers is not None and self.rules.catalogue.is_layer_fact(name)
        return name in self.values or (by_layer and all(name in layer for layer in layers))

    def _sentence(self, rule: Requirement) -> str:
        return sentence(rule, self.values, self.rules.catalogue)

    def _outcome(self, judged: Judged) -> Outcome:
        rule = judged.requirement.rule
        catalogue = self.rules.catalogue
        return Outcome(
            id=rule.id,
            state=judged.state,
            was=judged.was,
            protects=rule.protects,
            option=judged.requirement.option,
            when=judged.when,
            reason="" if judged.state in ("passed", "not_applicable") else self._sentence(rule),
            where=f"{rule.where.file}:{rule.where.line}",
            resolves_at=self._stage(rule) if judged.open else None,
            checks=tuple(collect(All((rule.when, rule.that)), self.values, self.facts, self.layer, catalogue)),
        )


def _first_failed(failed: Sequence[Judged]) -> Judged:
    return min(failed, key=lambda one: one.requirement.rule.waivable)


def _first_unknown(unknown: Sequence[Judged]) -> Judged:
    return min(unknown, key=lambda one: (one.requirement.rule.waivable, one.when is not True))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _show(value: Any) -> str:
    return "unknown" if value is None else "none" if value is ABSENT else str(value)
