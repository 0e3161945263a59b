"""Facts against rules: the states of the design, first line that holds, for a model or layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from gatekeeper import log
from gatekeeper.compile import LAYERS, Closure, compile_condition, fill
from gatekeeper.conditions import All, FactRef, facts_of
from gatekeeper.decision import Decision, Decisions, LayerDecision, Outcome, OutcomeState, State, ranges
from gatekeeper.errors import FactError
from gatekeeper.evidence import collect, difference
from gatekeeper.facts import Facts
from gatekeeper.rules import Feature, Gate, Option, Requirement, RuleSet
from gatekeeper.source import nearest
from gatekeeper.values import ABSENT, UNKNOWN, Missing, Readings, Truth, Value, Values, plain, shown


def decide(rules: RuleSet, facts: Facts, features: Iterable[str] | None = None) -> Decisions:
    """Decide every feature of a rule set (or those named), and log one event each.

    Raises `FactError` where a named feature does not exist.
    """
    names = list(rules.features if features is None else features)
    for name in names:
        if name not in rules.features:
            raise FactError(f"unknown feature `{name}`{nearest(name, rules.features)}")
    compiled = _compiled(rules)
    decisions = Decisions({name: _with_remedies(compiled[name], facts) for name in sorted(names)})
    for decision in decisions.values():
        log.decided(decision)
    return decisions


def _with_remedies(feature: _Feature, facts: Facts) -> Decision:
    """Decide, and let an error say which controllable facts would make the failed requirement pass."""
    decision = feature.decide(facts)
    culprit = next((one for one in decision.outcomes if one.id == decision.decided_by), None)
    if decision.state != "error" or culprit is None:
        return decision
    found = []
    for name in sorted(facts.catalogue.inputs(check.fact for check in culprit.checks)):
        values = facts.catalogue[name].controllable
        passing = [value for value in values if _passes(feature, facts, name, value, culprit)]
        if passing:
            found.append(f"`{name}` {' or '.join(map(shown, passing))}")
    if not found:
        return decision
    return replace(decision, reason=f"{decision.reason} `{culprit.id}` passes with {', or with '.join(found)}.")


def _passes(feature: _Feature, facts: Facts, name: str, value: Value, culprit: Outcome) -> bool:
    if facts.values.get(name) == value:
        return False
    try:
        decision = feature.decide(facts.with_fact(name, value))
    except FactError:
        return False
    states = [(one.id, one.option, one.state) for one in decision.outcomes]
    return any((culprit.id, culprit.option, state) in states for state in ("passed", "not_applicable"))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the operator asked for, as far as it is known."""

    word: str
    """`auto on off both unknown` or an option's name, for the decision."""
    forced: bool = False
    forbidden: bool = False
    option: str | None = None
    unknown: bool = False
    """Some answer is still open: it may come to be forced or forbidden."""
    may_force: bool = False
    may_forbid: bool = False


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one judgement of a gate came to, before it is a decision."""

    state: State
    decided_by: str | None = None
    reason: str = ""
    option: str | None = None
    degraded: str = ""
    would_be: str | None = None
    outputs: tuple[tuple[str, Any], ...] = ()
    outcomes: tuple[Outcome, ...] = ()

    def same(self, other: _Verdict) -> bool:
        return (self.state, self.option, self.outputs) == (other.state, other.option, other.outputs)


@dataclass(frozen=True, slots=True)
class _Judged:
    """One requirement against one scope."""

    requirement: _Requirement
    state: OutcomeState
    when: Truth
    was: OutcomeState | None = None

    @property
    def open(self) -> bool:
        return self.state == "unknown"

    @property
    def failed(self) -> bool:
        return self.state == "failed"


class _Requirement:
    def __init__(self, rules: RuleSet, requirement: Requirement, option: str | None) -> None:
        self.rule = requirement
        self.option = option
        self._when = compile_condition(requirement.when, rules.catalogue)
        self._that = compile_condition(requirement.that, rules.catalogue)

    def judge(self, values: Values, *, waive: bool) -> _Judged:
        when = self._when(values)
        if when is False:
            return _Judged(self, "not_applicable", when)
        that = self._that(values)
        truth = that if when or that else None
        state: OutcomeState = {True: "passed", False: "failed", None: "unknown"}[truth]  # type: ignore[assignment]
        if truth is not True and waive and self.rule.waivable:
            return _Judged(self, "waived", when, was=state)
        return _Judged(self, state, when)


class _Gate:
    def __init__(self, rules: RuleSet, gate: Gate) -> None:
        self.rule = gate
        self.applies: Closure = compile_condition(gate.applies_to, rules.catalogue)
        self.requires = [_Requirement(rules, one, None) for one in gate.requires]
        self.options = [
            (option, [_Requirement(rules, one, option.name) for one in option.requires]) for option in gate.options
        ]


class _Feature:
    """One feature with its gates, compiled."""

    def __init__(self, rules: RuleSet, feature: Feature) -> None:
        self.rules = rules
        self.feature = feature
        self.gates = [_Gate(rules, gate) for gate in rules.gates[feature.name]]
        self.facts = _facts_used(feature, rules.gates[feature.name], rules)
        self.layer_facts = tuple(name for name in self.facts if rules.catalogue.is_layer_fact(name))

    def decide(self, facts: Facts) -> Decision:
        asked = self._asked(facts.values)
        gate, undecided = self._select(facts.values)
        ignored = gate is not None and gate.rule.request == "ignored" and asked.forced
        if gate is not None and gate.rule.request == "ignored":
            asked = replace(asked, forced=False, may_force=False, option=None, unknown=asked.may_forbid)
        judge = self._judge(asked, gate, undecided, facts)
        layers: tuple[LayerDecision, ...] | None = None
        if self.feature.scope == "model":
            verdict = judge(facts.values, None)
        else:
            verdict, layers = self._over_layers(judge, asked, facts)
        return Decision(
            feature=self.feature.name,
            gate=gate.rule.name if gate else None,
            runner=facts.runner,
            request=asked.word,
            request_ignored=ignored,
            requested=asked.forced,
            state=verdict.state,
            option=verdict.option,
            degraded=verdict.degraded,
            would_be=verdict.would_be,
            outputs=None if verdict.state == "mixed" else dict(verdict.outputs),
            decided_by=verdict.decided_by,
            reason=verdict.reason,
            outcomes=verdict.outcomes,
            layers=layers,
            assumed={"assume": facts.assumed, "unknown": facts.unknown},
            facts_used=self._used(facts),
            rule_set={"name": self.rules.name, "version": self.rules.version, "digest": self.rules.digest},
        )

    def _asked(self, values: Values) -> _Asked:
        request = self.feature.request
        if request.fact:
            return self._asked_by_word(values.get(request.fact))
        force = values.get(request.force) if request.force else False
        forbid = values.get(request.forbid) if request.forbid else False
        may_force, may_forbid = force is None, forbid is None
        forced, forbidden = force is True, forbid is True
        if forced and forbidden:
            word = "both"
        elif may_force or may_forbid:
            word = "off" if forbidden else "on" if forced and not may_forbid else "unknown"
        else:
            word = "on" if forced else "off" if forbidden else "auto"
        return _Asked(word, forced, forbidden, None, may_force or may_forbid, may_force, may_forbid)

    def _asked_by_word(self, value: Any) -> _Asked:
        if value is None:
            return _Asked("unknown", unknown=True, may_force=True, may_forbid=True)
        word = "auto" if value is ABSENT else str(value)
        if word in ("auto", "on", "off"):
            return _Asked(word, forced=word == "on", forbidden=word == "off")
        return _Asked(word, forced=True, option=word)

    def _select(self, values: Values) -> tuple[_Gate | None, list[_Gate]]:
        """Return the gate that applies, and those of which it is unknown."""
        undecided = []
        for gate in self.gates:
            applies = gate.applies(values)
            if applies:
                return gate, []
            if applies is None:
                undecided.append(gate)
        return None, undecided

    def _judge(
        self, asked: _Asked, gate: _Gate | None, undecided: list[_Gate], facts: Facts
    ) -> Callable[[Values, Readings | None], _Verdict]:
        def judge(values: Values, layer: Readings | None) -> _Verdict:
            run = _Run(self, facts, values, layer)
            verdict = run.verdict(asked, gate, undecided)
            if verdict.state != "on":
                verdict = replace(verdict, outputs=run.otherwise())
            return verdict

        return judge

    def _over_layers(
        self, judge: Callable[[Values, Readings | None], _Verdict], asked: _Asked, facts: Facts
    ) -> tuple[_Verdict, tuple[LayerDecision, ...] | None]:
        if facts.runner_layers is None or facts.runner_layer_values is None:
            verdict = judge(facts.values, None)
            if verdict.state == "on":
                note = facts.layers_note or "which MoE layers there are is not known"
                verdict = replace(
                    self._none(asked, "pending", note), would_be=verdict.option, outcomes=verdict.outcomes
                )
            return verdict, None
        if not facts.runner_layers:
            if asked.forbidden:
                return judge(facts.values, None), ()
            role = "MoE layer" if facts.runner == "target" else "draft MoE layer"
            return self._none(asked, "error" if asked.forced else "off", f"The model has no {role}."), ()
        cache: dict[tuple[Any, ...], _Verdict] = {}
        layers = []
        for readings, own in zip(facts.runner_layers, facts.runner_layer_values, strict=True):
            key = tuple(own.get(name) for name in self.layer_facts)
            if key not in cache:
                cache[key] = judge({**facts.values, **own}, readings)
            layers.append(_layer_decision(own, readings, cache[key]))
        return _combined(list(cache.values()), layers), tuple(layers)

    def _none(self, asked: _Asked, state: State, reason: str) -> _Verdict:
        outputs = tuple((name, plain(o.otherwise)) for name, o in self.feature.outputs.items())
        return _Verdict(state, "layers", reason, outputs=outputs)

    def _used(self, facts: Facts) -> dict[str, Any]:
        used: dict[str, Any] = {}
        for name in self.facts:
            if name not in self.layer_facts:
                if name in facts.values:
                    used[name] = plain(facts.values[name])
                continue
            groups: dict[str, tuple[Any, list[int]]] = {}
            for position, layer in enumerate(facts.runner_layer_values or ()):
                if name in layer:
                    index = layer.get("layer.index")
                    number = index if isinstance(index, int) else -1 - position
                    groups.setdefault(repr(layer[name]), (plain(layer[name]), []))[1].append(number)
            if groups:
                used[name] = {ranges(numbers): value for value, numbers in groups.values()}
        return used


class _Run:
    """One judgement: a gate against the values of one scope."""

    def __init__(self, feature: _Feature, facts: Facts, values: Values, layer: Readings | None) -> None:
        layers = facts.runner_layer_values
        self.feature = feature
        self.facts = facts
        self.layer = layer
        self.values: Values = values if layers is None else {**values, LAYERS: layers}

    def verdict(self, asked: _Asked, gate: _Gate | None, undecided: list[_Gate]) -> _Verdict:
        name = self.feature.feature.name
        if asked.forbidden:
            if asked.forced:
                return _Verdict("error", "request", f"Both forced and forbidden: unset {self._flags()}.")
            return _Verdict("off", "request", f"Forbidden by {self._flags(forbid=True)}.")
        if gate is None:
            if undecided:
                facts = sorted({n for g in undecided for n in facts_of(g.rule.applies_to) if n not in self.values})
                return _Verdict("pending", "no-gate", f"Which gate applies depends on {_listed(facts)}.")
            reason = self._gateless(name)
            return _Verdict("error" if asked.forced else "off", "no-gate", reason)
        required = gate.rule.request == "required"
        if required and not asked.forced and not asked.may_force:
            return _Verdict("off", "request", f"Off unless asked for; set {self._flags()}.")
        verdict = self._judged(asked, gate)
        if verdict.state == "on" and asked.unknown:
            return self._open(verdict)
        if verdict.state == "error" and required and not asked.forced:
            return self._open(verdict)
        return verdict

    def _open(self, verdict: _Verdict) -> _Verdict:
        """The same, but for a request that is not known yet."""
        reason = f"Whether it is asked for is not known yet: {self._flags()}."
        would_be = verdict.option if verdict.state == "on" else None
        return _Verdict("pending", "request", reason, would_be=would_be, outcomes=verdict.outcomes)

    def _flags(self, *, forbid: bool = False) -> str:
        request = self.feature.feature.request
        names = (request.forbid or request.fact,) if forbid else request.names
        return _listed([f"{n} = {_show(self.values.get(n))}" if n == request.fact else n for n in names])

    def _gateless(self, feature: str) -> str:
        family = self.feature.rules.families.get(str(self.values.get("model.family")))
        why = family.gateless.get(feature) if family else None
        return f"No gate for this model: {why}" if why else "No gate for this model."

    def _judged(self, asked: _Asked, gate: _Gate) -> _Verdict:
        judged = [one.judge(self.values, waive=asked.forced) for one in gate.requires]
        options = [
            (option, [one.judge(self.values, waive=asked.option == option.name) for one in requires])
            for option, requires in gate.options
        ]
        everything = [*judged, *(one for _, ones in options for one in ones)]
        outcomes = tuple(map(self._outcome, everything))
        verdict = self._from_requires(asked, judged) or (
            self._chosen(asked, gate, options) if options else self._on(gate, None, asked)
        )
        waived = [one.id for one in outcomes if one.state == "waived" and one.option in (None, verdict.option)]
        if verdict.state == "on" and waived:
            verdict = replace(verdict, reason=f"On by request, which waives {_listed(waived)}.")
        return replace(verdict, outcomes=outcomes)

    def _from_requires(self, asked: _Asked, judged: list[_Judged]) -> _Verdict | None:
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
                    return self._open(_Verdict("error"))
                return self._because("error", first)
        return self._because("pending", _first_unknown(unknown)) if unknown else None

    def _chosen(self, asked: _Asked, gate: _Gate, options: list[tuple[Option, list[_Judged]]]) -> _Verdict:
        """State 6: the first option that passes, or the one asked for by name."""
        if asked.option is not None:
            return self._asked_for(asked.option, gate, options, asked)
        unknown: list[_Judged] = []
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
            return self._open(_Verdict("error")) if asked.may_force and rescued else self._because("error", first)
        return self._because("off", first)

    def _asked_for(
        self, name: str, gate: _Gate, options: list[tuple[Option, list[_Judged]]], asked: _Asked
    ) -> _Verdict:
        """An option asked for by name: that one, pending while it is unknown, else an error that names what works."""
        judged = next((ones for option, ones in options if option.name == name), None)
        if judged is None:
            named = _listed([option.name for option, _ in options])
            return _Verdict("error", "request", f"`{name}` is no option of this gate, which has {named}.")
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

    def _on(self, gate: _Gate, option: Option | None, asked: _Asked) -> _Verdict:
        """State 7: on, unless an output has no value."""
        outputs: dict[str, Any] = {}
        missing: list[tuple[str, Missing, str]] = []
        for name, output in self.feature.feature.outputs.items():
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
                return _Verdict("error" if asked.forced else "off", f"output-{name}", reason)
            reason = f"Output `{name}` is not known yet: `{fact}` is unknown."
            return _Verdict("pending", f"output-{name}", reason, would_be=chosen)
        degraded = option.degraded if option else ""
        return _Verdict("on", option=chosen, degraded=degraded, outputs=tuple(outputs.items()))

    def otherwise(self) -> tuple[tuple[str, Any], ...]:
        return tuple((name, plain(output.otherwise)) for name, output in self.feature.feature.outputs.items())

    def _because(self, state: State, judged: _Judged, *, forced: bool = False) -> _Verdict:
        reason = self._sentence(judged.requirement.rule)
        if state == "pending":
            rule = judged.requirement.rule
            names = sorted(n for n in facts_of(All((rule.when, rule.that))) if not self._is_known(n))
            reason = f"Depends on {_listed(names)}, not known yet. {reason}"
        elif forced:
            reason += " A request does not waive this."
        return _Verdict(state, judged.requirement.rule.id, reason)

    def _is_known(self, name: str) -> bool:
        spec = self.feature.rules.catalogue[name]
        return all(f"{name}.{key}" in self.values for key in spec.fields) if spec.fields else name in self.values

    def _sentence(self, rule: Requirement) -> str:
        extra = {}
        if "{difference}" in rule.reason:
            extra["difference"] = difference(rule.that, self.values, self.feature.rules.catalogue)
        return fill(rule.reason, self.values, extra)

    def _outcome(self, judged: _Judged) -> Outcome:
        rule = judged.requirement.rule
        catalogue = self.feature.rules.catalogue
        return Outcome(
            id=rule.id,
            state=judged.state,
            was=judged.was,
            protects=rule.protects,
            option=judged.requirement.option,
            when=judged.when,
            reason="" if judged.state in ("passed", "not_applicable") else self._sentence(rule),
            where=f"{rule.where.file}:{rule.where.line}",
            checks=tuple(collect(All((rule.when, rule.that)), self.values, self.facts, self.layer, catalogue)),
        )


def _first_failed(failed: Sequence[_Judged]) -> _Judged:
    return min(failed, key=lambda one: one.requirement.rule.waivable)


def _first_unknown(unknown: Sequence[_Judged]) -> _Judged:
    return min(unknown, key=lambda one: (one.requirement.rule.waivable, one.when is not True))


def _layer_decision(own: Values, readings: Readings, verdict: _Verdict) -> LayerDecision:
    index, name = own.get("layer.index"), own.get("layer.name")
    return LayerDecision(
        index=index if isinstance(index, int) else None,
        name=name if isinstance(name, str) else None,
        role=str(readings["layer.role"].value),
        state=verdict.state,
        option=verdict.option,
        degraded=verdict.degraded,
        outputs=dict(verdict.outputs),
        decided_by=verdict.decided_by,
        reason=verdict.reason,
        outcomes=verdict.outcomes,
    )


def _combined(verdicts: list[_Verdict], layers: list[LayerDecision]) -> _Verdict:
    """Return the feature's own verdict over its layers; `verdicts` are the distinct ones, in layer order."""
    first = verdicts[0]
    if all(one.same(first) for one in verdicts):
        return first
    for one in verdicts:
        if one.state == "error":
            return one
    culprit = next((one for one in verdicts if one.state != "on"), first)
    groups: dict[tuple[State, str | None], list[int]] = {}
    for position, layer in enumerate(layers):
        groups.setdefault((layer.state, layer.option), []).append(position if layer.index is None else layer.index)
    parts = [f"{option or state} in {ranges(found)}" for (state, option), found in groups.items()]
    reason = f"{'; '.join(parts)}. {culprit.reason}".strip()
    return _Verdict("mixed", culprit.decided_by, reason, outcomes=culprit.outcomes)


def _facts_used(feature: Feature, gates: Sequence[Gate], rules: RuleSet) -> tuple[str, ...]:
    names = set(feature.request.names)
    for gate in gates:
        requires = [*gate.requires, *(one for option in gate.options for one in option.requires)]
        conditions = [gate.applies_to, *(c for one in requires for c in (one.when, one.that))]
        names |= facts_of(All(tuple(conditions)))
        for outputs in (gate.outputs, *(option.outputs for option in gate.options)):
            names |= {value.name for value in outputs.values() if isinstance(value, FactRef)}
    names |= {o.value.name for o in feature.outputs.values() if isinstance(o.value, FactRef)}
    expanded: set[str] = set()
    for name in names:
        fields = rules.catalogue[name].fields
        expanded |= {f"{name}.{key}" for key in fields} or {name}
    return tuple(sorted(expanded))


@lru_cache(maxsize=64)
def _compiled(rules: RuleSet) -> Mapping[str, _Feature]:
    return {name: _Feature(rules, feature) for name, feature in rules.features.items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _show(value: Any) -> str:
    return "unknown" if value is None else "none" if value is ABSENT else str(value)
