"""The index, and a page of each feature and gate: what is decided, when, why, and on which facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gatekeeper.analysis.prose import count, listed, value_in_words
from gatekeeper.conditions import TEMPLATE, All, Any_, Condition, FactRef, facts_of
from gatekeeper.docs.site import Site
from gatekeeper.markdown import code, prose, refs, table
from gatekeeper.rules import Feature, Gate, Option, Output, Requirement
from gatekeeper.values import ABSENT, Missing

LONG = 120
"""A condition of more characters is written as a list."""

_REQUESTS = {
    "honoured": "a request waives what protects support or speed, never what protects correctness",
    "ignored": "a request for it is ignored, with a warning; forbidding it is not",
    "required": "off unless asked for",
}


def index(site: Site) -> list[str]:
    """Every feature with its gates, a line each."""
    rules = site.rules
    lines = [
        f"# Gates of the rule set `{rules.name}`",
        "",
        f"Version {rules.version}. Further pages: [facts](facts.md) that a rule may ask,",
        "[named conditions](conditions.md), [model families](families.md), [storage formats](formats.md).",
        "",
    ]
    for feature in rules.features.values():
        lines += [f"## [{feature.name}](features/{feature.name}.md)", "", prose(feature.summary), ""]
        lines += _gate_table(site, feature, "", f"features/{feature.name}/")
    return lines


def _gate_table(site: Site, feature: Feature, up: str, way: str) -> list[str]:
    rows = []
    for gate in site.rules.gates[feature.name]:
        demands = [count(len(gate.requires), "requirement")] if gate.requires or not gate.options else []
        if gate.options:
            demands += [f"options {listed([code(option.name) for option in gate.options])}"]
        rows.append((f"[{gate.name}]({way}{gate.name}.md)", site.words(gate.applies_to, up), "; ".join(demands)))
    return table(("gate", "decides where", "demands"), rows) if rows else ["No gate decides it yet.", ""]


def feature_page(site: Site, feature: Feature, up: str) -> list[str]:
    """What a feature is, how to ask for it, its options in order and what consumers read."""
    gates = site.rules.gates[feature.name]
    scope = "once for each MoE layer" if feature.scope == "layer" else "once for the model"
    lines = [f"# {feature.name}", "", prose(feature.summary), "", f"- **Decided**: {scope} that a runner loads"]
    lines += [f"- **Asked for**: {_request(site, feature)}"]
    if feature.mode == "shadow":
        lines += ["- **Mode**: shadow: it is decided and logged, and consumers see it as off"]
    lines += [f"- **Rule**: {site.place(feature.where, up)}", *_seen_in(feature.refs), "", "## Gates", ""]
    lines += _gate_table(site, feature, up, f"{feature.name}/")
    choosing = [gate for gate in gates if gate.options]
    lines += ["## Options", ""] if choosing else []
    for gate in choosing:
        lines += [f"In order of preference, by [{gate.name}]({feature.name}/{gate.name}.md):", ""]
        lines += [f"{place}. {_option_line(option)}" for place, option in enumerate(gate.options, 1)]
        lines += [""]
    return lines + _outputs(site, feature, {})


def _request(site: Site, feature: Feature) -> str:
    request = feature.request
    if request.fact:
        derive = site.rules.catalogue[request.fact].derive
        comes = f", which is `{derive.text}`" if derive else ""
        return f"by {code(request.fact)}{comes}: `auto`, `on`, `off`, or the name of an option"
    flags = [f"asked for by {code(request.force)}"] if request.force else []
    flags += [f"forbidden by {code(request.forbid)}"] if request.forbid else []
    return listed(flags) if flags else "by nobody: it is decided from the facts alone"


def _outputs(site: Site, feature: Feature, given: Mapping[str, Any]) -> list[str]:
    if not feature.outputs:
        return []
    rows = []
    for name, output in feature.outputs.items():
        value = given.get(name, output.value)
        rows.append((code(name), output.spec.type, _output_value(value), _otherwise(output), prose(output.doc)))
    return ["## Outputs", "", *table(("output", "type", "where on", "where not on", "what it is"), rows)]


def gate_page(site: Site, feature: Feature, gate: Gate, up: str) -> list[str]:
    """When a gate lets its feature on, and why."""
    lines = [f"# {feature.name} / {gate.name}", "", f"[{feature.name}](../{feature.name}.md): "]
    lines[-1] += prose(feature.summary)
    lines += ["", f"- **Decides where**: {site.words(gate.applies_to, up)}"]
    if feature.request.names:
        lines += [f"- **Asked for**: {_REQUESTS[gate.request]}"]
    if (gate.mode or feature.mode) == "shadow":
        lines += ["- **Mode**: shadow: it is decided and logged, and consumers see it as off"]
    if gate.options:
        left = "an error" if gate.on_failure == "error" else "off"
        lines += [f"- **No option left**: {left}"]
    lines += [f"- **Rule**: {site.place(gate.where, up)}", *_seen_in(gate.refs)]
    lines += [f"- **Note**: {prose(warning)}" for warning in gate.warnings]
    lines += [""]
    if gate.requires:
        lines += ["## Requirements", ""]
        lines += ["All of them must hold." if not gate.options else "All of them must hold, for every option.", ""]
    for requirement in gate.requires:
        lines += _requirement(site, requirement, up)
    for place, option in enumerate(gate.options, 1):
        lines += ["## Options", "", "The first one that passes is taken.", ""] if place == 1 else []
        lines += [f"### {place}. {option.name}", "", *_option(option)]
        for requirement in option.requires:
            lines += _requirement(site, requirement, up, option=option.name)
    lines += _outputs(site, feature, gate.outputs)
    return lines + _facts_read(site, gate, up)


def _option(option: Option) -> list[str]:
    lines = [f"**Degraded**: {prose(option.degraded)}", ""] if option.degraded else []
    if option.outputs:
        given = listed([f"`{name}` is {_output_value(value)}" for name, value in option.outputs.items()])
        lines += [f"With it, {given}.", ""]
    lines += [f"Seen in: {refs(option.refs)}", ""] if option.refs else []
    return lines if option.requires else [*lines, "It demands nothing more.", ""]


def _requirement(site: Site, one: Requirement, up: str, *, option: str = "") -> list[str]:
    by = f"asking for `{option}`" if option else "a request"
    waived = "no request waives it" if one.protects == "correctness" else f"{by} waives it"
    lines = [f"{'####' if option else '###'} {one.id}", "", f"Protects **{one.protects}**: {waived}.", ""]
    if one.when != All(()):
        lines += _condition(site, "Where", one.when, up)
    lines += _condition(site, "Must hold", one.that, up)
    failing = f"`{option}` is out" if option else "an error" if one.on_failure == "error" else "off"
    lines += [f"- **Otherwise** {failing}: {_reason(one.reason)}"]
    if one.at:
        lines += [f"- **Known** at the stage `{one.at}` at the latest"]
    shared = site.rules.requirements.get(one.shared)
    rule = site.place(shared.where if shared else one.where, up)
    lines += [f"- **Rule**: {rule}" + (f", shared, taken at {site.place(one.where, up)}" if shared else "")]
    return [*lines, *_seen_in(one.refs), ""]


def _condition(site: Site, head: str, condition: Condition, up: str) -> list[str]:
    """Write a condition in one line, or as a list of its parts where that would be long."""
    text = site.words(condition, up)
    if len(text) <= LONG or not isinstance(condition, All | Any_) or condition in site.names:
        return [f"- **{head}**: {text}"]
    which = "all of" if isinstance(condition, All) else "at least one of"
    return [f"- **{head}**: {which}", *(f"  - {site.words(part, up)}" for part in condition.parts)]


def _facts_read(site: Site, gate: Gate, up: str) -> list[str]:
    names: set[str] = set(facts_of(gate.applies_to))
    for one in gate.demands:
        names |= facts_of(one.when) | facts_of(one.that)
    values: list[Any] = [output.value for output in site.rules.features[gate.feature].outputs.values()]
    for outputs in (gate.outputs, *(option.outputs for option in gate.options)):
        values += outputs.values()
    names |= {value.name for value in values if isinstance(value, FactRef)}
    catalogue = site.rules.catalogue
    rows = [(code(name), prose(catalogue[name].doc), catalogue.stage_of(name)) for name in sorted(names)]
    if not rows:
        return []
    return ["## Facts it reads", "", *table(("fact", f"what it is ([all]({up}facts.md))", "known at"), rows)]


def _option_line(option: Option) -> str:
    return f"**{option.name}**" + (f": {prose(option.degraded)}" if option.degraded else "")


def _output_value(value: Any) -> str:
    if value is ABSENT:
        return "what the gate or the option gives"
    return f"`{value.name}`" if isinstance(value, FactRef) else value_in_words(value)


def _otherwise(output: Output) -> str:
    return "none" if isinstance(output.otherwise, Missing) else value_in_words(output.otherwise)


def _reason(template: str) -> str:
    """Return a reason with its places as code: what is filled in at each decision."""

    def place(found: Any) -> str:
        if found[1] is None:
            return str(found[0][0])
        return "(what differs)" if found[1] == "difference" else code(found[1])

    return prose(TEMPLATE.sub(place, template))


def _seen_in(texts: Iterable[str]) -> list[str]:
    return [f"- **Seen in**: {refs(texts)}"] if texts else []
