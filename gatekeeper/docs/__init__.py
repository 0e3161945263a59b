"""A rule set as Markdown pages; `gatekeeper docs` writes them."""

from __future__ import annotations

from pathlib import Path

from gatekeeper.docs import catalogue, gates
from gatekeeper.docs.site import Site
from gatekeeper.rules import RuleSet


def gate_pages(rules: RuleSet, *, folder: Path, source: str = "") -> dict[str, str]:
    """Return the pages of a rule set: path below the output folder to Markdown.

    `folder` is that of the rule set; `source` is where readers find it, for links to rules: an address, or a path
    relative to the output folder; without it rules are named, not linked.
    """
    named = {one.that: name for name, one in rules.conditions.items()}
    site = Site(rules=rules, folder=folder.resolve(), source=source.rstrip("/"), names=named)
    pages = {
        "README.md": gates.index(site),
        "facts.md": catalogue.facts(site),
        "conditions.md": catalogue.conditions(site),
        "families.md": catalogue.families(site),
        "formats.md": catalogue.formats(site),
    }
    for feature in rules.features.values():
        pages[f"features/{feature.name}.md"] = gates.feature_page(site, feature, "../")
        for gate in rules.gates[feature.name]:
            pages[f"features/{feature.name}/{gate.name}.md"] = gates.gate_page(site, feature, gate, "../../")
    return {name: "\n".join(lines).rstrip("\n") + "\n" for name, lines in pages.items()}
