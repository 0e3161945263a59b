"""Facts: what is known about one model load by one runner, with where from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from gatekeeper.catalogue import Catalogue
from gatekeeper.errors import FactError
from gatekeeper.fact_spec import FEATURE_GROUP
from gatekeeper.source import nearest
from gatekeeper.values import ABSENT, UNKNOWN, Missing, Reading, Readings, Value, Values

Runner = Literal["target", "draft"]

ROLE_OF: dict[str, str] = {"target": "main", "draft": "mtp"}
"""The role of the layers that each runner loads."""
_MAIN = Reading("main")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about one load by one runner, complete: defaults and derived facts are in it."""

    catalogue: Catalogue
    runner: Runner
    readings: Readings
    layers: tuple[Readings, ...] | None
    """One for each MoE layer of either role; None: which layers there are is unknown."""
    layers_note: str = ""
    assumed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    given: Readings = field(repr=False)
    """What the sources gave, before defaults and derived facts."""
    given_layers: tuple[Readings, ...] | None = field(repr=False)
    flags: frozenset[str] = frozenset()
    """Groups whose flags were looked at."""

    def with_fact(self, name: str, value: Value) -> Facts:
        """Return the same facts but for one that is set by hand; what is derived from it follows."""
        return self.with_facts({name: value})

    def with_facts(self, changes: Mapping[str, Value | Missing | None]) -> Facts:
        """Return the same facts but for some that are set by hand, or (None) taken back; what is derived follows."""
        given = {name: reading for name, reading in self.given.items() if name not in changes}
        given |= {name: Reading(value, "supposed") for name, value in changes.items() if value is not None}
        layers = None if self.given_layers is None else list(self.given_layers)
        done = self.catalogue.complete(given, layers, self.flags)
        return replace(self, readings=done.readings, layers=done.layers, given=given)

    def with_decided(self, readings: Readings, layers: Sequence[Readings] | None) -> Facts:
        """Return the same facts with what a feature came to, as a whole and in each layer that this runner loads."""
        new = self.layers
        if layers is not None and self.layers is not None:
            added = iter(layers)
            new = tuple({**one, **next(added)} if self._is_loaded(one) else one for one in self.layers)
        return replace(self, readings={**self.readings, **readings}, layers=new)

    def _is_loaded(self, layer: Readings) -> bool:
        # A rule set may do without the fact; then all layers are the target's.
        return layer.get("layer.role", _MAIN).value == ROLE_OF[self.runner]

    @cached_property
    def values(self) -> Values:
        """Name to value or `ABSENT`, without the layers' facts; an unknown fact isn't in it."""
        return _known(self.readings)

    @cached_property
    def runner_layers(self) -> tuple[Readings, ...] | None:
        """The layers that this runner loads: target `main`, draft `mtp`."""
        return None if self.layers is None else tuple(filter(self._is_loaded, self.layers))

    @cached_property
    def runner_layer_values(self) -> tuple[Values, ...] | None:
        """Of each layer that this runner loads, the layer's own values; None: unknown which there are."""
        return None if self.runner_layers is None else tuple(map(_known, self.runner_layers))

    def reading(self, name: str, layer: Readings | None = None) -> Reading:
        """What is known of one fact, in a layer where one is given."""
        return (layer or {}).get(name) or self.readings.get(name) or Reading(UNKNOWN)


def _known(readings: Readings) -> Values:
    return {name: r.value for name, r in readings.items() if r.value is not UNKNOWN}


def make_facts(
    catalogue: Catalogue,
    given: Readings,
    layers: list[Readings] | None,
    *,
    runner: Runner = "target",
    flags: frozenset[str] = frozenset(),
    layers_note: str = "",
    assumed: tuple[str, ...] = (),
    unknown: tuple[str, ...] = (),
) -> Facts:
    """Check the types of what the providers read and complete it; raises `FactError`."""
    if "model.runner" in catalogue:
        given = {**given, "model.runner": Reading(runner, "runner")}
    typed = {name: _typed(catalogue, name, reading) for name, reading in given.items()}
    typed_layers = layers
    if layers is not None:
        typed_layers = []
        for layer in layers:
            one = {name: _typed(catalogue, name, reading) for name, reading in layer.items()}
            for name in one:
                if not catalogue.is_layer_fact(name):
                    raise FactError(f"`{name}` can't stand in a layer: it is a fact of the whole model")
            if "layer.role" in catalogue and ("layer.role" not in one or one["layer.role"].value is ABSENT):
                one["layer.role"] = Reading("main", "default")
            typed_layers.append(one)
    for name in typed:
        if name.startswith("layer."):
            raise FactError(f"`{name}` is a fact of one layer; give it in `layers`")
    done = catalogue.complete(typed, typed_layers, flags)
    return Facts(
        catalogue=catalogue,
        runner=runner,
        readings=done.readings,
        layers=done.layers,
        layers_note=layers_note,
        assumed=assumed,
        unknown=unknown,
        given=typed,
        given_layers=None if typed_layers is None else tuple(typed_layers),
        flags=flags,
    )


_GIVEN = "given"
"""Witness of what a caller or a row of a table gives."""


def _typed(catalogue: Catalogue, name: str, reading: Reading) -> Reading:
    if isinstance(reading.value, Missing):
        if name not in catalogue:
            raise FactError(f"unknown fact `{name}`{nearest(name, catalogue)}")
        return reading
    try:
        return Reading(catalogue.coerce(name, reading.value), reading.witness, reading.note)
    except FactError as error:
        place = f" (from {reading.witness})" if reading.witness not in ("", _GIVEN) else ""
        raise FactError(f"{error}{place}") from None


def from_record(catalogue: Catalogue, record: Mapping[str, Any]) -> Facts:
    """Read one line of `--facts`: what is not named is unknown, null is absent. Raises `FactError`.

    The shape of `record` was checked by ``schema/record.schema.json``.
    """
    assumed, hidden = tuple(record.get("assume", ())), tuple(record.get("unknown", ()))
    groups = {spec.group for spec in catalogue.values()} - {FEATURE_GROUP}
    for group in assumed:
        if group not in groups:
            raise FactError(f"`assume` names no group of facts: `{group}`{nearest(group, groups)}")
    for name in hidden:
        if name not in catalogue:
            raise FactError(f"unknown fact `{name}` under `unknown`{nearest(name, catalogue)}")
    given = _readings(catalogue, record.get("facts", {}))
    for name in dict.fromkeys(hidden):
        if name in given:
            raise FactError(
                f"`{name}` is both given and named under `unknown`; drop either (in a table: no row takes back what "
                "its `base` gives)"
            )
        given[name] = Reading(UNKNOWN, "", "named as unknown")
    layers = record.get("layers")
    return make_facts(
        catalogue,
        given,
        None if layers is None else [_readings(catalogue, layer) for layer in layers],
        runner=record.get("runner", "target"),
        flags=frozenset(assumed),
        layers_note="" if layers is not None else "the layers were not given",
        assumed=assumed,
        unknown=hidden,
    )


def _readings(catalogue: Catalogue, raw: Mapping[str, Any]) -> dict[str, Reading]:
    for name in raw:
        if name == "model.runner":
            raise FactError("`model.runner` is given by `runner`, not among the facts")
    return {name: Reading(ABSENT if value is None else value, _GIVEN) for name, value in raw.items()}
