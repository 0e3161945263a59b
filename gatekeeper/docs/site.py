"""What the pages of a rule set share: conditions in words with links, and the places of rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gatekeeper.analysis.prose import in_words
from gatekeeper.conditions import Condition
from gatekeeper.errors import Where
from gatekeeper.markdown import code
from gatekeeper.parse_rules import MANIFEST
from gatekeeper.rules import RuleSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A rule set, and where its readers find it; `up` is always the way from a page to the output folder."""

    rules: RuleSet
    folder: Path
    """Folder of the rule set."""
    source: str
    """Where readers find it: an address, or a path from the output folder; empty: rules are named, not linked."""
    names: Mapping[Condition, str]
    """The named conditions, by what they say."""

    def words(self, condition: Condition, up: str, *, besides: str = "") -> str:
        """Say a condition; named ones in it link to their page, but for the one called `besides`."""
        names = {one: name for one, name in self.names.items() if name != besides}
        return in_words(condition, names, lambda name: f"[{name}]({up}conditions.md#{name})")

    def place(self, where: Where, up: str) -> str:
        """Return `rules/gates/x/y.yaml:8`, as a link where it is known where readers find it."""
        path = Path(where.file).resolve()
        root = next((one for one in path.parents if (one / MANIFEST).is_file()), path.parent)
        relative = path.relative_to(root).as_posix()
        text = code(f"{root.name}/{relative}:{where.line}")
        if not self.source or root != self.folder:
            return text
        way = self.source if "://" in self.source else f"{up}{self.source}"
        return f"[{text}]({way}/{relative}#L{where.line})"
