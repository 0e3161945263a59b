"""What an operator can change so that a feature is on: the smallest sets of settings, each proven by deciding again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from gatekeeper.conditions import facts_of
from gatekeeper.decision import Decision, Outcome
from gatekeeper.errors import FactError
from gatekeeper.facts import Facts
from gatekeeper.rules import Gate, Requirement, RuleSet
from gatekeeper.values import Missing, Value, plain, shown

MAX_SIZE = 4
"""Settings in one change; more is another deployment, not a change."""
MAX_DECISIONS = 1000

Again: TypeAlias = Callable[[Facts], Decision]
"""Decides the feature for other facts, without an event and without remedies."""


@dataclass(frozen=True, slots=True)
class Move:
    """One thing that can be set: a value of a fact, a fact taken back, or a whole preset."""

    axis: str
    """What is set: a fact, or `--platform`. Two moves of one axis exclude each other."""
    value: Value | None
    """None takes back what was set by hand."""
    sets: tuple[tuple[str, Value | Missing | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One axis of a change, with every value of it that does."""

    axis: str
    values: tuple[Value, ...]
    unset: bool
    """Taking back what was set by hand does it too."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"set": self.axis, "values": [plain(value) for value in self.values], "unset": self.unset}

    def __str__(self) -> str:
        name = self.axis if self.axis.startswith("--") else f"`{self.axis}`"
        if not self.values:
            return f"unset {name}"
        words = [*map(shown, self.values), *(["unset"] if self.unset else [])]
        return f"{name} {either(words)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Settings that turn the feature on, all of them together; of each, any of its values."""

    settings: tuple[Setting, ...]
    option: str | None
    degraded: str
    """What is lost with the option that it leads to."""
    waives: tuple[str, ...]
    """Requirements that did not pass and that a request then sets aside."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "settings": [one.to_json() for one in self.settings],
            "option": self.option,
            "degraded": self.degraded or None,
            "waives": list(self.waives),
        }

    def __str__(self) -> str:
        taken_back = [f"`{one.axis}`" for one in self.settings if not one.values]
        unset = [f"unset {listing(taken_back)}"] if taken_back else []
        return " and ".join([*unset, *(str(one) for one in self.settings if one.values)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to."""

    changes: tuple[Change, ...]
    """The smallest that cost nothing, then the smallest that degrade or waive; either may be missing."""
    decisions: int
    """How often it was decided again."""
    size: int
    """Sets of up to so many settings were tried, all of them where `complete`."""
    complete: bool
    """False: the search stopped at its bound, and there may be more."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "found": [one.to_json() for one in self.changes],
            "decisions": self.decisions,
            "size": self.size,
            "complete": self.complete,
        }


class Search:
    """Breadth first over sets of moves; a set grows only by what the decision that it leads to rests on.

    That loses nothing: whatever keeps a feature from being on (a requirement, its request, which gate applies) stays
    as it is until one of the facts that it is decided from changes, so every larger set that works has one of them.
    """

    def __init__(
        self,
        rules: RuleSet,
        facts: Facts,
        decision: Decision,
        again: Again,
        moves: Callable[[str], Iterable[Move]],
    ) -> None:
        self._rules = rules
        self._facts = facts
        self._start = decision
        self._again = again
        self._moves = moves
        self._gates = rules.gates[decision.feature]
        self._request = frozenset(rules.features[decision.feature].request.names)
        self._applies = frozenset().union(*(facts_of(gate.applies_to) for gate in self._gates))
        self._known_moves: dict[str, tuple[Move, ...]] = {}
        self._waived = _waived(decision)

    def run(self) -> Found:
        """Return the smallest changes."""
        level: dict[frozenset[Move], Decision | None] = {frozenset(): self._start}
        free: list[_Hit] = []
        priced: list[_Hit] = []
        decisions = size = 0
        complete = True
        while level and size < MAX_SIZE and not free and complete:
            size += 1
            deeper: dict[frozenset[Move], Decision | None] = {}
            for chosen in self._larger(level):
                if chosen in deeper:
                    continue
                if decisions == MAX_DECISIONS:
                    complete = False
                    break
                decisions += 1
                deeper[chosen] = self._try(chosen)
            hits = [self._hit(chosen, one) for chosen, one in deeper.items() if one is not None and one.state == "on"]
            free = [hit for hit in hits if not hit.price]
            priced = priced or [hit for hit in hits if hit.price and self._better(hit)]
            level = deeper
        changes = (*_grouped(free), *_grouped(priced))
        return Found(changes=changes, decisions=decisions, size=size, complete=complete)

    def _larger(self, level: Mapping[frozenset[Move], Decision | None]) -> Iterator[frozenset[Move]]:
        for chosen, decision in level.items():
            taken = {move.axis for move in chosen}
            for move in self._worth_trying(decision):
                if move.axis not in taken:
                    yield chosen | {move}

    def _worth_trying(self, decision: Decision | None) -> tuple[Move, ...]:
        """Return the moves that one cause of a decision leaves, of the cause that leaves the fewest."""
        found = [self._moves_of(cause) for cause in self._causes(decision)]
        return min(found, key=len)

    def _moves_of(self, names: Iterable[str]) -> tuple[Move, ...]:
        moves: dict[Move, None] = {}
        for name in sorted(self._rules.catalogue.inputs(names)):
            if name not in self._known_moves:
                self._known_moves[name] = tuple(self._moves(name))
            moves |= dict.fromkeys(self._known_moves[name])
        return tuple(moves)

    def _causes(self, decision: Decision | None) -> Iterator[frozenset[str]]:
        """Yield sets of facts; the decision can't get better before one fact of each set changes."""
        everything = self._rules.catalogue.decided_from[self._start.feature]
        if decision is None:
            yield everything
        elif decision.decided_by == "layers":
            yield frozenset()  # no setting brings layers
        elif decision.decided_by == "request":
            yield self._request | self._applies
        elif decision.decided_by == "no-gate":
            yield self._applies
        else:
            yield everything
            yield from self._unmet(decision)

    def _unmet(self, decision: Decision) -> Iterator[frozenset[str]]:
        gate = next(gate for gate in self._gates if gate.name == decision.gate)
        on = decision.state == "on"
        own = [one for one in decision.outcomes if one.option is None and one.state in ("failed", "unknown")]
        new = _waived(decision) - self._waived if on else frozenset()
        for one in (*own, *(one for one in decision.outcomes if one.id in new)):
            rule = requirement_of(gate, one)
            yield facts_of_rule(rule) | self._applies | (self._request if rule.waivable else frozenset())
        by_option = not own and any(one.option for one in decision.outcomes)
        if by_option and (decision.degraded or not on):
            demands = [rule for option in gate.options for rule in option.requires]
            yield frozenset().union(*map(facts_of_rule, demands)) | self._applies | self._request

    def _try(self, chosen: frozenset[Move]) -> Decision | None:
        """Decide again; None where the facts contradict each other then."""
        try:
            return self._again(self._facts.with_facts({name: value for move in chosen for name, value in move.sets}))
        except FactError:
            return None

    def _hit(self, chosen: frozenset[Move], decision: Decision) -> _Hit:
        waives = tuple(sorted(_waived(decision) - self._waived))
        return _Hit(chosen, decision.option, decision.degraded, waives)

    def _better(self, hit: _Hit) -> bool:
        """Whether a change that costs something is worth telling: not if it is on, and degraded, as it stands."""
        return self._start.state != "on" or not hit.degraded


