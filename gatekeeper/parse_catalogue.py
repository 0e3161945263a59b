"""Documents with `facts:` to a catalogue; every fault of a declaration is collected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from gatekeeper.catalogue import Catalogue, dependencies
from gatekeeper.errors import Fault
from gatekeeper.expression_types import check_type
from gatekeeper.expressions import Expression, parse_expression
from gatekeeper.fact_spec import FEATURE_GROUP, FactSpec, a_type
from gatekeeper.source import Document, nearest
from gatekeeper.waivers import read_waivers


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
        TopologicalSorter({n: dependencies(catalogue, n) for n in catalogue}).prepare()
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
