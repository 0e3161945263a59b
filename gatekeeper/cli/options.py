"""Options that several commands share, and what they set up."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from gatekeeper.errors import FactError
from gatekeeper.facts import Facts, Runner
from gatekeeper.load import load_rules, shipped_rules
from gatekeeper.providers.flags import read_flags
from gatekeeper.providers.platform import read_platform
from gatekeeper.reading import join, open_target, runners_of
from gatekeeper.rules import RuleSet
from gatekeeper.source import nearest
from gatekeeper.values import Missing

F = TypeVar("F", bound=Callable[..., Any])

_rules_options = (
    click.option(
        "--overlay",
        "overlays",
        metavar="DIR",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Lay this rule set over it; several in their order.",
    ),
    click.option(
        "--rules",
        "rules_folder",
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="Use this rule set, not the shipped one.",
    ),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON as the schemas describe it.")


def rules_option(command: F) -> F:
    """Add the options that say by which rules: --rules and --overlay."""
    for option in _rules_options:
        command = option(command)
    return command


def target_options(command: F) -> F:
    """Add the options that say what a target is loaded on: --platform, --set, --runner; and those of the rules."""
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


def rules_of(folder: Path | None, overlays: Sequence[Path] = ()) -> RuleSet:
    """Return the rule set asked for."""
    return load_rules(folder, overlays) if folder or overlays else shipped_rules()


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
    _check_usage(rules, platform, values)
    for target in targets:
        checkpoint = open_target(target, rules)
        for one in (runner,) if runner else runners_of(checkpoint):
            yield target, join(checkpoint, runner=one, platform=platform, settings=values, rules=rules)


def _check_usage(rules: RuleSet, platform: str | None, values: Mapping[str, str]) -> None:
    """Refuse what is wrong with every target alike before any is opened: that is wrong usage."""
    try:
        for name, reading in read_flags(values, rules.catalogue).items():
            if not isinstance(reading.value, Missing):
                rules.catalogue.coerce(name, reading.value)
        if platform not in (None, "here"):
            read_platform(platform, rules.platforms, rules.catalogue)
    except FactError as error:
        raise click.UsageError(str(error)) from None


def check_features(rules: RuleSet, names: Sequence[str]) -> None:
    """Refuse a `--feature` that the rule set does not have."""
    for name in names:
        if name not in rules.features:
            hint = nearest(name, rules.features) or f"; there are {', '.join(rules.features)}"
            raise click.UsageError(f"unknown feature `{name}`{hint}")


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON; characters beyond ASCII are escaped where stdout is not UTF-8."""
    plain = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    return json.dumps(value, indent=indent, ensure_ascii=plain)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json_text(value, indent=2))


def set_up_logging() -> None:
    """Send events to stderr: readable on a terminal, JSON lines otherwise."""
    import structlog

    # Whoever closed stderr wants no events: Python then has none.
    stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    pretty = stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer(),
        ],
        # On a terminal the answer on stdout already says it; what is left are warnings and errors.
        wrapper_class=structlog.make_filtering_bound_logger(30 if pretty else 20),
        logger_factory=structlog.PrintLoggerFactory(stderr),
    )
