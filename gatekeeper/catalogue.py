"""The catalogue: every fact by name, when it can be known, and what it comes to where nobody gave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeAlias

from gatekeeper.errors import FactError
from gatekeeper.expressions import Expression
from gatekeeper.fact_spec import FEATURE_GROUP, FactSpec
from gatekeeper.source import nearest
from gatekeeper.values import ABSENT, UNKNOWN, Missing, Reading, Readings, Value

Records: TypeAlias = Mapping[str, tuple[str, ...]]
"""Fields of each fact that is a record."""
STAGES = ("config", "checkpoint", "platform", "layout")
"""When facts can be known, in order; where the catalogue does not say, the group does."""
_STAGE_OF = {"model": 0, "quant": 0, "layer": 1, "platform": 2, "library": 2, "env": 2}


class Catalogue(Mapping[str, FactSpec]):
    """Every fact by name; a record's fields are facts too."""

    def __init__(self, specs: Mapping[str, FactSpec]) -> None:
        self._specs = dict(specs)
        for spec in specs.values():
            self._specs |= {f"{spec.name}.{key}": one for key, one in spec.fields.items()}
        self._records: Records = {name: tuple(spec.fields) for name, spec in specs.items() if spec.fields}
        self._order = _evaluation_order(self._specs)
        self._layer_facts = _layer_dependent(self._specs, self._order)
        self.decided_from: Mapping[str, frozenset[str]] = {}
        """Of each feature, the facts that its gates read; known once they are parsed."""
        self.compiled: dict[Any, Callable[..., Any]] = {}
        """Conditions as functions, each compiled when it is first asked (compile.py)."""

    def __getitem__(self, name: str) -> FactSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def is_layer_fact(self, name: str) -> bool:
        """Whether a fact differs from layer to layer: `layer.*`, and what is derived from it."""
        return name in self._layer_facts

    def inputs(self, names: Iterable[str]) -> frozenset[str]:
        """Return facts with all that they are derived from."""
        found: set[str] = set()
        left = list(names)
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += dependencies(self._specs, name)
                if name.startswith(f"{FEATURE_GROUP}."):
                    left += self.decided_from.get(name.split(".")[1], ())
        return frozenset(found)

    def stage_of(self, name: str) -> str:
        """Return the stage of loading at which a fact can be known at the earliest; see `STAGES`."""
        return STAGES[max(self._own_stage(one) for one in self.inputs([name]))]

    def _own_stage(self, name: str) -> int:
        spec = self._specs[name]
        if spec.stage:
            return STAGES.index(spec.stage)
        if spec.only_derived or spec.group == FEATURE_GROUP:
            return 0  # what it comes from says when
        return _STAGE_OF.get(spec.group, len(STAGES) - 1)

    def coerce(self, name: str, raw: Any) -> Value:
        """Return a raw value as the type of the fact `name`; raises `FactError`."""
        if name not in self._specs:
            raise FactError(f"unknown fact `{name}`{nearest(name, self._specs)}")
        try:
            return self._specs[name].coerce(raw)
        except ValueError as error:
            raise FactError(f"`{name}`: {error}") from None

    def complete(self, given: Readings, layers: list[Readings] | None, flags: frozenset[str]) -> _Completed:
        """Add defaults, derived facts and what the engine resolved.

        `flags` are the groups whose flags were looked at: one of theirs that is not in `given` was not set.
        """
        readings = _expand_records(self, given)
        for name in self._order:
            if name not in self._layer_facts:
                self._settle(name, readings, flags)
        completed = []
        for layer in layers or []:
            own = dict(_expand_records(self, layer))
            scope = {**readings, **own}
            for name in self._order:
                if name in self._layer_facts:
                    self._settle(name, scope, flags)
            completed.append({name: scope[name] for name in scope if name in self._layer_facts})
        return _Completed(readings, None if layers is None else tuple(completed))

    def _settle(self, name: str, readings: dict[str, Reading], flags: frozenset[str]) -> None:
        spec = self._specs[name]
        reading = readings.get(name)
        if spec.group == FEATURE_GROUP:
            if reading is not None:
                raise FactError(
                    f"`{name}` is what a feature came to and can't be given; it is decided from other facts"
                )
            return
        if spec.only_derived:
            if reading is not None:
                names = ", ".join(f"`{n}`" for n in sorted(spec.derive.names)) if spec.derive else ""
                raise FactError(f"`{name}` is derived and can't be given; give {names}")
            readings[name] = _derived(spec, spec.derive, readings, self._records)
            return
        # Of a flag, null means not set; of what a checkpoint says, it means that there is no such thing.
        by_flag = "flags" in spec.given_by or spec.group == "engine"
        null_flag = by_flag and reading is not None and reading.value is ABSENT and not spec.null_means_absent
        if null_flag or (reading is None and spec.group in flags):
            reading = self._unset(spec, readings)
        if reading is None:
            return
        if reading.value is ABSENT:
            if spec.derive is not None:
                reading = _derived(spec, spec.derive, readings, self._records)
            if reading.value is ABSENT and spec.default_derive is not None:
                reading = _derived(spec, spec.default_derive, readings, self._records)
            elif reading.value is ABSENT and spec.default is not UNKNOWN:
                reading = Reading(spec.default, "default")
        readings[name] = reading

    def _unset(self, spec: FactSpec, readings: Readings) -> Reading | None:
        """Say what a fact of a looked-at group is that nobody gave."""
        asked = f"server.{spec.name.partition('.')[2]}"
        if spec.group == "engine" and asked in self._specs:
            # What the engine resolved is what the operator typed, unless that leaves it to the engine.
            typed = readings.get(asked)
            if typed is None or typed.value is UNKNOWN or typed.value == "auto":
                return Reading(UNKNOWN, "", f"`{asked}` leaves it to the engine")
            return Reading(typed.value, typed.witness)
        if "flags" in spec.given_by and not (spec.has_default or spec.null_means_absent):
            return Reading(UNKNOWN, "", "not set")
        return Reading(ABSENT, "not set")


