"""The catalogue: every fact with its type, its default and what it is derived from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeAlias

from gatekeeper.errors import FactError, Fault, Where
from gatekeeper.expression_types import check_type
from gatekeeper.expressions import Expression, parse_expression
from gatekeeper.source import Document, WrittenFloat, WrittenInt, nearest
from gatekeeper.values import ABSENT, UNKNOWN, Arch, Missing, Reading, Readings, Value, Version, shown
from gatekeeper.waivers import Waiver, read_waivers

Records: TypeAlias = Mapping[str, tuple[str, ...]]
"""Fields of each fact that is a record."""

CHECKPOINT_GROUPS = frozenset({"model", "quant", "layer"})
"""Groups whose facts are read from the checkpoint; nobody sets them by hand."""
FEATURE_GROUP = "feature"
"""The group of what other features came to; nobody gives or declares these facts."""
FAMILY_FACT = "model.family"
"""Its values are the rule set's families."""
STAGES = ("config", "checkpoint", "platform", "layout")
"""When facts can be known, in order; where the catalogue does not say, the group does."""
_STAGE_OF = {"model": 0, "quant": 0, "layer": 1, "platform": 2, "library": 2, "env": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class FactSpec:
    """One fact as the catalogue declares it."""

    name: str
    type: str
    """`boolean integer number string enum version arch list record`."""
    doc: str
    where: Where
    from_: tuple[str, ...] = ()
    """Paths in config.json, the first that is there counts."""
    default: Value | Missing = UNKNOWN
    """Taken where the fact is absent; `UNKNOWN`: there is no default."""
    default_derive: Expression | None = None
    derive: Expression | None = None
    given_by: tuple[str, ...] = ()
    known_values: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    minimum: float | None = None
    controllable: tuple[Value, ...] = ()
    items: str = "string"
    fields: Mapping[str, FactSpec] = field(default_factory=dict)
    null_means_absent: bool = False
    stage: str = ""
    """As declared; `Catalogue.stage_of` knows what follows from the group and the derivation."""
    allow: tuple[Waiver, ...] = ()

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]

    @property
    def has_default(self) -> bool:
        return self.default is not UNKNOWN or self.default_derive is not None

    @property
    def only_derived(self) -> bool:
        return self.derive is not None and not self.from_ and not self.given_by

    def coerce(self, raw: Any) -> Value:
        """Return `raw`, as YAML or JSON gave it, as this fact's type. Raises `ValueError` with what was expected."""
        if self.type == "record":
            return self._record(raw)
        if self.type == "list":
            if not isinstance(raw, list | tuple):
                raise ValueError(f"expected a list, not {_given(raw)}")
            return tuple(_scalar(self.items, item) for item in raw)
        if self.type == "enum" and isinstance(raw, bool):
            raw = shown(raw)  # `true`, `false` and `partly` are the words of one enum
        value = _scalar(self.type, raw)
        if self.type == "enum" and value not in self.values:
            raise ValueError(
                f"expected one of {', '.join(self.values)}, not `{value}`{nearest(str(value), self.values)}"
            )
        if self.minimum is not None and isinstance(value, int | float) and value < self.minimum:
            raise ValueError(f"expected {shown(self.minimum)} or more, not `{shown(value)}`")
        return value

    def _record(self, raw: Any) -> Value:
        if not isinstance(raw, Mapping):
            raise ValueError(f"expected a record of {', '.join(self.fields)}, not {_given(raw)}")
        result: dict[str, Any] = {}
        for key, item in raw.items():
            if key not in self.fields:
                raise ValueError(f"unknown field `{key}`{nearest(key, self.fields)}")
            if item is not UNKNOWN:
                result[key] = ABSENT if item is None or item is ABSENT else self.fields[key].coerce(item)
        return result


def _given(raw: Any) -> str:
    if isinstance(raw, bool):
        return f"the boolean `{shown(raw)}`"
    if isinstance(raw, int | float):
        return f"the number `{raw}`"
    if isinstance(raw, str):
        return f"the text `{raw if len(raw) < 60 else raw[:57] + '...'}`"
    if isinstance(raw, list | tuple):
        return "a list"
    return "a mapping" if isinstance(raw, Mapping) else f"`{raw}`"


