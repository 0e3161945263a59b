"""`gatekeeper decide`: features of checkpoints, configs, or lines of facts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

import click

from gatekeeper.cli import BAD_NEWS, INCOMPLETE, say_error
from gatekeeper.cli.options import (
    check_features,
    facts_of_targets,
    json_option,
    json_text,
    print_json,
    rules_of,
    set_up_logging,
    target_options,
)
from gatekeeper.cli.render import decision_lines
from gatekeeper.decide import decide
from gatekeeper.decision import Decision
from gatekeeper.errors import FactError, GatekeeperError, one_line
from gatekeeper.facts import Runner, from_record
from gatekeeper.rules import RuleSet
from gatekeeper.source import check_data


class _Lines(click.File):
    """A file to read; a stdin that was closed is wrong usage, not a crash of click."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "-" and sys.stdin is None:
            self.fail("stdin is closed; name a file", param, ctx)
        return super().convert(value, param, ctx)


@click.command("decide", short_help="Decide features for checkpoints, configs or lines of facts.")
@click.argument("targets", nargs=-1, metavar="TARGET...")
@target_options
@click.option("--feature", "features", multiple=True, metavar="NAME", help="Only this feature.")
@click.option("--facts", "lines", metavar="FILE|-", type=_Lines("rb"), help="Lines of facts; - reads stdin.")
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
    overlays: tuple[Path, ...],
    features: tuple[str, ...],
    lines: IO[bytes] | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Decide every feature (or those named) for each TARGET: a checkpoint folder or a config.json.

    Flags that are not set are at their defaults; without --platform the platform is unknown.
    """
    if bool(targets) == (lines is not None):
        raise click.UsageError("name at least one TARGET, or --facts FILE")
    set_up_logging()
    rules = rules_of(rules_folder, overlays)
    check_features(rules, features)
    chosen = features or None
    if lines is not None:
        if not as_json:
            raise click.UsageError("--facts answers a line of JSON for each line; add --json")
        if platform or settings or runner:
            raise click.UsageError("--facts lines say it all themselves; leave --platform, --set and --runner out")
        context.exit(_decide_lines(rules, lines, chosen, strict))
    answers: list[dict[str, Any]] = []
    found: list[Decision] = []
    torn = False
    for target in targets:
        try:
            for _, facts in facts_of_targets([target], rules, platform, settings, runner):
                decisions = list(decide(rules, facts, chosen).values())
                found += decisions
                answers.append(
                    {"target": target, "runner": facts.runner, "decisions": [one.to_json() for one in decisions]}
                )
                if not as_json:
                    _say(f"{target} ({facts.runner})", decisions)
        except GatekeeperError as error:  # the other targets get their answers all the same
            torn = True
            answers.append({"target": target, "error": str(error)})
            named = len(targets) == 1 or str(error).startswith(f"`{target}")
            say_error(error if named else f"`{target}`: {error}")
    if as_json:
        print_json(answers)
    context.exit(BAD_NEWS if torn else _exit_code(found, strict))


def _say(title: str, decisions: list[Decision]) -> None:
    click.echo(click.style(one_line(title), bold=True))
    for decision in decisions:
        for line in decision_lines(decision):
            click.echo(line)
    click.echo()


def _exit_code(decisions: list[Decision], strict: bool) -> int:
    if any(one.in_force.state == "error" for one in decisions):
        return BAD_NEWS
    return INCOMPLETE if strict and any(_is_pending(one) for one in decisions) else 0


def _is_pending(decision: Decision) -> bool:
    return decision.state == "pending" or any(layer.state == "pending" for layer in decision.layers or ())


def _decide_lines(rules: RuleSet, lines: IO[bytes], features: tuple[str, ...] | None, strict: bool) -> int:
    """Answer a line for each line, in order; return the exit code."""
    decided: list[Decision] = []
    broken = False
    file = getattr(lines, "name", "<stdin>")
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        name: str | int = number
        try:
            record = _parse(raw)
            name = _name(record, number)
            _check(record)
            answer = list(decide(rules, from_record(rules.catalogue, record), features).values())
            decided += answer
            result: dict[str, Any] = {"decisions": [one.to_json() for one in answer]}
        except GatekeeperError as error:
            broken = True
            result = {"error": f"{file}:{number}: {error}"}
        click.echo(json_text({"id": name, **result}))
    return BAD_NEWS if broken else _exit_code(decided, strict)


def _parse(raw: bytes) -> Any:
    try:
        record = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
        json.dumps(record, ensure_ascii=False).encode()  # lone surrogates can't be written back
    except UnicodeDecodeError:
        raise FactError("not UTF-8 text; write the line again as UTF-8") from None
    except UnicodeEncodeError:
        raise FactError("not Unicode text; a lone surrogate is no character") from None
    except RecursionError:
        raise FactError("nested too deep for a line of facts") from None
    except json.JSONDecodeError as error:
        hint = "write each record in one line"
        raise FactError(f"not a line of JSON: {error.msg} at column {error.pos + 1}; {hint}") from None
    except ValueError as error:
        raise FactError(f"not a line of JSON: {error}") from None
    return record


def _name(record: Any, number: int) -> str | int:
    """Return the `id` that the line gave itself, else its number."""
    name = record.get("id") if isinstance(record, dict) else None
    return name if isinstance(name, str | int) and not isinstance(name, bool) else number


def _check(record: Any) -> None:
    try:
        faults = check_data(record, "record", "")
    except RecursionError:
        raise FactError("nested too deep for a line of facts") from None
    if faults:
        raise FactError("; ".join(fault.message for fault in faults))


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"`{word}` is not a number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"`{twice}` stands twice")
    return result
