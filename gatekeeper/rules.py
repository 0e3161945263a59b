"""What a rule set declares, as frozen values: features, gates, requirements, options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gatekeeper.catalogue import Catalogue
from gatekeeper.conditions import ALWAYS, Condition, FactRef
from gatekeeper.errors import Where
from gatekeeper.fact_spec import FactSpec
from gatekeeper.families import Family
from gatekeeper.formats import Format
from gatekeeper.values import ABSENT, Missing, Value
from gatekeeper.waivers import Waiver

Protects = Literal["correctness", "support", "speed"]
OnFailure = Literal["off", "error"]
RequestRule = Literal["honoured", "ignored", "required"]
Mode = Literal["enforce", "shadow"]
Stage = Literal["config", "checkpoint", "platform", "layout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedCondition:
    """A condition of conditions.yaml."""

    name: str
    doc: str
    that: Condition
    allow: tuple[Waiver, ...] = ()
    where: Where


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One named demand; it holds where `not when or that` does."""

    id: str
    protects: Protects
    when: Condition = ALWAYS
    that: Condition
    reason: str
    """Template: ``With 384 experts ... not with {quant.method}.``"""
    on_failure: OnFailure = "off"
    at: Stage | None = None
    """It must be decidable at this stage of loading."""
    shared: str = ""
    """Name of the shared requirement that the gate takes."""
    refs: tuple[str, ...] = ()
    allow: tuple[Waiver, ...] = ()
    where: Where
    """Where the gate takes it (a shared requirement: its `use`)."""

    @property
    def waivable(self) -> bool:
        return self.protects != "correctness"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One of a gate's ordered choices."""

    name: str
    requires: tuple[Requirement, ...] = ()
    outputs: Mapping[str, Value | FactRef] = field(default_factory=dict)
    degraded: str = ""
    refs: tuple[str, ...] = ()
    allow: tuple[Waiver, ...] = ()
    where: Where


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What consumers read beside the state."""

    name: str
    spec: FactSpec
    """Its type, as a fact for other gates."""
    doc: str = ""
    value: Value | FactRef | Missing = ABSENT
    """`ABSENT`: the gate or the option gives it."""
    otherwise: Value | Missing = ABSENT
    """In any state but on; `ABSENT` is JSON's null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How an operator asks for a feature: one fact, or two flags."""

    fact: str = ""
    force: str = ""
    forbid: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.fact, self.force, self.forbid) if name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """What can be on or off, or which of several options is used."""

    name: str
    summary: str
    scope: Literal["model", "layer"] = "model"
    request: Request = Request()
    mode: Mode = "enforce"
    outputs: Mapping[str, Output] = field(default_factory=dict)
    refs: tuple[str, ...] = ()
    allow: tuple[Waiver, ...] = ()
    where: Where


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What decides a feature for the models it applies to."""

    feature: str
    name: str
    """The feature's name where it was left out."""
    applies_to: Condition = ALWAYS
    request: RequestRule = "honoured"
    mode: Mode | None = None
    """None: the feature's."""
    on_failure: OnFailure = "off"
    requires: tuple[Requirement, ...] = ()
    options: tuple[Option, ...] = ()
    outputs: Mapping[str, Value | FactRef] = field(default_factory=dict)
    refs: tuple[str, ...] = ()
    allow: tuple[Waiver, ...] = ()
    warnings: tuple[str, ...] = ()
    """What an operator must know at every decision: protection that an overlay took away."""
    where: Where

    @property
    def demands(self) -> tuple[Requirement, ...]:
        """The gate's requirements and those of all its options."""
        return (*self.requires, *(one for option in self.options for one in option.requires))


@dataclass(frozen=True, kw_only=True, eq=False)
class RuleSet:
    """Gates, catalogue, families and formats under one manifest, with one digest over their content."""

    name: str
    version: str
    digest: str
    catalogue: Catalogue
    features: Mapping[str, Feature]
    gates: Mapping[str, tuple[Gate, ...]]
    """By feature; every feature is there."""
    order: tuple[str, ...]
    """The features, each after those that its gates read."""
    conditions: Mapping[str, NamedCondition]
    requirements: Mapping[str, Requirement]
    """The shared ones, by name."""
    used: frozenset[str]
    """Names of conditions and of shared requirements that something takes: ``condition own-loader``."""
    files: frozenset[str]
    """Files of the rule set itself and of its overlays, without those of a base."""
    families: Mapping[str, Family]
    formats: Mapping[str, Format]
    platforms: Mapping[str, Mapping[str, Value]]
    """Preset name to facts, as raw values: ``{"h200": {"platform.vendor": "cuda", ...}}``."""
    layouts: Mapping[str, Mapping[str, Value]]
