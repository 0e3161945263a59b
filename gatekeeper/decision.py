"""Outcome and Decision: what a feature came to and why, frozen, with a digest and a JSON form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from gatekeeper.errors import RefusedError
from gatekeeper.rules import Mode, Protects
from gatekeeper.source import nearest
from gatekeeper.values import Missing, Value, plain

State = Literal["on", "off", "mixed", "pending", "error"]
OutcomeState = Literal["passed", "failed", "unknown", "not_applicable", "waived"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One atomic condition as it was found."""

    fact: str
    actual: Value | Missing
    witness: str
    """Where the value was read: ``config.json: text_config.n_routed_experts``."""
    note: str
    operator: str
    expected: Any
    """As JSON has it; ``{"fact": name}`` for a comparison with another fact."""
    truth: bool | None
    where: str
    """``file:line`` of the rule."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; `known` tells an absent fact (`actual` null) from an unknown one."""
        missing = isinstance(self.actual, Missing)
        return {
            "fact": self.fact,
            "known": self.actual.value if isinstance(self.actual, Missing) else "known",
            "actual": None if missing else plain(self.actual),
            "witness": self.witness,
            "note": self.note,
            "operator": self.operator,
            "expected": self.expected,
            "truth": {True: "true", False: "false", None: "unknown"}[self.truth],
            "where": self.where,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one requirement came to."""

    id: str
    state: OutcomeState
    was: OutcomeState | None
    """Of a waived one, what it was: failed or unknown."""
    protects: Protects
    option: str | None
    """The option that demands it; None: the gate does."""
    when: bool | None
    reason: str
    where: str
    resolves_at: str | None
    """Of an unknown one: the stage of loading at which it is known."""
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "id": self.id,
            "state": self.state,
            "was": self.was,
            "protects": self.protects,
            "option": self.option,
            "reason": self.reason,
            "where": self.where,
            "resolves_at": self.resolves_at,
            "checks": [check.to_json() for check in self.checks],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDecision:
    """What a feature came to in one MoE layer."""

    index: int | None
    """Number of the layer in the checkpoint; None where it is unknown."""
    name: str | None
    role: str
    state: State
    option: str | None
    degraded: str
    outputs: Mapping[str, Any]
    decided_by: str | None
    reason: str
    outcomes: tuple[Outcome, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; the outcomes are those of the decision."""
        keys = ("index", "name", "role", "state", "option", "outputs", "decided_by", "reason")
        return {key: dict(self.outputs) if key == "outputs" else getattr(self, key) for key in keys}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What one feature came to for one runner, with everything that a reader needs to check it."""

    feature: str
    gate: str | None
    runner: str
    mode: Mode
    """`shadow`: true in all it says, and consumers see `in_force`, which is off."""
    request: str
    """What was asked: `auto on off both unknown`, or an option's name."""
    request_ignored: bool
    requested: bool
    state: State
    option: str | None
    degraded: str
    """What the user loses with a degraded option."""
    would_be: str | None
    """The option that a pending choice would take."""
    outputs: Mapping[str, Any] | None
    """As JSON has them; None where the decision is mixed: they are given by layer."""
    decided_by: str | None
    reason: str
    outcomes: tuple[Outcome, ...]
    """Over layers: those of the layer that made the state."""
    layers: tuple[LayerDecision, ...] | None
    """None where layers were not looked at."""
    assumed: Mapping[str, tuple[str, ...]]
    facts_used: Mapping[str, Any]
    """Name to value (absent: None; unknown ones left out); a layer fact by ranges of layers: ``{"1-60": "bf16"}``."""
    rule_set: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    """What an operator must know at every decision: protection of correctness that an overlay took away."""
    otherwise: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The outputs of the feature where it is not on."""
    unsettled: bool = field(default=False, repr=False)
    """Whether it may yet look otherwise to other features, which then know nothing of it."""

    @cached_property
    def in_force(self) -> Decision:
        """What consumers obey: this decision, or in shadow mode the same feature off."""
        if self.mode == "enforce":
            return self
        reason = f"In shadow mode: decided {self.option or self.state}, and not in force."
        off: dict[str, Any] = {
            "state": "off",
            "option": None,
            "degraded": "",
            "outputs": self.otherwise,
            "decided_by": "mode",
            "reason": reason,
        }
        layers = None if self.layers is None else tuple(replace(layer, **off) for layer in self.layers)
        return replace(self, mode="enforce", would_be=None, requested=False, layers=layers, **off)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what was decided from what; equal inputs give an equal digest on every rank and machine."""
        content = {
            "rule_set": self.rule_set["digest"],
            "feature": self.feature,
            "gate": self.gate,
            "runner": self.runner,
            "state": self.state,
            "option": self.option,
            "outputs": self.outputs,
            "layers": None if self.layers is None else [[one.index, one.role, one.state] for one in self.layers],
            "facts_used": self.facts_used,
        }
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def outcome_ids(self, state: OutcomeState) -> list[str]:
        """Return the ids of the requirements in a state, in file order, each once."""
        return list(dict.fromkeys(outcome.id for outcome in self.outcomes if outcome.state == state))

    def layer(self, index: int) -> LayerDecision:
        """Return the decision in layer `index`; raises `KeyError`."""
        for one in self.layers or ():
            if one.index == index:
                return one
        raise KeyError(index)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form of ``schema/decision.schema.json``."""
        return {
            "feature": self.feature,
            "gate": self.gate,
            "runner": self.runner,
            "mode": self.mode,
            "request": self.request,
            **({"request_ignored": True} if self.request_ignored else {}),
            "requested": self.requested,
            "state": self.state,
            "option": self.option,
            "degraded": self.degraded or None,
            "would_be": self.would_be,
            "outputs": None if self.outputs is None else dict(self.outputs),
            "decided_by": self.decided_by,
            "reason": self.reason,
            "outcomes": [outcome.to_json() for outcome in self.outcomes],
            "layers": None if self.layers is None else [layer.to_json() for layer in self.layers],
            "assumed": {key: list(names) for key, names in self.assumed.items()},
            "facts_used": dict(self.facts_used),
            "rule_set": dict(self.rule_set),
            "digest": self.digest,
            **({"warnings": list(self.warnings)} if self.warnings else {}),
        }


class Decisions(Mapping[str, Decision]):
    """The decisions of one runner, by feature."""

    def __init__(self, decisions: Mapping[str, Decision]) -> None:
        self._decisions = dict(decisions)

    def __getitem__(self, feature: str) -> Decision:
        if feature not in self._decisions:
            raise KeyError(f"no decision of `{feature}`{nearest(str(feature), self._decisions)}")
        return self._decisions[feature]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decisions)

    def __len__(self) -> int:
        return len(self._decisions)

    def require(self) -> None:
        """Raise `RefusedError` where a decision is an error, or a requested feature is still pending.

        Those in shadow mode are not in force and refuse nothing.
        """
        bad = [
            f"{one.feature}: {'refused' if one.state == 'error' else 'requested, but pending'}: {one.reason}"
            for one in (decision.in_force for decision in self.values())
            if one.state == "error" or (one.state == "pending" and one.requested)
        ]
        if bad:
            raise RefusedError("\n".join(bad))


def ranges(numbers: list[int]) -> str:
    """Return numbers as a person lists them: ``1-60, 62``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
