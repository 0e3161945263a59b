"""Features decided for a model or layer by layer, and one event logged for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from gatekeeper import log
from gatekeeper.asked import Asked, read_request
from gatekeeper.conditions import places
from gatekeeper.decision import Decision, Decisions, LayerDecision, State, ranges
from gatekeeper.errors import FactError
from gatekeeper.fact_spec import FEATURE_GROUP
from gatekeeper.facts import Facts
from gatekeeper.feature_facts import came_to
from gatekeeper.judge import CompiledGate, Judge, Verdict
from gatekeeper.rules import Feature, Gate, RuleSet
from gatekeeper.source import nearest
from gatekeeper.values import Readings, Values, plain


def decide(rules: RuleSet, facts: Facts, features: Iterable[str] | None = None) -> Decisions:
    """Decide every feature of a rule set (or those named), and log one event each.

    Raises `FactError` where a named feature does not exist, and for facts that were read without some that these rules
    ask for.
    """
    if isinstance(features, str):
        raise FactError(f"`features` is the text `{features}`; expected a list of names, such as [`{features}`]")
    names = list(rules.features if features is None else features)
    for name in names:
        if name not in rules.features:
            raise FactError(f"unknown feature `{name}`{nearest(name, rules.features)}")
    _require_same_facts(rules, facts, names)
    decided = _decided(rules, facts, names)
    decisions = {}
    for name in sorted(names):
        decisions[name] = decided[name]
        if decided[name].state == "error":
            # Whoever only decides does without the search.
            from gatekeeper.analysis.changes import with_remedies

            decisions[name] = with_remedies(decided[name], facts, partial(decide_again, rules, name))
        log.decided(decisions[name])
    return Decisions(decisions)


def _require_same_facts(rules: RuleSet, facts: Facts, names: Iterable[str]) -> None:
    """A fact that nobody looked for would stay unknown for ever."""
    if facts.catalogue is rules.catalogue:
        return
    compiled = _compiled(rules)
    asked = rules.catalogue.inputs(fact for name in names for fact in compiled[name].facts)
    lacking = sorted(
        name for name in asked if name not in facts.catalogue and rules.catalogue[name].group != FEATURE_GROUP
    )
    if lacking:
        raise FactError(
            f"these facts were read without {_few(lacking)}, which the rule set `{rules.name}` asks for; read them "
            "with it: `read_facts(…, rules=rules)`"
        )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def _decided(rules: RuleSet, facts: Facts, names: Iterable[str]) -> dict[str, Decision]:
    """Decide some features, and before them those that their gates read."""
    compiled = _compiled(rules)
    read = rules.catalogue.inputs(fact for name in names for fact in compiled[name].facts)
    needed = {fact.split(".")[1] for fact in read if fact.startswith(f"{FEATURE_GROUP}.")}
    decided: dict[str, Decision] = {}
    for name in rules.order:
        if name in needed or name in names:
            decided[name] = compiled[name].decide(facts)
        if name in needed:
            facts = facts.with_decided(*came_to(decided[name], rules.features[name].outputs))
    return decided


def decide_again(rules: RuleSet, name: str, facts: Facts) -> Decision:
    """Decide one feature, and what it depends on, without an event and without what would help an error."""
    return _decided(rules, facts, [name])[name]


class _Feature:
    """One feature with its gates, compiled."""

    def __init__(self, rules: RuleSet, feature: Feature) -> None:
        self.rules = rules
        self.feature = feature
        self.gates = [CompiledGate(rules, gate) for gate in rules.gates[feature.name]]
        self.facts = _fields(rules.catalogue.decided_from[feature.name], rules)
        self.layer_facts = tuple(filter(self._is_by_layer, self.facts))
        told = _facts_told(rules.gates[feature.name], rules)
        self.layer_key = (*self.layer_facts, *filter(self._is_by_layer, told))
        """Layers that agree in these are decided once: what is tested, and what a reason tells."""

    def _is_by_layer(self, name: str) -> bool:
        if name.startswith(f"{FEATURE_GROUP}."):
            return self.feature.scope == self.rules.features[name.split(".")[1]].scope == "layer"
        return self.rules.catalogue.is_layer_fact(name)

    def decide(self, facts: Facts) -> Decision:
        asked = read_request(self.feature.request, facts.values)
        gate, undecided = self._select(facts.values)
        ignored = gate is not None and gate.rule.request == "ignored" and asked.forced
        if gate is not None and gate.rule.request == "ignored":
            asked = asked.ignored()
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
            mode=(gate.rule.mode if gate else None) or self.feature.mode,
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
            warnings=gate.rule.warnings if gate else (),
            otherwise={name: plain(output.otherwise) for name, output in self.feature.outputs.items()},
            unsettled=self._unsettled(verdict.state, asked, gate, undecided, listed=layers is not None),
        )

    def _unsettled(
        self, state: State, asked: Asked, gate: CompiledGate | None, undecided: Sequence[CompiledGate], *, listed: bool
    ) -> bool:
        """Say whether what others see may yet change: what is asked, the mode, or an error before layers are known."""
        modes = {one.rule.mode or self.feature.mode for one in ((gate,) if gate else undecided)}
        modes |= set() if gate else {self.feature.mode}
        if modes == {"shadow"}:
            return False  # off for others, whatever comes of it
        # Without MoE layers an error that nobody forced is off.
        may_be_off = self.feature.scope == "layer" and not listed and state == "error" and not asked.forced
        # Forced without layers is an error, unless the gate turns out to ignore what is asked for.
        ignoring = state == "error" and asked.forced and any(one.rule.request == "ignored" for one in undecided)
        return asked.unknown or may_be_off or ignoring or ("shadow" in modes and state != "off")

    def _select(self, values: Values) -> tuple[CompiledGate | None, list[CompiledGate]]:
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
        self, asked: Asked, gate: CompiledGate | None, undecided: list[CompiledGate], facts: Facts
    ) -> Callable[[Values, Readings | None], Verdict]:
        def judge(values: Values, layer: Readings | None) -> Verdict:
            run = Judge(self.rules, self.feature, facts, values, layer)
            verdict = run.verdict(asked, gate, undecided)
            if verdict.state != "on":
                verdict = replace(verdict, outputs=run.otherwise())
            return verdict

        return judge

    def _over_layers(
        self, judge: Callable[[Values, Readings | None], Verdict], asked: Asked, facts: Facts
    ) -> tuple[Verdict, tuple[LayerDecision, ...] | None]:
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
        cache: dict[tuple[Any, ...], Verdict] = {}
        layers = []
        for readings, own in zip(facts.runner_layers, facts.runner_layer_values, strict=True):
            key = tuple(own.get(name) for name in self.layer_key)
            if key not in cache:
                cache[key] = judge({**facts.values, **own}, readings)
            layers.append(_layer_decision(own, readings, cache[key]))
        return _combined(list(cache.values()), layers), tuple(layers)

    def _none(self, asked: Asked, state: State, reason: str) -> Verdict:
        outputs = tuple((name, plain(o.otherwise)) for name, o in self.feature.outputs.items())
        return Verdict(state, "layers", reason, outputs=outputs)

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
            if (
                not groups and name in facts.values
            ):  # the layers are not known, and of another feature it is all the same
                used[name] = plain(facts.values[name])
            elif groups:
                used[name] = {ranges(numbers): value for value, numbers in groups.values()}
        return used


def _layer_decision(own: Values, readings: Readings, verdict: Verdict) -> LayerDecision:
    index, name = own.get("layer.index"), own.get("layer.name")
    return LayerDecision(
        index=index if isinstance(index, int) else None,
        name=name if isinstance(name, str) else None,
        role=str(readings["layer.role"].value) if "layer.role" in readings else "main",
        state=verdict.state,
        option=verdict.option,
        degraded=verdict.degraded,
        outputs=dict(verdict.outputs),
        decided_by=verdict.decided_by,
        reason=verdict.reason,
        outcomes=verdict.outcomes,
    )


def _combined(verdicts: list[Verdict], layers: list[LayerDecision]) -> Verdict:
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
    return Verdict("mixed", culprit.decided_by, reason, outcomes=culprit.outcomes)


def _facts_told(gates: Sequence[Gate], rules: RuleSet) -> tuple[str, ...]:
    told = {name for gate in gates for one in gate.demands for name in places(one.reason)}
    return _fields(told & rules.catalogue.keys(), rules)


def _fields(names: Iterable[str], rules: RuleSet) -> tuple[str, ...]:
    """Return names sorted, a record's replaced by those of its fields."""
    expanded: set[str] = set()
    for name in names:
        fields = rules.catalogue[name].fields
        expanded |= {f"{name}.{key}" for key in fields} or {name}
    return tuple(sorted(expanded))


@lru_cache(maxsize=64)
def _compiled(rules: RuleSet) -> Mapping[str, _Feature]:
    return {name: _Feature(rules, feature) for name, feature in rules.features.items()}
