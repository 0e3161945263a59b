"""The gallery: gates of other engines, each with a table that has seen every requirement pass and fail."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from gatekeeper import RuleSet, load_rules
from gatekeeper.log import quiet
from gatekeeper.rules import Gate
from gatekeeper.tables import find_tables, read_table, run_row

ROOT = Path(__file__).resolve().parent.parent
GALLERY = ROOT / "rules" / "gallery"
ENGINES = sorted(path.parent.name for path in GALLERY.glob("*/ruleset.yaml"))


@cache
def rule_set(engine: str) -> RuleSet:
    return load_rules(GALLERY / engine)


def own_gates(engine: str) -> list[Gate]:
    """Gates that the engine's folder itself holds, not those of what it extends."""
    folder = GALLERY / engine
    gates = [gate for some in rule_set(engine).gates.values() for gate in some]
    return [gate for gate in gates if folder in Path(gate.where.file).resolve().parents]


def test_twenty_five_gates_of_five_engines() -> None:
    assert sum(len(own_gates(engine)) for engine in ENGINES) >= 25
    assert sum(bool(own_gates(engine)) for engine in ENGINES) >= 5


def test_the_shipped_rule_set_leaves_the_gallery_out() -> None:
    assert not [name for name in load_rules(ROOT / "rules").files if "gallery" in name]


@pytest.mark.parametrize("engine", ENGINES)
def test_each_gate_and_requirement_says_where_it_comes_from(engine: str) -> None:
    gates = own_gates(engine)
    assert [gate.where.file for gate in gates if not gate.refs] == []
    assert [one.id for gate in gates for one in gate.demands if not one.refs] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_every_requirement_is_seen_to_pass_and_to_fail(engine: str) -> None:
    seen: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    decided: set[tuple[str, str]] = set()
    rows = [
        row
        for table in find_tables([ROOT / "tests" / "tables" / "gallery"])
        for row in read_table(table)
        if row.rules is not None and row.rules.resolve() == GALLERY / engine
    ]
    with quiet():
        decisions = [run_row(rule_set(engine), row).decision for row in rows]
    for decision in decisions:
        if decision is None or decision.gate is None:
            continue
        decided.add((decision.feature, decision.gate))
        for outcome in decision.outcomes:
            seen[decision.feature, decision.gate, outcome.id].add(outcome.state)
    gates = own_gates(engine)
    assert [(gate.feature, gate.name) for gate in gates if (gate.feature, gate.name) not in decided] == []
    lacking = [
        (gate.feature, gate.name, one.id, sorted(seen[gate.feature, gate.name, one.id]))
        for gate in gates
        for one in gate.demands
        if "passed" not in seen[gate.feature, gate.name, one.id]
        or "failed" not in seen[gate.feature, gate.name, one.id]
    ]
    # A requirement that only explains a refusal can't pass by its own words; its waiver says why.
    waived = {one.id for gate in gates for one in gate.demands if any(w.code == "never-passes" for w in one.allow)}
    assert [entry for entry in lacking if entry[2] not in waived] == []
