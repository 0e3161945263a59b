"""Pages of what gates read: facts, named conditions, model families, storage formats."""

from __future__ import annotations

from gatekeeper.analysis.prose import listed, value_in_words
from gatekeeper.conditions import Test
from gatekeeper.disjoint import disjoint
from gatekeeper.docs.site import Site
from gatekeeper.errors import Where
from gatekeeper.fact_spec import FAMILY_FACT, FactSpec
from gatekeeper.markdown import code, prose, table
from gatekeeper.values import Missing


def facts(site: Site) -> list[str]:
    """Every fact, by group."""
    groups: dict[str, list[FactSpec]] = {}
    fields = {f"{spec.name}.{key}" for spec in site.rules.catalogue.values() for key in spec.fields}
    for name, spec in sorted(site.rules.catalogue.items()):
        if name not in fields:
            groups.setdefault(spec.group, []).append(spec)
    lines = ["# Facts", "", "All that a rule may ask: " + ", ".join(f"[{g}](#{g})" for g in groups) + ".", ""]
    head = ("fact", "type", "what it is", "where from", "known at")
    for group, specs in groups.items():
        lines += [f"## {group}", "", *table(head, [_fact_row(site, spec) for spec in specs])]
    return lines


def _fact_row(site: Site, spec: FactSpec) -> tuple[str, ...]:
    kind = f"list of {spec.items}" if spec.type == "list" else spec.type
    about = [prose(spec.doc)]
    if spec.fields:
        about += ["Fields: " + "; ".join(f"`{key}`: {prose(one.doc)}" for key, one in spec.fields.items())]
    if spec.values or spec.known_values:
        words = ", ".join(map(code, spec.values or spec.known_values))
        about += [f"{'One of' if spec.values else 'Seen so far:'} {words}."]
    if spec.controllable:
        about += [f"An operator may set {listed(list(map(value_in_words, spec.controllable)), 'or')}."]
    return code(spec.name), kind, " ".join(about), _origin(spec), site.rules.catalogue.stage_of(spec.name)


def conditions(site: Site) -> list[str]:
    """Every named condition."""
    lines = ["# Named conditions", ""]
    for name, one in sorted(site.rules.conditions.items()):
        lines += [f"## {name}", "", prose(one.doc), ""]
        text = site.words(one.that, "", besides=name)
        lines += [f"- **Holds where**: {text}", f"- **Rule**: {site.place(one.where, '')}", ""]
    return lines if site.rules.conditions else [*lines, "There are none."]


def families(site: Site) -> list[str]:
    """Every family, with the gate of each feature or the reason why there is none."""
    features = list(site.rules.features)
    rows, gateless = [], []
    for name, family in sorted(site.rules.families.items()):
        rows.append((code(name), prose(family.doc), *(_covered(site, name, feature) for feature in features)))
        gateless += [(code(name), code(feature), prose(why)) for feature, why in sorted(family.gateless.items())]
    heads = [f"[{feature}](features/{feature}.md)" for feature in features]
    lines = ["# Model families", "", "Which gate decides a feature for a family.", ""]
    lines += table(("family", "what it is", *heads), rows)
    lines += ["## Without a gate, and why", "", *table(("family", "feature", "why"), gateless)] if gateless else []
    return lines


def _covered(site: Site, family: str, feature: str) -> str:
    is_it = Test(FAMILY_FACT, "eq", family, Where(""))
    gates = [gate for gate in site.rules.gates[feature] if not disjoint(gate.applies_to, is_it)]
    if gates:
        return ", ".join(f"[{gate.name}](features/{feature}/{gate.name}.md)" for gate in gates)
    return "none, see below" if feature in site.rules.families[family].gateless else "none"


def formats(site: Site) -> list[str]:
    """Every storage format."""
    rows = []
    for name, one in sorted(site.rules.formats.items()):
        block = f"{one.block[0]} × {one.block[1]}" if one.block else ""
        rows.append((code(name), prose(one.doc), block, code(one.scale_dtype) if one.scale_dtype else ""))
    head = ("format", "what it is", "one scale to rows × columns", "dtype of the scale")
    return ["# Storage formats", "", *table(head, rows)]


def _origin(spec: FactSpec) -> str:
    parts = [f"config.json: {listed(list(map(code, spec.from_)), 'or')}"] if spec.from_ else []
    parts += [f"given by {listed(spec.given_by)}"] if spec.given_by else []
    parts += [f"derived: `{spec.derive.text}`"] if spec.derive else []
    if spec.default_derive:
        parts += [f"default `{spec.default_derive.text}`"]
    elif not isinstance(spec.default, Missing):
        parts += [f"default {value_in_words(spec.default)}"]
    return "; ".join(parts) or "decided by this project"
