"""What a lint finds, and the requirements of a rule set with all that stands around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gatekeeper.errors import Where
from gatekeeper.rules import Feature, Gate, Option, Requirement, RuleSet
from gatekeeper.waivers import Waiver


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One suspicion, and the waivers that stand where it arises."""

    message: str
    where: Where
    allow: tuple[Waiver, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A requirement where a gate has it."""

    requirement: Requirement
    gate: Gate
    feature: Feature
    option: Option | None = None

    @property
    def allow(self) -> tuple[Waiver, ...]:
        """Return the waivers of the requirement and of all around it."""
        around = () if self.option is None else self.option.allow
        return (*self.requirement.allow, *around, *gate_waivers(self.gate, self.feature))

    @property
    def refs(self) -> tuple[str, ...]:
        """Return the references of the requirement and of all around it."""
        around = () if self.option is None else self.option.refs
        return (*self.requirement.refs, *around, *self.gate.refs, *self.feature.refs)


def demands(rules: RuleSet) -> Iterator[Demand]:
    """Yield every requirement of every gate; a shared one once for each gate that takes it."""
    for gate, feature in gates(rules):
        for requirement in gate.requires:
            yield Demand(requirement=requirement, gate=gate, feature=feature)
        for option in gate.options:
            for requirement in option.requires:
                yield Demand(requirement=requirement, gate=gate, feature=feature, option=option)


def gates(rules: RuleSet) -> Iterator[tuple[Gate, Feature]]:
    """Yield every gate with its feature."""
    for name, found in rules.gates.items():
        for gate in found:
            yield gate, rules.features[name]


def gate_waivers(gate: Gate, feature: Feature) -> tuple[Waiver, ...]:
    """Return the waivers that hold for all of a gate; one that stands in its feature's file has its waivers there."""
    return (*gate.allow, *feature.allow)


def place(requirement: Requirement, rules: RuleSet) -> Where:
    """Return where a requirement is written: of a shared one, not where a gate takes it."""
    return rules.requirements[requirement.shared].where if requirement.shared else requirement.where
