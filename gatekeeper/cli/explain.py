"""`gatekeeper explain`: why a feature is on or off for a target, and what would change that."""

from __future__ import annotations

from pathlib import Path

import click

from gatekeeper.analysis.explain import Explanation, explain, is_pending
from gatekeeper.cli import BAD_NEWS, INCOMPLETE
from gatekeeper.cli.explanation import side_by_side
from gatekeeper.cli.options import check_features, facts_of_targets, json_option, print_json, rules_of, target_options
from gatekeeper.facts import Runner


@click.command("explain", short_help="Say why a feature is on or off, and what would change that.")
@click.argument("feature")
@click.argument("target")
@target_options
@click.option("--brief", is_flag=True, help="A line or three, to paste into a ticket.")
@click.option("--full", is_flag=True, help="Everything: every condition, every fact and where it came from.")
@click.option("--strict", is_flag=True, help="Exit 3 where the decision is pending.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    feature: str,
    target: str,
    platform: str | None,
    settings: tuple[str, ...],
    runner: Runner | None,
    rules_folder: Path | None,
    overlays: tuple[Path, ...],
    brief: bool,
    full: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Explain what FEATURE comes to for TARGET, a checkpoint folder or a config.json.

    Every requirement with the value found and where it was read; where the feature is not on, the smallest changes of
    settings that turn it on, each proven by deciding again. The JSON form always says everything.
    """
    if brief and full:
        raise click.UsageError("--brief and --full exclude each other")
    rules = rules_of(rules_folder, overlays)
    check_features(rules, [feature])
    found = [
        explain(rules, facts, feature) for _, facts in facts_of_targets([target], rules, platform, settings, runner)
    ]
    if as_json:
        print_json([{"target": target, "runner": one.decision.runner, "explanation": one.to_json()} for one in found])
    else:
        for line in side_by_side(target, found, "brief" if brief else "full" if full else "default"):
            click.echo(line)
    context.exit(_exit_code(found, strict))


def _exit_code(found: list[Explanation], strict: bool) -> int:
    if any(one.decision.in_force.state == "error" for one in found):
        return BAD_NEWS
    return INCOMPLETE if strict and any(is_pending(one.decision) for one in found) else 0