def _scalar(kind: str, raw: Any) -> Value:
    if isinstance(raw, str) and not raw.isascii():
        try:
            raw.encode()
        except UnicodeEncodeError:
            raise ValueError("expected Unicode text; a lone surrogate is no character") from None
    if kind == "boolean":
        if isinstance(raw, bool):
            return raw
    elif kind in ("integer", "number"):
        if isinstance(raw, int | float) and not isinstance(raw, bool) and raw == raw:
            if abs(raw) < float("inf") and raw == int(raw):
                return int(raw)  # 10.0 is 10, in a digest too
            if kind == "number" and abs(raw) < float("inf"):
                return float(raw)
    elif kind in ("version", "arch"):
        # Their text counts: 2.10 is not 2.1. A number of JSON has no text of its own, so it is refused.
        text = raw.text if isinstance(raw, WrittenInt | WrittenFloat) else raw
        if isinstance(text, Version | Arch):
            return text
        if isinstance(text, str):
            return Version(text) if kind == "version" else Arch(text)
        raise ValueError(f"expected a text such as `{'2.10' if kind == 'version' else 'sm90'}`, not {_given(raw)}")
    elif isinstance(raw, str):
        return raw
    what = "a text" if kind in ("string", "enum") else a_type(kind)
    raise ValueError(f"expected {what}, not {_given(raw)}")


