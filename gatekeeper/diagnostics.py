"""What each code of a fault means, with a wrong and a right example: the data behind `gatekeeper help CODE`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gatekeeper.errors import Severity
from gatekeeper.source import read_yaml

CATALOGUE = Path(__file__).with_name("diagnostics.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """One code."""

    code: str
    severity: Severity
    title: str
    """What is wrong, in a few words: ``a fact that the catalogue does not declare``."""
    means: str
    """When it is reported, and what to do."""
    because: str
    """Why it is not let pass."""
    wrong: Mapping[str, str | None]
    """Files by name that have the fault, None where one is missing; no files where a text can't show it."""
    right: Mapping[str, str]
    """The same files without it."""


@cache
def diagnostics() -> Mapping[str, Diagnostic]:
    """Return every code with what it means, errors first, each group by name."""
    raw = read_yaml(CATALOGUE).data
    groups: tuple[tuple[Severity, str], ...] = (("error", "errors"), ("warning", "lints"))
    found = [
        Diagnostic(code=code, severity=severity, **{"wrong": {}, "right": {}, **one})
        for severity, key in groups
        for code, one in sorted(raw[key].items())
    ]
    return {one.code: one for one in found}
