"""`gatekeeper check`: is this rule set sound, and is there anything in it that looks like a mistake?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gatekeeper.analysis.lint import lint
from gatekeeper.analysis.prose import count
from gatekeeper.cli import BAD_NEWS
from gatekeeper.cli.faults import counted, show
from gatekeeper.cli.options import print_json, rules_option
from gatekeeper.cli.sarif import sarif_log
from gatekeeper.errors import Fault, RuleError
from gatekeeper.load import load_rules
from gatekeeper.rules import RuleSet


@click.command("check", short_help="Check a rule set: every fault with its place, and what looks like a mistake.")
@rules_option
@click.option("--strict", is_flag=True, help="Lints are errors too.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "sarif"]),
    default="text",
    help="How faults are printed; SARIF 2.1.0 is what code hosts and editors read.",
)
@click.pass_context
def command(
    context: click.Context, rules_folder: Path | None, overlays: tuple[Path, ...], strict: bool, form: str
) -> None:
    """Read every file of a rule set and report all that is wrong, each with file, line and column.

    Where nothing is, look for likely mistakes (lints): they are warnings, and `--strict` makes them errors. `gatekeeper
    help CODE` explains each.
    """
    rules: RuleSet | None = None
    try:
        rules = load_rules(rules_folder, overlays, fresh=True)
        faults: Sequence[Fault] = lint(rules)
    except RuleError as error:
        faults = error.faults
    if strict:
        faults = [replace(fault, severity="error") for fault in faults]
    if form == "json":
        print_json([fault_json(fault) for fault in faults])
    elif form == "sarif":
        print_json(sarif_log(faults))
    else:
        show(faults)
        if faults:
            click.echo(counted(faults), err=True)
        if rules is not None:
            click.echo(_summary(rules, faults))
    if any(fault.severity == "error" for fault in faults):
        context.exit(BAD_NEWS)


def fault_json(fault: Fault) -> dict[str, Any]:
    """Return all parts of a fault."""
    return {
        "code": fault.code,
        "severity": fault.severity,
        "file": fault.where.file,
        "line": fault.where.line,
        "column": fault.where.column,
        "message": fault.message,
        "source": fault.where.source,
        "help": f"gatekeeper help {fault.code}",
    }


def _summary(rules: RuleSet, faults: Sequence[Fault]) -> str:
    gates = [gate for gates in rules.gates.values() for gate in gates]
    requirements = sum(len(gate.demands) for gate in gates)
    sizes = (
        count(len(rules.features), "feature"),
        count(len(gates), "gate"),
        count(requirements, "requirement"),
        count(len(rules.catalogue), "fact"),
        count(len(rules.families), "family", "families"),
        count(len(rules.formats), "format"),
    )
    found = counted(faults) or "no faults"
    return f"{rules.name} {rules.version}: {', '.join(sizes)}; {found}. digest {rules.digest[:12]}"
