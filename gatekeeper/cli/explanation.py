"""An explanation as lines for a person: brief, as it is, or in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import click

from gatekeeper.analysis.answers import Question
from gatekeeper.analysis.changes import Change, Found, Setting, either, listing
from gatekeeper.analysis.explain import Explanation, Obstacle
from gatekeeper.analysis.provenance import Told
from gatekeeper.cli.render import COLOURS, check_text
from gatekeeper.decision import Check, Decision, Outcome
from gatekeeper.errors import one_line
from gatekeeper.values import ABSENT, UNKNOWN, Reading, shown

Level = Literal["brief", "default", "full"]

MARKS = {"passed": "✓", "failed": "✗", "unknown": "?", "waived": "~", "not_applicable": "-"}
MARK_COLOURS = {"passed": "green", "failed": "red", "unknown": "magenta", "waived": "yellow", "not_applicable": None}
ASKED = {"auto": "not asked for", "on": "forced", "off": "forbidden", "both": "forced and forbidden"}
_MAX_CHECKS = 6
_MAX_VALUE = 60
_LISTED = 8
_BRIEF = 3


def brief_lines(title: str, one: Explanation) -> Iterator[str]:
    """Yield what an operator pastes into a ticket: what and why, what would change it, by which rule."""
    decision = one.decision
    reason = f": {decision.reason}" if decision.reason else "."
    yield f"{decision.feature} is {_state(decision)} for {title}{reason}"
    yield from _brief_ways(one)
    place = next((f" ({out.where})" for out in decision.outcomes if out.id == decision.decided_by), "")
    by = f"{decision.decided_by}{place}" if decision.decided_by else f"gate {decision.gate}"
    yield f"Decided by {by}, rule set {_rule_set(decision)}, decision {decision.digest[:12]}."


def _brief_ways(one: Explanation) -> Iterator[str]:
    """Yield one line, or none where the feature is on at its best."""
    if one.answered and one.answered.changes:
        yield f"On with {_brief_changes(one.answered)}."
    elif one.found and one.found.changes:
        yield f"{'Better' if one.decision.state == 'on' else 'To turn it on'}: {_brief_changes(one.found)}."
    elif one.found:
        why = "; ".join(_out_of_hands(one))
        yield f"N{_nothing(one)[1:]}{f': {why}' if why else ''}."


def _brief_changes(found: Found) -> str:
    texts = [f"{_brief_change(change)}{_leads_to(change)}" for change in found.changes]
    more = [f"{len(texts) - _BRIEF} more ways"] if len(texts) > _BRIEF else []
    return "; or ".join([*texts[:_BRIEF], *more])


def _brief_change(change: Change) -> str:
    return str(replace(change, settings=tuple(map(_cut, change.settings))))


def _cut(setting: Setting) -> Setting:
    """Leave out all but a few values of a setting."""
    rest = len(setting.values) - _BRIEF
    values = (*setting.values[:_BRIEF], f"{rest} others") if rest > 1 else setting.values
    return replace(setting, values=values)


def side_by_side(target: str, found: Sequence[Explanation], level: Level) -> Iterator[str]:
    """Yield the explanations of one target for each of its runners; what is the same is said once."""
    groups: list[list[Explanation]] = []
    for one in found:
        group = next((each for each in groups if _essence(each[0]) == _essence(one)), None)
        groups.append([one]) if group is None else group.append(one)
    if len(groups) > 1 and level != "brief":
        yield from _table(found)
        yield ""
    for position, group in enumerate(groups):
        if position:
            yield ""
        title = f"{one_line(target)} ({' and '.join(one.decision.runner for one in group)})"
        layers = {one.decision.runner: ", ".join(part.layers for part in one.layers) for one in group[1:]}
        yield from brief_lines(title, group[0]) if level == "brief" else lines(title, group[0], level)
        for runner, where in layers.items():
            if where and level != "brief":
                yield f"\n  The {runner} is the same, in layers {where}."


def _essence(one: Explanation) -> object:
    """Return what makes two explanations differ, for a person who reads them."""
    decision = one.decision
    outcomes = [
        (each.id, each.option, each.state, [check.actual for check in each.checks]) for each in decision.outcomes
    ]
    return decision.state, decision.option, decision.decided_by, decision.reason, len(one.layers), outcomes


def _table(found: Sequence[Explanation]) -> Iterator[str]:
    """Yield runners as columns: what each came to, and each requirement that did not pass in one of them."""
    columns = [{(out.option, out.id): out for out in one.decision.outcomes} for one in found]
    rows = dict.fromkeys(key for column in columns for key in column)
    rows = {key: None for key in rows if {"failed", "unknown", "waived"} & {c[key].state for c in columns if key in c}}
    names = [found[0].decision.feature, *(f"  {f'{option}: ' if option else ''}{name}" for option, name in rows)]
    width = max(map(len, names)) + 2
    yield " " * width + "".join(f"{one.decision.runner:16}" for one in found).rstrip()
    states = (f"{_state(one.decision):16}" for one in found)
    yield f"{names[0]:{width}}" + "".join(
        click.style(text, fg=COLOURS[one.decision.state]) for text, one in zip(states, found, strict=True)
    )
    for name, key in zip(names[1:], rows, strict=True):
        cells = [column[key].state.replace("_", " ") if key in column else "" for column in columns]
        yield (f"{name:{width}}" + "".join(f"{cell:16}" for cell in cells)).rstrip()


def lines(title: str, one: Explanation, level: Level = "default") -> Iterator[str]:
    """Yield an explanation: the state, each requirement, what would change it; in full also what it rests on."""
    decision = one.decision
    yield f"{click.style(decision.feature, bold=True)} for {title}: {_coloured_state(decision)}"
    if decision.reason:
        yield f"  {decision.reason}"
    yield from _circumstances(one)
    if level == "full":
        yield from _declared(one)
    yield from _requirements(one, level)
    yield from _waits_for(one)
    yield from _changes(one)
    if level == "full":
        yield from _facts(one)


def _circumstances(one: Explanation) -> Iterator[str]:
    decision = one.decision
    asked = ASKED.get(decision.request, f"`{decision.request}` asked for")
    if decision.request == "unknown":
        asked = "whether it is asked for is unknown"
    if decision.request_ignored:
        asked += ", which this gate ignores"
    gate = f"gate {decision.gate}, {one.gate.where.file}:{one.gate.where.line}" if one.gate else "no gate"
    yield click.style(f"  {gate}; {asked}", dim=True)
    if decision.mode == "shadow":
        yield "  in shadow mode: consumers see it as off, whatever is said here"
    for warning in decision.warnings:
        yield click.style(f"  warning: {warning}", fg="yellow")
    if decision.degraded:
        yield f"  degraded: {decision.degraded}"
    if decision.would_be:
        yield f"  as far as is known it would be {decision.would_be}"
    if one.layers:
        parts = [f"{group.first.option or group.first.state} in {group.layers}" for group in one.layers]
        yield f"  layers: {'; '.join(parts)}"
    if decision.outputs:
        yield "  outputs: " + ", ".join(f"{name} = {_plain(value)}" for name, value in decision.outputs.items())


def _declared(one: Explanation) -> Iterator[str]:
    yield click.style(f"  {one.feature.summary}", dim=True)
    refs = dict.fromkeys([*one.feature.refs, *(one.gate.refs if one.gate else ())])
    if refs:
        yield click.style(f"  see {', '.join(refs)}", dim=True)
    yield click.style(f"  rule set {_rule_set(one.decision)}, decision {one.decision.digest}", dim=True)


# ---------------------------------------------------------------------------------------------------- requirements


def _requirements(one: Explanation, level: Level) -> Iterator[str]:
    differing = [group for group in one.layers if group.first.state != "on"]
    groups: list[tuple[str, Sequence[Outcome]]] = [("requirements", one.decision.outcomes)]
    if len({group.first.decided_by for group in differing}) > 1 or (differing and one.decision.state == "mixed"):
        groups = [(f"requirements in {group.layers}", group.first.outcomes) for group in differing]
    for title, outcomes in groups:
        own = [outcome for outcome in outcomes if outcome.option is None]
        if own:
            yield from _heading(title)
            yield from _outcomes(one, own, level)
        for option in one.options:
            yield from _heading(f"option {option.name}: {option.state}")
            if option.degraded:
                yield f"    degraded: {option.degraded}"
            of_option = [outcome for outcome in outcomes if outcome.option == option.name]
            yield from _outcomes(one, of_option, level) if of_option else ["    nothing required"]


def _outcomes(one: Explanation, outcomes: Sequence[Outcome], level: Level) -> Iterator[str]:
    width = max(len(outcome.id) for outcome in outcomes)
    for outcome in sorted(outcomes, key=lambda each: each.state in ("passed", "not_applicable")):
        if level == "full" or outcome.state not in ("passed", "not_applicable"):
            yield from _outcome(one, outcome, level)
        else:
            yield _in_short(one, outcome, width)


def _outcome(one: Explanation, outcome: Outcome, level: Level) -> Iterator[str]:
    was = f", was {outcome.was}" if outcome.was else ""
    state = outcome.state.replace("_", " ")
    place = click.style(f"  {_place(one, outcome)}", dim=True)
    yield f"    {_mark(outcome)} {click.style(outcome.id, bold=True)} {state}{was}, protects {outcome.protects}{place}"
    if outcome.reason and outcome.reason not in one.decision.reason:
        yield f"        {outcome.reason}"
    found = [check for check in outcome.checks if check.truth is not True]
    checks = outcome.checks if level == "full" or not found else found
    # Layers that agree say the same; once is enough.
    told = list(dict.fromkeys((_check(check, outcome), _source(one, check)) for check in checks))
    first = told if level == "full" or not found else told[:_MAX_CHECKS]
    for text, source in first:
        yield f"        {text}"
        if source:
            yield click.style(f"          from {source}", dim=True)
    if len(first) < len(told):
        yield f"        and {len(told) - len(first)} more, which --full shows"
    if level == "full" and one.refs(outcome):
        yield click.style(f"        see {', '.join(one.refs(outcome))}", dim=True)


def _place(one: Explanation, outcome: Outcome) -> str:
    """Say where the rule stands: in the gate, and a shared one in its own file too."""
    file, _, line = outcome.where.rpartition(":")
    here = f"line {line}" if one.gate and file == one.gate.where.file else outcome.where
    shared = one.shared_at(outcome)
    return f"{here}, {shared}" if shared else here


def _check(check: Check, outcome: Outcome) -> str:
    """Say a condition, and what it came to where the outcome does not say so: under `not` and `any`."""
    text = check_text(check)
    expected = {"failed": False, "passed": True}.get(outcome.state, check.truth)
    if check.actual is UNKNOWN or check.truth is expected:
        return text
    return f"{text}: {'not known yet' if check.truth is None else 'holds' if check.truth else 'does not hold'}"


def _source(one: Explanation, check: Check) -> str:
    told = next((fact for fact in one.facts if fact.name == check.fact and fact.derived), None)
    if told is None:
        parts = [one_line(text) for text in (check.witness, check.note) if text]
    else:
        parts = [_derivation(one, told), *([one_line(check.note)] if check.note else [])]
    return "; ".join(parts)


def _in_short(one: Explanation, outcome: Outcome, width: int) -> str:
    checks = [check for check in outcome.checks if check.truth is (outcome.state == "passed")] or outcome.checks
    told = "; ".join(dict.fromkeys(f"{check.fact} is {_short(shown(check.actual))}" for check in checks[:3]))
    if len(checks) > 3:
        told += "; …"
    if outcome.state == "not_applicable":
        told = f"does not apply: {told}"
    places = [check.witness for check in checks[:1] if check.witness and not check.witness.startswith("derived: ")]
    end = click.style(f"  [{'; '.join([*places, _place(one, outcome)])}]", dim=True)
    return f"    {_mark(outcome)} {outcome.id:{width}}  {told}{end}"


# ---------------------------------------------------------------------------------------- what would change it


def _waits_for(one: Explanation) -> Iterator[str]:
    if not one.questions:
        return
    yield from _heading("waits for")
    width = max(len(question.fact) for question in one.questions)
    for question in one.questions:
        yield f"    {question.fact:{width}}  {_how(question)}"
    if one.answered is None:
        return
    for change in one.answered.changes:
        yield f"    {click.style('on', fg='green')} with {_settings(change)}{_leads_to(change)}"
    if not one.answered.changes:
        yield "    no answer that was tried turns it on by itself"
    yield from _bound(one.answered)


def _how(question: Question) -> str:
    ways = " or ".join(question.given_by) or "nothing that can be given here"
    if question.fact == "layers" or question.fact.startswith("layer."):
        ways = "name a checkpoint folder with its safetensors, not a config alone"
    note = f"; {question.note}" if question.note else ""
    return f"{ways}{click.style(f'  [known from stage {question.stage} on{note}]', dim=True)}"


def _changes(one: Explanation) -> Iterator[str]:
    found = one.found
    if found is None:
        return
    if found.changes:
        yield from _heading("a better option" if one.decision.state == "on" else "to turn it on")
        for change in found.changes[:_LISTED]:
            yield f"    {_settings(change)}{_leads_to(change)}"
        if len(found.changes) > _LISTED:
            yield f"    and {len(found.changes) - _LISTED} more, which --json lists"
    elif not (one.answered and one.answered.changes):
        yield from _heading(_nothing(one))
        for text in _out_of_hands(one):
            yield f"    {text}"
    yield from _bound(found)
    if one.withdrawn:
        yield from _heading("to do without it")
        for setting, state in one.withdrawn:
            yield f"    {setting} → {click.style(state, fg=COLOURS[state])}"


def _nothing(one: Explanation) -> str:
    better = "gives a better option" if one.decision.state == "on" else "turns it on"
    return f"nothing that you can set {better}"


def _out_of_hands(one: Explanation) -> Iterator[str]:
    """Say of each thing in the way why it stays there, or what it would take."""
    if one.decision.decided_by == "no-gate":
        names = [fact.name for fact in one.facts if fact.name not in one.feature.request.names]
        yield f"which gate applies rests on {_by_whom(one, names)}"
    for obstacle in one.obstacles:
        yield _obstacle(one, obstacle)


def _obstacle(one: Explanation, obstacle: Obstacle) -> str:
    name = f"`{obstacle.outcome.id}`"
    if obstacle.outcome.option:
        name += f" of {obstacle.outcome.option}"
    if obstacle.settings:
        return f"{name} would pass: {'; or '.join(map(str, obstacle.settings))}"
    if obstacle.outcome.state == "unknown":
        return f"{name} waits for {_named(obstacle.unknown)}"
    if obstacle.tried:
        return f"{name} passes with no value of {_named(obstacle.tried)}"
    return f"{name} rests on {_by_whom(one, obstacle.given)}"


def _by_whom(one: Explanation, names: Sequence[str]) -> str:
    """Say who answers for some facts: `a` and `b`, which the checkpoint says."""
    told = {fact.name: fact.said_by for fact in one.facts}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(told[name], []).append(f"`{name}`")
    return ", and on ".join(f"{listing(found)}, which {who} says" for who, found in groups.items()) or "no fact"


def _settings(change: Change) -> str:
    return " and ".join(map(str, change.settings))


def _leads_to(change: Change) -> str:
    option = f" → {change.option}" if change.option else ""
    return option + _price(change)


def _price(change: Change) -> str:
    waives = f", which waives {_named(change.waives)}" if change.waives else ""
    degraded = f" (degraded: {change.degraded.rstrip('.')})" if change.degraded else ""
    return waives + degraded


def _bound(found: Found) -> Iterator[str]:
    if not found.complete:
        yield f"    the search stopped after {found.decisions} decisions: there may be more, or smaller sets of them"


def _named(names: Sequence[str]) -> str:
    return either([f"`{name}`" for name in names])


# ----------------------------------------------------------------------------------------------------------- facts


def _facts(one: Explanation) -> Iterator[str]:
    if not one.facts:
        return
    yield from _heading("facts")
    by_name = {told.name: told for told in one.facts}
    inputs = {name for told in one.facts for name in told.inputs}
    for told in one.facts:
        if told.name not in inputs:
            yield from _fact(by_name, told, 0)
    if one.defaults:
        yield from _heading("assumed: not set, hence at their defaults")
        yield f"    {', '.join(one.defaults)}"


def _fact(facts: dict[str, Told], told: Told, depth: int) -> Iterator[str]:
    indent = "    " + "  " * depth
    for layers, reading in told.readings:
        where = f" in {layers}" if layers else ""
        yield f"{indent}{told.name} = {_value(reading)}{where}{click.style(_from(told, reading), dim=True)}"
    for name in told.inputs:
        yield from _fact(facts, facts[name], depth + 1)


def _from(told: Told, reading: Reading) -> str:
    parts = [told.derived or reading.witness, reading.note]
    text = one_line("; ".join(part for part in parts if part))
    return f"  [{text}]" if text else ""


def _derivation(one: Explanation, told: Told) -> str:
    by_name = {fact.name: fact for fact in one.facts}
    inputs = [f"{name} = {_value(by_name[name].readings[0][1])}" for name in told.inputs]
    return f"{told.derived}, where {', '.join(inputs)}"


# ------------------------------------------------------------------------------------------------------- small words


def _heading(text: str) -> Iterator[str]:
    yield ""
    yield f"  {click.style(text, bold=True)}"


def _mark(outcome: Outcome) -> str:
    return click.style(MARKS[outcome.state], fg=MARK_COLOURS[outcome.state])


def _state(decision: Decision) -> str:
    return f"{decision.state} with {decision.option}" if decision.option else decision.state


def _coloured_state(decision: Decision) -> str:
    return click.style(_state(decision), fg=COLOURS[decision.state], bold=True)


def _rule_set(decision: Decision) -> str:
    return f"{decision.rule_set['name']} {decision.rule_set['version']} ({decision.rule_set['digest'][:12]})"


def _value(reading: Reading) -> str:
    return _short(shown(reading.value))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"


def _plain(value: Any) -> str:
    return shown(ABSENT if value is None else tuple(value) if isinstance(value, list) else value)
