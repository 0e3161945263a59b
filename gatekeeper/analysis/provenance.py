"""What a decision rests on: every fact with its value, where that was read, and what it was derived from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gatekeeper.decision import Decision, ranges
from gatekeeper.fact_spec import FEATURE_GROUP, FactSpec
from gatekeeper.facts import Facts
from gatekeeper.values import ABSENT, UNKNOWN, Missing, Reading, Readings, plain

WHO_SAYS = {
    "headers": "the checkpoint",
    "config": "the model's config",
    "platform": "the machine",
    "library": "the machine",
    "environment": "the machine",
    "family": "the engine",
    "engine": "the engine",
}
"""Of what a fact is given by, the one who answers for it; the first that is named counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One fact that a decision rests on."""

    name: str
    doc: str
    stage: str
    controllable: bool
    said_by: str
    """Who answers for it: ``the checkpoint``."""
    readings: tuple[tuple[str | None, Reading], ...]
    """By ranges of layers (``3-60``), or one for the whole model (None)."""
    derived: str
    """The expression that gave the value, or nothing."""
    inputs: tuple[str, ...]
    """Facts in that expression."""

    @property
    def is_default(self) -> bool:
        return any(reading.witness in ("default", "not set") for _, reading in self.readings)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "name": self.name,
            "doc": self.doc,
            "stage": self.stage,
            "controllable": self.controllable,
            "said_by": self.said_by,
            "readings": [{"layers": layers, **reading_json(reading)} for layers, reading in self.readings],
            "derived": self.derived or None,
            "inputs": list(self.inputs),
        }


def reading_json(reading: Reading) -> dict[str, Any]:
    """Return the JSON form of what is known of a fact."""
    value = reading.value
    missing = isinstance(value, Missing)
    return {
        "known": value.value if isinstance(value, Missing) else "known",
        "value": None if missing else plain(value),
        "witness": reading.witness,
        "note": reading.note,
    }


class Scope:
    """The facts as one decision saw them: in the layer that made its state, where there are layers."""

    def __init__(self, facts: Facts, decision: Decision) -> None:
        self.facts = facts
        self._decision = decision
        layers = facts.runner_layers or ()
        decided = decision.layers or ()
        culprits = (layer for layer, one in zip(layers, decided, strict=False) if one.state != "on")
        self._layer = next(culprits, layers[0] if layers else None)

    def reading(self, name: str) -> Reading:
        """Return what is known of a fact; of a record, what is known of its fields."""
        return self._read(name, self._layer)

    def _read(self, name: str, layer: Readings | None) -> Reading:
        fields = self.facts.catalogue[name].fields
        if not fields:
            return self._one(name, layer)
        parts = {key: self._one(f"{name}.{key}", layer) for key in fields}
        first = next((part for part in parts.values() if part.witness or part.note), Reading(UNKNOWN))
        if any(part.value is UNKNOWN for part in parts.values()):
            return Reading(UNKNOWN, first.witness, first.note)
        if all(part.value is ABSENT for part in parts.values()):
            return Reading(ABSENT, first.witness, first.note)
        return Reading({key: part.value for key, part in parts.items()}, first.witness, first.note)  # type: ignore[misc]

    def _one(self, name: str, layer: Readings | None) -> Reading:
        if not name.startswith(f"{FEATURE_GROUP}."):
            return self.facts.reading(name, layer)
        if name not in self._decision.facts_used:
            return Reading(UNKNOWN)
        value = self._decision.facts_used[name]
        if isinstance(value, dict):  # by ranges of layers
            value = next(iter(value.values()))
        return Reading(ABSENT if value is None else value, "decided")

    def tell(self, names: Iterable[str]) -> Iterator[Told]:
        """Yield facts, each once and before those that it is derived from."""
        done: set[str] = set()
        left = list(names)
        while left:
            name = left.pop(0)
            if name in done:
                continue
            done.add(name)
            told = self._told(name)
            left[:0] = told.inputs
            yield told

    def _told(self, name: str) -> Told:
        spec = self.facts.catalogue[name]
        expression = spec.derive or spec.default_derive
        readings = tuple(self._by_layer(name))
        derived = expression is not None and any(one.witness.startswith("derived: ") for _, one in readings)
        return Told(
            name=name,
            doc=spec.doc,
            stage=self.facts.catalogue.stage_of(name),
            controllable=bool(spec.controllable),
            said_by=who_says(spec),
            readings=readings,
            derived=expression.text if expression and derived else "",
            inputs=tuple(sorted(expression.names)) if expression and derived else (),
        )

    def _by_layer(self, name: str) -> Iterator[tuple[str | None, Reading]]:
        layers = self.facts.runner_layers
        if not self.facts.catalogue.is_layer_fact(name) or not layers:
            yield None, self.reading(name)
            return
        groups: dict[str, tuple[Reading, list[int]]] = {}
        for position, layer in enumerate(layers):
            reading = self._read(name, layer)
            index = layer["layer.index"].value if "layer.index" in layer else position
            number = index if isinstance(index, int) else position
            groups.setdefault(repr((reading.value, reading.witness)), (reading, []))[1].append(number)
        for reading, numbers in groups.values():
            yield ranges(numbers), reading

    def is_root(self, name: str) -> bool:
        """Whether a fact is given, and not derived from others or decided."""
        spec = self.facts.catalogue[name]
        return not spec.only_derived and spec.group != FEATURE_GROUP

    def roots(self, name: str) -> list[str]:
        """Return the given facts that one is derived from; what a feature came to stands for itself."""
        if self.facts.catalogue[name].group == FEATURE_GROUP:
            return [name]
        return [one for one in sorted(self.facts.catalogue.inputs([name])) if self.is_root(one)]


def who_says(spec: FactSpec) -> str:
    """Say who answers for a fact."""
    if spec.group == FEATURE_GROUP:
        return f"feature `{spec.name.split('.')[1]}`"
    return next((who for source, who in WHO_SAYS.items() if source in spec.given_by), "the caller")
