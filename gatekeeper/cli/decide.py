"""`gatekeeper decide`: features of checkpoints, configs, or lines of facts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from gatekeeper.cli import BAD_NEWS, INCOMPLETE
from gatekeeper.cli.options import facts_of_targets, json_option, print_json, rules_of, set_up_logging, target_options
from gatekeeper.cli.render import decision_lines
from gatekeeper.decide import decide
from gatekeeper.decision import Decision
from gatekeeper.errors import FactError, GatekeeperError
from gatekeeper.facts import Runner, from_record
from gatekeeper.rules import RuleSet
from gatekeeper.source import check_data


@click.command("decide", short_help="Decide features for checkpoints, configs or lines of facts.")
@click.argument("targets", nargs=-1, metavar="TARGET...")
@target_options
@click.option("--feature", "features", multiple=True, metavar="NAME", help="Only this feature.")
@click.option("--facts", "lines", type=click.File("r", encoding="utf-8"), help="Lines of facts; - reads stdin.")
@click.option("--strict", is_flag=True, help="Exit 3 where a decision is pending.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    targets: tuple[str, ...],
    platform: str | None,
    settings: tuple[str, ...],
    runner: Runner | None,
    rules_folder: Path | None,
    features: tuple[str, ...],
    lines: IO[str] | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Decide every feature (or those named) for each TARGET: a checkpoint folder or a config.json.

    Flags that are not set are at their defaults; without --platform the platform is unknown.
    """
    if bool(targets) == (lines is not None):
        raise click.UsageError("name at least one TARGET, or --facts FILE")
    set_up_logging()
    rules = rules_of(rules_folder)
    chosen = features or None
    if lines is not None:
        if not as_json:
            raise click.UsageError("--facts answers a line of JSON for each line; add --json")
        if platform or settings or runner:
            raise click.UsageError("--facts lines say it all themselves; leave --platform, --set and --runner out")
        context.exit(_decide_lines(rules, lines, chosen, strict))
    answers: list[dict[str, Any]] = []
    found: list[Decision] = []
    for target, facts in facts_of_targets(targets, rules, platform, settings, runner):
        decisions = decide(rules, facts, chosen)
        found += decisions.values()
        answers.append(
            {"target": target, "runner": facts.runner, "decisions": [one.to_json() for one in decisions.values()]}
        )
        if not as_json:
            click.echo(click.style(f"{target} ({facts.runner})", bold=True))
            for decision in decisions.values():
                for line in decision_lines(decision):
                    click.echo(line)
            click.echo()
    if as_json:
        print_json(answers)
    context.exit(_exit_code(found, strict))


def _exit_code(decisions: list[Decision], strict: bool) -> int:
    if any(one.state == "error" for one in decisions):
        return BAD_NEWS
    return INCOMPLETE if strict and any(_is_pending(one) for one in decisions) else 0


def _is_pending(decision: Decision) -> bool:
    return decision.state == "pending" or any(layer.state == "pending" for layer in decision.layers or ())


def _decide_lines(rules: RuleSet, lines: IO[str], features: tuple[str, ...] | None, strict: bool) -> int:
    """Answer a line for each line, in order; return the exit code."""
    decided: list[Decision] = []
    broken = False
    for number, text in _lines(lines):
        record: Any = None
        try:
            record = _parse(text, f"{lines.name}:{number}")
            answer = list(decide(rules, from_record(rules.catalogue, record), features).values())
            decided += answer
            result: dict[str, Any] = {"decisions": [one.to_json() for one in answer]}
        except GatekeeperError as error:
            broken = True
            result = {"error": str(error)}
        name = record.get("id", number) if isinstance(record, dict) else number
        click.echo(json.dumps({"id": name, **result}, ensure_ascii=False))
    return BAD_NEWS if broken else _exit_code(decided, strict)


def _lines(stream: IO[str]) -> Iterator[tuple[int, str]]:
    try:
        for number, text in enumerate(stream, 1):
            if text.strip():
                yield number, text
    except UnicodeDecodeError as error:
        raise FactError(f"{stream.name} is not UTF-8 text: {error.reason}") from None


def _parse(text: str, place: str) -> Any:
    try:
        record = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FactError(f"{place}: not a line of JSON: {error}") from None
    faults = check_data(record, "record", place)
    if faults:
        raise FactError("; ".join(f"{place}: {fault.message}" for fault in faults))
    return record


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"`{word}` is not a number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"`{twice}` stands twice")
    return result
