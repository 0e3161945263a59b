"""Settings from `--set fact=value` or a caller's mapping to readings; what the checkpoint says can't be set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatekeeper.catalogue import Catalogue
from gatekeeper.errors import FactError, RuleError
from gatekeeper.fact_spec import CHECKPOINT_GROUPS
from gatekeeper.source import nearest, parse_scalar
from gatekeeper.values import ABSENT, Reading, Readings

SETTABLE_GROUPS = frozenset({"platform", "parallel", "server", "engine", "library", "env"})
TEXT_TYPES = frozenset({"string", "enum", "version", "arch"})
NULLS = frozenset({"", "~", "null", "Null", "NULL"})


def read_flags(settings: Mapping[str, Any] | None, catalogue: Catalogue) -> Readings:
    """Facts that the operator or a caller set, by name; text is read as YAML, null means not set.

    Raises `FactError` for an unknown name, for one that is read from the checkpoint, and for text that is no YAML;
    types are checked where facts are joined.
    """
    readings: dict[str, Reading] = {}
    for name, raw in (settings or {}).items():
        spec = catalogue.get(name)
        group = name.partition(".")[0]
        if spec is None:
            settable = [n for n in catalogue if n.partition(".")[0] in SETTABLE_GROUPS]
            raise FactError(f"unknown fact `{name}`{nearest(name, settable) or '; `gatekeeper facts` lists them'}")
        if group in CHECKPOINT_GROUPS:
            raise FactError(
                f"`{name}` is read from the checkpoint and can't be set; change the checkpoint or its config"
            )
        if spec.only_derived and spec.derive:
            names = ", ".join(f"`{one}`" for one in sorted(spec.derive.names))
            raise FactError(f"`{name}` is derived and can't be set; set what it is derived from: {names}")
        if group not in SETTABLE_GROUPS:
            raise FactError(f"`{name}` can't be set; set what it is derived from")
        value = _value(name, raw, spec.type) if isinstance(raw, str) else raw
        readings[name] = Reading(ABSENT if value is None else value, f"--set {name}")
    return readings


def _value(name: str, text: str, kind: str) -> Any:
    if text.strip() in NULLS:
        return None
    if kind in TEXT_TYPES:
        return text.strip().strip("\"'")  # `2.10` stays as written, `--set env.X=1` is a text
    try:
        return parse_scalar(text)
    except RuleError as error:
        raise FactError(f"`{name}`: `{text}` is no value: {error.faults[0].message}") from None
