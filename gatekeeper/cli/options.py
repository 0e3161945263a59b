"""Options that several commands share, and what they set up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from gatekeeper.facts import Facts, Runner
from gatekeeper.load import load_rules, shipped_rules
from gatekeeper.reading import join, open_target, runners_of
from gatekeeper.rules import RuleSet

F = TypeVar("F", bound=Callable[..., Any])

rules_option = click.option(
    "--rules",
    "rules_folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Use this rule set, not the shipped one.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON as the schemas describe it.")


def target_options(command: F) -> F:
    """Add the options that say what a target is loaded on: --platform, --set, --runner, --rules."""
    for option in (
        rules_option,
        click.option("--runner", type=click.Choice(["target", "draft"]), help="Only this runner."),
        click.option(
            "--set", "settings", metavar="FACT=VALUE", multiple=True, help="A fact that the checkpoint does not tell."
        ),
        click.option("--platform", metavar="NAME|here", help="A preset of platforms.yaml, or this machine."),
    ):
        command = option(command)
    return command


def rules_of(folder: Path | None) -> RuleSet:
    """Return the rule set asked for."""
    return shipped_rules() if folder is None else load_rules(folder)


def parse_settings(settings: tuple[str, ...]) -> dict[str, str]:
    """Split `--set fact=value`; the values are read as YAML by the catalogue's types."""
    result: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--set takes FACT=VALUE, such as parallel.tp_size=8; not `{setting}`")
        if name in result:
            raise click.UsageError(f"--set {name} is given twice")
        result[name] = value
    return result


def facts_of_targets(
    targets: Sequence[str],
    rules: RuleSet,
    platform: str | None,
    settings: tuple[str, ...],
    runner: Runner | None,
) -> Iterator[tuple[str, Facts]]:
    """Yield the facts of each target for each runner that it has, or for the one asked for."""
    values = parse_settings(settings)
    for target in targets:
        checkpoint = open_target(target, rules)
        for one in (runner,) if runner else runners_of(checkpoint):
            yield target, join(checkpoint, runner=one, platform=platform, settings=values, rules=rules)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def set_up_logging() -> None:
    """Send events to stderr: readable on a terminal, JSON lines otherwise."""
    import structlog

    pretty = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer(),
        ],
        # On a terminal the answer on stdout already says it; what is left are warnings and errors.
        wrapper_class=structlog.make_filtering_bound_logger(30 if pretty else 20),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
