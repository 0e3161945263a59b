"""Decisions without their evidence, for those who make millions: the state, or the state of each requirement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from gatekeeper.asked import Asked, read_request
from gatekeeper.compile import compile_condition
from gatekeeper.compile_gate import compile_reasons, compile_requires, formula
from gatekeeper.conditions import All, FactRef
from gatekeeper.decision import OutcomeState, State
from gatekeeper.evidence import sentence
from gatekeeper.rules import Feature, Gate, Option, RuleSet
from gatekeeper.values import ABSENT, Values

Finding: TypeAlias = tuple[str, OutcomeState, str, Mapping[str, Any] | None]
"""A requirement's id, its state, and unless it passed or does not apply its reason and the facts it tested (unknown
ones None)."""


class CompiledFeature:
    """One feature as functions of the values of one scope: those of the whole model, and of a layer where one is asked.

    Values are as `Facts.values` has them: typed, complete with defaults and derived facts, a missing key unknown. What
    a feature comes to over all layers is `decide`'s to say.
    """

    def __init__(self, rules: RuleSet, name: str) -> None:
        self._request = rules.features[name].request
        self._gates = [_Gate(rules, rules.features[name], gate) for gate in rules.gates[name]]

    def state(self, values: Values) -> State:
        """Return the state alone."""
        return self.choice(values)[0]

    def choice(self, values: Values) -> tuple[State, str | None]:
        """Return the state and the option chosen."""
        asked = read_request(self._request, values)
        if asked.forbidden:
            return ("error", None) if asked.forced else ("off", None)
        undecided = False
        for gate in self._gates:
            applies = gate.applies(values)
            if applies:
                return gate.choice(values, asked)
            undecided |= applies is None
        if undecided:
            return "pending", None
        return ("error", None) if asked.forced else ("off", None)

    def reasons(self, values: Values) -> list[Finding]:
        """Return what each requirement came to, in file order; empty where they are not asked."""
        asked = read_request(self._request, values)
        if not asked.forbidden:
            for gate in self._gates:
                if gate.applies(values):
                    return gate.findings(values, asked)
        return []


class _Gate:
    def __init__(self, rules: RuleSet, feature: Feature, gate: Gate) -> None:
        self.applies = compile_condition(gate.applies_to, rules.catalogue)
        self._rules = rules
        self._gate = gate
        self._ignores, self._waits = gate.request == "ignored", gate.request == "required"
        given = {name: output.value for name, output in feature.outputs.items()} | dict(gate.outputs)
        self._options = [_Choice(rules, option, given) for option in gate.options]
        self._outputs = _facts(given)

    @cached_property
    def _requires(self) -> Any:
        return compile_requires(self._gate.requires, self._rules.catalogue)

    @cached_property
    def _reasons(self) -> Any:
        demands: list[tuple[Any, str | None]] = [(one, None) for one in self._gate.requires]
        demands += [(one, option.name) for option in self._gate.options for one in option.requires]
        catalogue = self._rules.catalogue
        return compile_reasons(demands, lambda rule, values: sentence(rule, values, catalogue), catalogue)

    def findings(self, values: Values, asked: Asked) -> list[Finding]:
        if self._ignores:
            asked = asked.ignored()
        if self._waits and not asked.forced and not asked.may_force:
            return []
        return self._reasons(values, asked.forced, asked.option)  # type: ignore[no-any-return]

    def choice(self, values: Values, asked: Asked) -> tuple[State, str | None]:
        """Return the state and option of a gate that applies: lines 3 to 7 of the design's states."""
        if self._ignores:
            asked = asked.ignored()
        if self._waits and not asked.forced and not asked.may_force:
            return "off", None
        found = self._judged(values, asked)
        if (asked.unknown and found[0] == "on") or (self._waits and not asked.forced and found[0] == "error"):
            return "pending", None
        return found

    def _judged(self, values: Values, asked: Asked) -> tuple[State, str | None]:
        state = self._requires(values, asked.forced)
        if state is None:
            return self._chosen(values, asked) if self._options else _on(self._outputs, None, values, asked)
        if state == "waivable" and asked.may_force:
            return "pending", None
        return state if state in ("off", "pending") else "error", None

    def _chosen(self, values: Values, asked: Asked) -> tuple[State, str | None]:
        """Line 6: the option asked for by name, or the first that passes with nothing unknown before it."""
        if asked.option is not None:
            named = next((one for one in self._options if one.name == asked.option), None)
            truth = named is not None and named.hard(values)
            if named is not None and truth:
                return _on(named.outputs, named.name, values, asked)
            return "pending" if truth is None else "error", None
        unknown = False
        for option in self._options:
            truth = option.passes(values)
            if truth:
                return ("pending", None) if unknown else _on(option.outputs, option.name, values, asked)
            unknown |= truth is None
        if unknown:
            return "pending", None
        if asked.forced:
            return "error", None
        if self._gate.on_failure == "off":
            return "off", None
        rescued = asked.may_force and any(one.hard(values) is not False for one in self._options)
        return "pending" if rescued else "error", None


class _Choice:
    def __init__(self, rules: RuleSet, option: Option, given: Mapping[str, Any]) -> None:
        self.name = option.name
        self.outputs = _facts({**given, **option.outputs})
        hard = tuple(formula(one) for one in option.requires if not one.waivable)
        self.hard = compile_condition(All(hard), rules.catalogue)
        self.passes = compile_condition(All(tuple(map(formula, option.requires))), rules.catalogue)


def _facts(given: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(one.name for one in given.values() if isinstance(one, FactRef))


def _on(outputs: Sequence[str], option: str | None, values: Values, asked: Asked) -> tuple[State, str | None]:
    """Line 7: on, unless an output has no value; what is absent is final, so it counts first."""
    unknown = False
    for name in outputs:
        value = values.get(name)
        if value is ABSENT:
            return "error" if asked.forced else "off", None
        unknown |= value is None
    return ("pending", None) if unknown else ("on", option)
