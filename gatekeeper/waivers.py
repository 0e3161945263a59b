"""`allow`: a lint that is fine where it stands, with the cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gatekeeper.errors import Where
from gatekeeper.source import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """One lint that is waived where it arises."""

    code: str
    because: str
    where: Where


def read_waivers(document: Document, data: Mapping[str, Any], path: tuple[str | int, ...] = ()) -> tuple[Waiver, ...]:
    """Return what stands under `allow` of the mapping `data`, which stands at `path`."""
    return tuple(
        Waiver(code=one["code"], because=one["because"], where=document.where((*path, "allow", index)))
        for index, one in enumerate(data.get("allow", ()))
    )