@dataclass(frozen=True, slots=True)
class _Hit:
    moves: frozenset[Move]
    option: str | None
    degraded: str
    waives: tuple[str, ...]

    @property
    def price(self) -> bool:
        return bool(self.degraded or self.waives)


def _waived(decision: Decision) -> frozenset[str]:
    """What a request set aside, in any layer."""
    scopes = [(decision.option, decision.outcomes), *((one.option, one.outcomes) for one in decision.layers or ())]
    return frozenset(
        one.id
        for option, outcomes in scopes
        for one in outcomes
        if one.state == "waived" and one.option in (None, option)
    )


def _grouped(hits: Iterable[_Hit]) -> list[Change]:
    """Join hits that differ in one axis only, so that its values stand together."""
    groups: dict[tuple[tuple[tuple[str, frozenset[Move]], ...], _Hit], None] = {}
    for hit in hits:
        axes = tuple(sorted((move.axis, frozenset([move])) for move in hit.moves))
        groups[axes, replace(hit, moves=frozenset())] = None
    for position in range(MAX_SIZE):
        joined: dict[tuple[object, ...], tuple[tuple[tuple[str, frozenset[Move]], ...], _Hit]] = {}
        for axes, end in groups:
            if position >= len(axes):
                joined[axes, end] = (axes, end)
                continue
            name, moves = axes[position]
            key = (axes[:position], name, axes[position + 1 :], end)
            before = joined[key][0][position][1] if key in joined else frozenset()
            joined[key] = ((*axes[:position], (name, before | moves), *axes[position + 1 :]), end)
        groups = dict.fromkeys(joined.values())
    changes = [
        Change(
            settings=tuple(map(_setting, axes)),
            option=end.option,
            degraded=end.degraded,
            waives=end.waives,
        )
        for axes, end in groups
    ]
    return sorted(changes, key=lambda one: (len(one.waives), bool(one.degraded), len(one.settings), str(one)))


