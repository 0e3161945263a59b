"""`gatekeeper facts`: the catalogue, or what is known of a target and from where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from gatekeeper.cli.options import facts_of_targets, json_option, print_json, rules_of, target_options
from gatekeeper.decision import ranges
from gatekeeper.errors import one_line
from gatekeeper.fact_spec import FAMILY_FACT, FEATURE_GROUP, FactSpec
from gatekeeper.facts import Facts, Runner
from gatekeeper.rules import RuleSet
from gatekeeper.values import ABSENT, UNKNOWN, Missing, Reading, plain, shown


@click.command("facts", short_help="Show the catalogue, or a target's facts with their witnesses.")
@click.argument("target", required=False)
@target_options
@json_option
def command(
    target: str | None,
    platform: str | None,
    settings: tuple[str, ...],
    runner: Runner | None,
    rules_folder: Path | None,
    overlays: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Show every fact that rules may read; of TARGET, its value and the place it was read from."""
    rules = rules_of(rules_folder, overlays)
    if target is None:
        if platform or settings or runner:
            raise click.UsageError("--platform, --set and --runner go with a TARGET")
        if as_json:
            print_json([_spec_json(spec) for spec in rules.catalogue.values()])
            return
        for spec in rules.catalogue.values():
            click.echo(f"{spec.name}  ({spec.type})  {spec.doc}{_values(spec, rules)}")
        return
    found = [facts for _, facts in facts_of_targets([target], rules, platform, settings, runner)]
    if as_json:
        print_json([_facts_json(target, facts) for facts in found])
        return
    for facts in found:
        click.echo(click.style(one_line(f"{target} ({facts.runner})"), bold=True))
        for line in fact_lines(facts):
            click.echo(f"  {line}")


def _values(spec: FactSpec, rules: RuleSet) -> str:
    """Say which values a fact has, and what it is where nobody says it."""
    closed = list(rules.families) if spec.name == FAMILY_FACT else spec.values
    default = spec.default_derive.text if spec.default_derive else shown(spec.default) if spec.has_default else ""
    told = {
        "One of": ", ".join(closed),
        "Seen so far:": ", ".join(spec.known_values),
        "Derived:": spec.derive.text if spec.derive else "",
        "Default:": default,
    }
    return "".join(f" {word} {text}." for word, text in told.items() if text)


def fact_lines(facts: Facts) -> Iterator[str]:
    """Yield what is known, then in one line what isn't; layers that agree are shown together."""
    for name in sorted(facts.readings):
        reading = facts.readings[name]
        if reading.value is not UNKNOWN:
            yield f"{name} = {_short(reading.value)}{_from(reading)}"
    if facts.runner_layers is None:
        yield f"layers: unknown{f' ({facts.layers_note})' if facts.layers_note else ''}"
    else:
        yield from _layer_lines(facts)
    unknown = [name for name, spec in facts.catalogue.items() if spec.type != "record" and spec.group != FEATURE_GROUP]
    unknown = [n for n in unknown if not facts.catalogue.is_layer_fact(n) and facts.reading(n).value is UNKNOWN]
    if unknown:
        yield f"unknown: {', '.join(sorted(unknown))}"


def _layer_lines(facts: Facts) -> Iterator[str]:
    layers = facts.runner_layers or ()
    if not layers:
        yield "layers: none with experts"
    names = sorted({name for layer in layers for name in layer} - {"layer.index", "layer.name"})
    for name in names:
        groups: dict[str, tuple[Reading, list[int]]] = {}
        for position, layer in enumerate(layers):
            reading = layer.get(name, Reading(UNKNOWN))
            index = layer["layer.index"].value if "layer.index" in layer else position
            groups.setdefault(_short(reading.value), (reading, []))[1].append(index)  # type: ignore[arg-type]
        for value, (reading, found) in groups.items():
            if reading.value is not ABSENT or reading.note:
                yield f"{name} = {value} in {ranges(found)}{_from(reading)}"


def _from(reading: Reading) -> str:
    told = [one_line(text) for text in (reading.witness, reading.note) if text]
    return click.style(f"  [{'; '.join(told)}]", dim=True) if told else ""


def _short(value: Any) -> str:
    text = shown(value)
    if isinstance(value, tuple) and len(text) > 80:
        return f"[{shown(value[0])}, …] ({len(value)} items)"
    return text


def _spec_json(spec: FactSpec) -> dict[str, Any]:
    return {"name": spec.name, "type": spec.type, "doc": spec.doc, "given_by": list(spec.given_by)}


def _reading_json(reading: Reading) -> dict[str, Any]:
    value = reading.value
    return {
        "known": value.value if isinstance(value, Missing) else "known",
        "value": None if isinstance(value, Missing) else plain(value),
        "witness": reading.witness,
        "note": reading.note,
    }


def _facts_json(target: str, facts: Facts) -> dict[str, Any]:
    def together(readings: Any) -> dict[str, Any]:
        return {name: _reading_json(reading) for name, reading in sorted(readings.items())}

    layers = None if facts.runner_layers is None else [together(layer) for layer in facts.runner_layers]
    return {"target": target, "runner": facts.runner, "facts": together(facts.readings), "layers": layers}
