"""`gatekeeper check`: is this rule set sound?"""

from __future__ import annotations

from pathlib import Path

import click

from gatekeeper.cli import BAD_NEWS
from gatekeeper.cli.options import print_json, rules_option
from gatekeeper.errors import RuleError
from gatekeeper.load import load_rules


@click.command("check", short_help="Check a rule set: every fault with its place.")
@rules_option
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", help="How faults are printed.")
@click.pass_context
def command(context: click.Context, rules_folder: Path | None, overlays: tuple[Path, ...], form: str) -> None:
    """Read every file of a rule set and report all that is wrong, each with file, line and column."""
    try:
        rules = load_rules(rules_folder, overlays)
    except RuleError as error:
        if form == "json":
            print_json(
                [
                    {
                        "code": fault.code,
                        "file": fault.where.file,
                        "line": fault.where.line,
                        "column": fault.where.column,
                        "message": fault.message,
                    }
                    for fault in error.faults
                ]
            )
        else:
            for fault in error.faults:
                click.echo(str(fault))
            click.echo(f"{len(error.faults)} fault{'s' * (len(error.faults) != 1)}", err=True)
        context.exit(BAD_NEWS)
    if form == "json":
        print_json([])
        return
    gates = [gate for gates in rules.gates.values() for gate in gates]
    requirements = sum(len(g.requires) + sum(len(o.requires) for o in g.options) for g in gates)
    click.echo(
        f"{rules.name} {rules.version}: {len(rules.features)} features, {len(gates)} gates, "
        f"{requirements} requirements, {len(rules.catalogue)} facts, {len(rules.families)} families, "
        f"{len(rules.formats)} formats; no faults. digest {rules.digest[:12]}"
    )
