"""Decisions and facts as lines for a person; colours only where click finds a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from gatekeeper.decision import Check, Decision, Outcome, ranges
from gatekeeper.errors import one_line
from gatekeeper.operators import OPERATORS
from gatekeeper.values import shown

COLOURS = {"on": "green", "off": "yellow", "mixed": "cyan", "pending": "magenta", "error": "red"}
_MAX_CHECKS = 4


def decision_lines(decision: Decision) -> Iterator[str]:
    """Yield a decision: its state, then each requirement that did not simply pass."""
    state = click.style(decision.state, fg=COLOURS[decision.state], bold=True)
    chosen = f" {decision.option}" if decision.option else ""
    by = f" by {decision.decided_by}" if decision.decided_by else ""
    gate = f"gate {decision.gate}" if decision.gate else "no gate"
    yield f"  {decision.feature}: {state}{chosen}{by}  ({gate}, request {decision.request})"
    if decision.reason:
        yield f"    {decision.reason}"
    if decision.mode == "shadow":
        yield "    in shadow mode: consumers see it as off, whatever is said here"
    for warning in decision.warnings:
        yield click.style(f"    warning: {one_line(warning)}", fg="yellow")
    if decision.degraded:
        yield f"    degraded: {decision.degraded}"
    if decision.would_be:
        yield f"    would be: {decision.would_be}"
    if decision.request_ignored:
        yield "    warning: the request is ignored, this gate does not take one"
    yield from _layer_lines(decision)
    for outcome in decision.outcomes:
        if outcome.state in ("failed", "unknown", "waived"):
            yield from _outcome_lines(outcome)
    if decision.outputs:
        yield "    " + ", ".join(f"{name} = {_plain(value)}" for name, value in decision.outputs.items())
    if decision.assumed["assume"]:
        yield f"    assumed to be at their defaults: {', '.join(decision.assumed['assume'])}"


def _layer_lines(decision: Decision) -> Iterator[str]:
    groups: dict[tuple[str, str | None], list[int]] = {}
    for position, layer in enumerate(decision.layers or ()):
        index = position if layer.index is None else layer.index
        groups.setdefault((layer.state, layer.option), []).append(index)
    if groups:
        parts = [f"{option or state} in {ranges(found)}" for (state, option), found in groups.items()]
        yield f"    layers: {'; '.join(parts)}"


def _outcome_lines(outcome: Outcome) -> Iterator[str]:
    mark = {"failed": "✗", "unknown": "?", "waived": "~"}[outcome.state]
    was = f" (waived, was {outcome.was})" if outcome.was else ""
    option = f" of option {outcome.option}" if outcome.option else ""
    known = f" (known from stage {outcome.resolves_at} on)" if outcome.resolves_at else ""
    yield f"    {mark} {outcome.id}{option} [{outcome.protects}]{was}{known}  {outcome.where}"
    told = [check for check in outcome.checks if check.truth is not True]
    for check in told[:_MAX_CHECKS]:
        yield f"        {check_text(check)}"
        places = [one_line(text) for text in (check.witness, check.note) if text]
        if places:
            yield click.style(f"          from {'; '.join(places)}", dim=True)
    if len(told) > _MAX_CHECKS:
        yield f"        and {len(told) - _MAX_CHECKS} more"


def check_text(check: Check) -> str:
    """Say one atomic condition: the value, and what was expected."""
    if check.operator == "absent":
        phrase = "expected none" if check.expected else "expected any"
    else:
        right = check.expected
        other = f"`{right['fact']}`" if isinstance(right, dict) and set(right) == {"fact"} else _plain(right)
        phrase = f"{OPERATORS[check.operator].phrase} {other}"
    return f"{check.fact} is {shown(check.actual)}, {phrase}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else one_line(str(value))