def _setting(axis: tuple[str, frozenset[Move]]) -> Setting:
    name, moves = axis
    values = [move.value for move in moves if move.value is not None]
    return Setting(axis=name, values=in_order(values), unset=any(move.value is None for move in moves))


def in_order(values: Iterable[Value]) -> tuple[Value, ...]:
    """Return values as a person lists them: numbers by size, else by their text."""
    return tuple(sorted(values, key=lambda one: (one, "") if isinstance(one, int | float) else (0, shown(one))))


def either(words: Sequence[str]) -> str:
    """Return `1, 2 or 4`."""
    return _joined(words, "or")


def listing(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return _joined(words, "and")


def _joined(words: Sequence[str], last: str) -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def requirement_of(gate: Gate, outcome: Outcome) -> Requirement:
    """Return the rule that an outcome is of."""
    requires = next((one.requires for one in gate.options if one.name == outcome.option), gate.requires)
    return next(one for one in requires if one.id == outcome.id)


def facts_of_rule(rule: Requirement) -> frozenset[str]:
    """Return every fact that a requirement reads."""
    return facts_of(rule.when) | facts_of(rule.that)


def controls(facts: Facts, name: str) -> Iterator[Move]:
    """Yield what an operator can set a fact to: the catalogue's `controllable`, and back to what it is by itself."""
    spec = facts.catalogue[name]
    if not spec.controllable or facts.catalogue.is_layer_fact(name):
        return
    now: Value | Missing = facts.reading(name).value
    by_hand = name in facts.given and not isinstance(facts.given[name].value, Missing)
    unset = facts.with_facts({name: None}).reading(name).value if by_hand else now
    # Taken back it is always at that value, so setting it to the same is no other change.
    alone = facts.catalogue.inputs([name]) == {name}
    for value in spec.controllable:
        if value != now and not (alone and value == unset):
            yield Move(name, value, ((name, value),))
    if unset != now:
        yield Move(name, None, ((name, None),))


def turn_on(rules: RuleSet, facts: Facts, decision: Decision, again: Again) -> Found:
    """Search the smallest changes of controllable facts that turn a feature on, or better a degraded option."""
    return Search(rules, facts, decision, again, lambda name: controls(facts, name)).run()


def without_request(rules: RuleSet, facts: Facts, decision: Decision, again: Again) -> list[tuple[Setting, str]]:
    """Return the settings of the request alone that end an error without turning the feature on, and the state then."""
    names = rules.catalogue.inputs(rules.features[decision.feature].request.names)
    found: dict[tuple[str, str], frozenset[Move]] = {}
    for move in (move for name in sorted(names) for move in controls(facts, name)):
        try:
            state = again(facts.with_facts(dict(move.sets))).state
        except FactError:
            continue
        if state not in ("error", "on"):
            found[move.axis, state] = found.get((move.axis, state), frozenset()) | {move}
    return [(_setting((axis, moves)), state) for (axis, state), moves in found.items()]


def passing(outcome: Outcome, facts: Facts, again: Again, *, unset: bool = True) -> list[Setting]:
    """Return the single settings with which one requirement passes, whatever else then fails."""
    moves: dict[str, frozenset[Move]] = {}
    for name in sorted(facts.catalogue.inputs(check.fact for check in outcome.checks)):
        for move in controls(facts, name) if unset else _values(facts, name):
            if _passes(outcome, facts, again, move):
                moves[name] = moves.get(name, frozenset()) | {move}
    return [_setting(one) for one in moves.items()]


def _values(facts: Facts, name: str) -> Iterator[Move]:
    for value in facts.catalogue[name].controllable:
        if value != facts.reading(name).value:
            yield Move(name, value, ((name, value),))


def _passes(outcome: Outcome, facts: Facts, again: Again, move: Move) -> bool:
    try:
        decision = again(facts.with_facts(dict(move.sets)))
    except FactError:
        return False
    states = [(one.id, one.option, one.state) for one in decision.outcomes]
    return any((outcome.id, outcome.option, state) in states for state in ("passed", "not_applicable"))


def with_remedies(decision: Decision, facts: Facts, again: Again) -> Decision:
    """Let an error say which controllable facts would make the failed requirement pass; each is tried by `again`."""
    culprit = next((one for one in decision.outcomes if one.id == decision.decided_by), None)
    if decision.state != "error" or culprit is None:
        return decision
    found = passing(culprit, facts, again, unset=False)
    if not found:
        return decision
    listed = ", or with ".join(map(str, found))
    return replace(decision, reason=f"{decision.reason} `{culprit.id}` passes with {listed}.")
