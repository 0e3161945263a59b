"""What features came to, as facts for the gates of others: `feature.NAME.state`, `.option` and `.outputs.X`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from gatekeeper.decision import Decision, LayerDecision
from gatekeeper.errors import Where
from gatekeeper.fact_spec import FEATURE_GROUP, FactSpec
from gatekeeper.rules import Output
from gatekeeper.source import Document
from gatekeeper.values import ABSENT, UNKNOWN, Reading, Readings


def declared_facts(features: Iterable[Document], gates: Iterable[Document]) -> list[FactSpec]:
    """Return the facts that the declared features give; `gates` tell the names of their options."""
    options: dict[str, list[str]] = {}
    features = list(features)
    for document in (*features, *gates):
        names = (option["option"] for option in document.data.get("options", ()) if option)
        options.setdefault(document.data["feature"], []).extend(names)
    # A feature declared twice is a fault of its own.
    once = {document.data["feature"]: document for document in features}
    return [spec for name, document in once.items() for spec in _facts(name, document, options[name])]


def _facts(name: str, document: Document, options: list[str]) -> Iterator[FactSpec]:
    where = document.where(("feature",))
    by_layer = document.data.get("scope") == "layer"
    states = ("on", "off", *(["mixed"] if by_layer else []), "error")
    prefix = f"{FEATURE_GROUP}.{name}"
    stage = "checkpoint" if by_layer else ""  # at the earliest: which layers there are is known then
    doc = f"What `{name}` came to; unknown while it{', or one of its layers,' if by_layer else ''} is pending."
    yield FactSpec(name=f"{prefix}.state", type="enum", values=states, doc=doc, where=where, stage=stage)
    known = tuple(dict.fromkeys(options))
    doc = f"The option that `{name}` chose; absent where it is not on, or has none."
    yield FactSpec(name=f"{prefix}.option", type="string", known_values=known, doc=doc, where=where, stage=stage)
    for output, raw in document.data.get("outputs", {}).items():
        spec = output_spec(f"{prefix}.outputs.{output}", raw, document.where(("outputs", output)))
        yield replace(spec, stage=stage)


def output_spec(name: str, raw: Mapping[str, Any], where: Where) -> FactSpec:
    """Return the type of an output as that of a fact."""
    values, items = tuple(raw.get("values", ())), raw.get("items", "string")
    doc = raw.get("doc", "An output of the feature.")
    return FactSpec(name=name, type=raw["type"], doc=doc, where=where, values=values, items=items)


def came_to(decision: Decision, outputs: Mapping[str, Output]) -> tuple[Readings, list[Readings] | None]:
    """Return what other gates see of a decision: as a whole, and by layer where it was made by layer.

    A shadow decision is seen as off. Nothing is known while it, or one of its layers, is pending, or while it may yet
    look otherwise.
    """
    seen, layers = decision.in_force, decision.in_force.layers
    settled = not decision.unsettled
    states = (seen.state, *(layer.state for layer in layers or ()))
    whole = _readings(seen, seen, outputs, known=settled and "pending" not in states)
    if not layers:
        return whole, None
    return whole, [_readings(seen, layer, outputs, known=settled and layer.state != "pending") for layer in layers]


def _readings(
    decision: Decision, one: Decision | LayerDecision, outputs: Mapping[str, Output], *, known: bool
) -> Readings:
    prefix = f"{FEATURE_GROUP}.{decision.feature}"
    names = (f"{prefix}.state", f"{prefix}.option", *(f"{prefix}.outputs.{name}" for name in outputs))
    if not known:
        return {name: Reading(UNKNOWN, "", f"`{decision.feature}` is not decided yet") for name in names}
    values: list[Any] = [one.state, one.option]
    # Mixed outputs differ from layer to layer: as a whole there are none.
    given = one.outputs or {}
    values += [
        None if (raw := given.get(name)) is None else output.spec.coerce(raw) for name, output in outputs.items()
    ]
    witness = f"decided: {decision.feature}" + (f" by {one.decided_by}" if one.decided_by else "")
    return {
        name: Reading(ABSENT if value is None else value, witness) for name, value in zip(names, values, strict=True)
    }