def a_type(kind: str) -> str:
    """Return a type as a sentence has it: `an integer`, `a list`."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


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
                left += _dependencies(self._specs, name)
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
        null_flag = by_flag and reading is not None and reading.value is ABSENT
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


def _dependencies(specs: Mapping[str, FactSpec], name: str) -> frozenset[str]:
    spec = specs[name]
    names = frozenset().union(*(e.names for e in (spec.derive, spec.default_derive) if e is not None))
    if spec.group == "engine" and not spec.only_derived:
        names |= {n for n in [f"server.{name.partition('.')[2]}"] if n in specs}
    names |= {f"{one}.{key}" for one in names & specs.keys() for key in specs[one].fields}
    return frozenset(one for one in names & specs.keys() if specs[one].type != "record")


def _evaluation_order(specs: Mapping[str, FactSpec]) -> tuple[str, ...]:
    graph = {name: _dependencies(specs, name) for name in sorted(specs) if specs[name].type != "record"}
    try:
        return tuple(TopologicalSorter(graph).static_order())
    except CycleError:
        return tuple(graph)  # a fault at load, see `parse_catalogue`


def _layer_dependent(specs: Mapping[str, FactSpec], order: tuple[str, ...]) -> frozenset[str]:
    found: set[str] = {name for name in specs if name.startswith("layer.")}
    for name in order:
        if _dependencies(specs, name) & found:
            found.add(name)
    return frozenset(found)


def parse_catalogue(documents: list[Document], faults: list[Fault], decided: Iterable[FactSpec] = ()) -> Catalogue:
    """Read `facts:` of every document; what is wrong is added to `faults`.

    `decided` are the facts that say what features came to.
    """
    specs: dict[str, FactSpec] = {}
    for document in documents:
        for name, raw in document.data["facts"].items():
            where = document.where(("facts", name))
            if name.startswith(f"{FEATURE_GROUP}."):
                message = f"`{name}` says what a feature came to, and is there by itself; declare the feature instead"
                faults.append(Fault("bad-fact", message, where))
                continue
            if name in specs:
                faults.append(Fault("duplicate-fact", f"fact `{name}` is declared in {specs[name].where} too", where))
                continue
            spec = _parse_spec(name, raw, document, faults)
            if spec is not None:
                specs[name] = spec
    catalogue = Catalogue({**specs, **{spec.name: spec for spec in decided}})
    for spec in specs.values():
        for expression in (spec.derive, spec.default_derive):
            if expression is not None:
                _check_expression(spec, expression, catalogue, faults)
    try:
        TopologicalSorter({n: _dependencies(catalogue, n) for n in catalogue}).prepare()
    except CycleError as error:
        chain = " from ".join(f"`{name}`" for name in error.args[1])
        faults.append(Fault("cycle", f"facts are derived in a circle: {chain}", catalogue[error.args[1][0]].where))
    return catalogue


def _check_expression(spec: FactSpec, expression: Expression, catalogue: Catalogue, faults: list[Fault]) -> None:
    unknown = sorted(expression.names - catalogue.keys())
    for name in unknown:
        message = f"`{spec.name}` is derived from the unknown fact `{name}`{nearest(name, catalogue)}"
        faults.append(Fault("unknown-fact", message, spec.where))
    for name in sorted(expression.names & catalogue.keys()):
        if catalogue[name].group == FEATURE_GROUP:
            message = f"`{spec.name}` is derived from `{name}`, which is decided only from facts; test it in a gate"
            faults.append(Fault("bad-fact", message, spec.where))
    try:
        check_type(expression, spec, catalogue)
    except ValueError as error:
        faults.append(Fault("wrong-type", f"fact `{spec.name}`: {error}", spec.where))


def _parse_spec(name: str, raw: dict[str, Any], document: Document, faults: list[Fault]) -> FactSpec | None:
    where = document.where(("facts", name))
    try:
        _check_shape(raw)
        stage = raw.get("stage", "")
        fields = {
            key: FactSpec(
                name=f"{name}.{key}", type=one["type"], doc=one["doc"], where=where, stage=stage, **_typing(one)
            )
            for key, one in raw.get("fields", {}).items()
        }
        spec = FactSpec(
            name=name,
            type=raw["type"],
            doc=raw["doc"],
            where=where,
            from_=tuple(raw.get("from", ())),
            derive=parse_expression(_text(raw["derive"])) if "derive" in raw else None,
            given_by=tuple(raw.get("given_by", ())),
            fields=fields,
            null_means_absent=raw.get("null_means") == "absent",
            stage=stage,
            allow=read_waivers(document, raw, ("facts", name)),
            **_typing(raw),
        )
        default = raw.get("default")
        if isinstance(default, dict):
            spec = replace(spec, default_derive=parse_expression(_text(default["derive"])))
        elif default is not None:
            spec = replace(spec, default=spec.coerce(default))
        choices = raw.get("controllable", ())
        if choices is True:
            choices = _all_values(spec)
        return replace(spec, controllable=tuple(map(spec.coerce, choices or ())))
    except ValueError as error:
        faults.append(Fault("bad-fact", f"fact `{name}`: {error}", where))
        return None


def _all_values(spec: FactSpec) -> tuple[Any, ...]:
    """Return every value that a fact can be set to, for `controllable: true`."""
    if spec.type not in ("boolean", "enum"):
        raise ValueError(
            f"`controllable: true` goes with boolean and enum; list what {a_type(spec.type)} can be set to"
        )
    return spec.values or (False, True)


def _check_shape(raw: dict[str, Any]) -> None:
    """Raise `ValueError` where a declaration's keys do not go together."""
    kind = raw["type"]
    for key, owner in (("fields", "record"), ("values", "enum")):
        if kind == owner and not raw.get(key):
            raise ValueError(f"{a_type(kind)} needs `{key}`; add them")
        if kind != owner and key in raw:
            raise ValueError(f"`{key}` goes with the type {owner}, not with {kind}")
    if "items" in raw and kind != "list":
        raise ValueError(f"`items` goes with the type list, not with {kind}")
    if kind == "record" and raw.keys() & {"derive", "default", "controllable", "minimum"}:
        raise ValueError("a record has no value of its own; say it of its fields")
    for one in raw.get("fields", {}).values():
        _check_shape(one)


def _text(value: Any) -> str:
    return str(getattr(value, "text", value))


def _typing(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "known_values": tuple(raw.get("known_values", ())),
        "values": tuple(raw.get("values", ())),
        "minimum": raw.get("minimum"),
        "items": raw.get("items", "string"),
    }