@dataclass(frozen=True, slots=True)
class _Completed:
    readings: Readings
    layers: tuple[Readings, ...] | None


def _derived(spec: FactSpec, expression: Expression | None, readings: Readings, records: Records) -> Reading:
    assert expression is not None
    found = {name: _value(name, readings, records) for name in expression.names}
    values = {name: value for name, value in found.items() if value is not UNKNOWN}
    try:
        value = expression(values)
        if not isinstance(value, Missing):
            value = spec.coerce(value)
    except ValueError as error:
        raise FactError(f"`{spec.name}`, derived as `{expression.text}`: {error}") from None
    note = ""
    if value is ABSENT and not any(one is ABSENT for one in values.values()):
        note = f"`{expression.text}` does not come out even"
    return Reading(value, f"derived: {expression.text}", note)


def _value(name: str, readings: Readings, records: Records) -> Value | Missing:
    if name not in records:
        return readings[name].value if name in readings else UNKNOWN
    fields: dict[str, Any] = {key: _value(f"{name}.{key}", readings, {}) for key in records[name]}
    return ABSENT if all(value is ABSENT for value in fields.values()) else fields


def _expand_records(catalogue: Mapping[str, FactSpec], given: Readings) -> dict[str, Reading]:
    """Replace readings of records by readings of their fields; raises `FactError` where both are given."""
    result: dict[str, Reading] = {}
    for name, reading in given.items():
        spec = catalogue.get(name)
        if spec is None:
            raise FactError(f"unknown fact `{name}`{nearest(name, catalogue)}")
        if spec.type != "record":
            result[name] = reading
            continue
        for key in spec.fields:
            value: Value | Missing = reading.value if isinstance(reading.value, Missing) else UNKNOWN
            if isinstance(reading.value, Mapping):
                value = reading.value.get(key, UNKNOWN)
            if f"{name}.{key}" in given:
                raise FactError(f"`{name}.{key}` is given twice, alone and in the record")
            result[f"{name}.{key}"] = Reading(value, reading.witness, reading.note)
    return result


def dependencies(specs: Mapping[str, FactSpec], name: str) -> frozenset[str]:
    """Return the facts that one is derived from, or is unless somebody gives it; of records, their fields."""
    spec = specs[name]
    names = frozenset().union(*(e.names for e in (spec.derive, spec.default_derive) if e is not None))
    if spec.group == "engine" and not spec.only_derived:
        names |= {n for n in [f"server.{name.partition('.')[2]}"] if n in specs}
    names |= {f"{one}.{key}" for one in names & specs.keys() for key in specs[one].fields}
    return frozenset(one for one in names & specs.keys() if specs[one].type != "record")


def _evaluation_order(specs: Mapping[str, FactSpec]) -> tuple[str, ...]:
    graph = {name: dependencies(specs, name) for name in sorted(specs) if specs[name].type != "record"}
    try:
        return tuple(TopologicalSorter(graph).static_order())
    except CycleError:
        return tuple(graph)  # a fault at load, see `parse_catalogue`


def _layer_dependent(specs: Mapping[str, FactSpec], order: tuple[str, ...]) -> frozenset[str]:
    found: set[str] = {name for name in specs if name.startswith("layer.")}
    for name in order:
        if dependencies(specs, name) & found:
            found.add(name)
    return frozenset(found)
