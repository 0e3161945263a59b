"""What a pending decision waits for: the unknown facts, how each is given, and the answers that turn it on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gatekeeper.analysis.changes import Again, Found, Move, Search
from gatekeeper.analysis.provenance import Scope
from gatekeeper.catalogue import STAGES
from gatekeeper.decision import Decision
from gatekeeper.fact_spec import FactSpec
from gatekeeper.facts import Facts
from gatekeeper.providers.flags import SETTABLE_GROUPS
from gatekeeper.providers.platform import read_platform
from gatekeeper.rules import RuleSet
from gatekeeper.values import UNKNOWN, Missing, shown

PLATFORM_AXIS = "--platform"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One fact that is not known, and how to make it known."""

    fact: str
    """Its name; `layers` for the list of the MoE layers."""
    doc: str
    stage: str
    """The stage of loading from which on it can be known."""
    note: str
    """Why it is unknown, where that is worth telling."""
    given_by: tuple[str, ...]
    """What an operator types: `--platform here`, `--set parallel.tp_size=…`; empty where nothing does."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "fact": self.fact,
            "doc": self.doc,
            "stage": self.stage,
            "note": self.note,
            "given_by": list(self.given_by),
        }


def questions(rules: RuleSet, scope: Scope, names: Iterable[str]) -> Iterator[Question]:
    """Yield the unknown facts among `names` and what those are derived from, earliest stage first."""
    catalogue = rules.catalogue
    if scope.facts.runner_layers is None and any(catalogue.is_layer_fact(name) for name in names):
        yield Question(
            fact="layers",
            doc="The MoE layers, each with its storage.",
            stage="checkpoint",
            note=scope.facts.layers_note,
            given_by=(),
        )
        names = [name for name in names if not catalogue.is_layer_fact(name)]
    roots = [name for name in sorted(catalogue.inputs(names)) if scope.is_root(name)]
    unknown = [name for name in roots if scope.reading(name).value is UNKNOWN]
    for name in sorted(unknown, key=lambda one: STAGES.index(catalogue.stage_of(one))):
        yield Question(
            fact=name,
            doc=catalogue[name].doc,
            stage=catalogue.stage_of(name),
            note=scope.reading(name).note,
            given_by=tuple(_ways(catalogue[name])),
        )


def _ways(spec: FactSpec) -> Iterator[str]:
    if "platform" in spec.given_by:
        yield "--platform NAME|here"
    elif {"library", "environment"} & set(spec.given_by):
        yield "--platform here"
    if spec.group in SETTABLE_GROUPS and not spec.only_derived:
        yield f"--set {spec.name}={_example(spec)}"


def _example(spec: FactSpec) -> str:
    values = spec.controllable or spec.values or ((True, False) if spec.type == "boolean" else ())
    return "|".join(map(shown, values)) if 0 < len(values) <= 6 else f"<{spec.type}>"


def answers(rules: RuleSet, facts: Facts, decision: Decision, again: Again) -> Found:
    """Search the answers to what is unknown that turn the feature on; what is known stays as it is."""
    constants = _constants(decision)
    presets = (
        _presets(rules) if all(_is_unknown(facts, n) for n in facts.catalogue if n.startswith("platform.")) else []
    )

    def moves(name: str) -> Iterator[Move]:
        spec = facts.catalogue[name]
        if spec.only_derived or spec.fields or spec.group not in SETTABLE_GROUPS or not _is_unknown(facts, name):
            return
        if spec.group == "platform" and presets:
            yield from presets
            return
        values = spec.controllable or spec.values or ((True, False) if spec.type == "boolean" else ())
        for raw in values or spec.known_values or constants.get(name, ()):
            value = spec.coerce(raw)
            yield Move(name, value, ((name, value),))

    return Search(rules, facts, decision, again, moves).run()


def _is_unknown(facts: Facts, name: str) -> bool:
    return facts.reading(name).value is UNKNOWN


def _presets(rules: RuleSet) -> list[Move]:
    found = []
    for preset in sorted(rules.platforms):
        readings = read_platform(preset, rules.platforms, rules.catalogue)
        sets = {
            name: one.value if isinstance(one.value, Missing) else rules.catalogue.coerce(name, one.value)
            for name, one in readings.items()
        }
        found.append(Move(PLATFORM_AXIS, preset, tuple(sets.items())))
    return found


def _constants(decision: Decision) -> dict[str, list[Any]]:
    """Return what the rules compare facts with, where they pass with just that: values worth trying."""
    found: dict[str, list[Any]] = {}
    for outcomes in (decision.outcomes, *(layer.outcomes for layer in decision.layers or ())):
        for check in (check for one in outcomes for check in one.checks):
            if check.operator in ("eq", "ge", "le") and not isinstance(check.expected, dict):
                found.setdefault(check.fact, []).append(check.expected)
            elif check.operator == "in" and isinstance(check.expected, list):
                found.setdefault(check.fact, []).extend(check.expected)
    return found
