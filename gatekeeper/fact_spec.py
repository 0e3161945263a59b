"""One fact as it is declared: its type, what it may be, and a raw value as that type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gatekeeper.errors import Where
from gatekeeper.expressions import Expression
from gatekeeper.source import WrittenFloat, WrittenInt, nearest
from gatekeeper.values import ABSENT, UNKNOWN, Arch, Missing, Value, Version, shown
from gatekeeper.waivers import Waiver

CHECKPOINT_GROUPS = frozenset({"model", "quant", "layer"})
"""Groups whose facts are read from the checkpoint; nobody sets them by hand."""
FEATURE_GROUP = "feature"
"""The group of what other features came to; nobody gives or declares these facts."""
FAMILY_FACT = "model.family"
"""Its values are the rule set's families."""


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
    words = "; write `true` or `false`" if kind == "boolean" else ""
    raise ValueError(f"expected {what}, not {_given(raw)}{words}")


def a_type(kind: str) -> str:
    """Return a type as a sentence has it: `an integer`, `a list`."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
