"""What the tables in tests/tables reach: pytest runs their rows by the plugin, here they are judged as a whole."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from gatekeeper import RuleSet, conditions, load_rules
from gatekeeper.log import quiet
from gatekeeper.tables import RowResult, find_tables, read_table, run_row

TABLES = Path(__file__).parent / "tables"
CORPUS = Path(__file__).parent / "corpus"
RULES = Path(__file__).parent.parent / "rules"


def run(rules: RuleSet) -> list[RowResult]:
    with quiet():
        return [run_row(rules, row) for path in find_tables([TABLES]) for row in read_table(path)]


@pytest.fixture(scope="module")
def results() -> list[RowResult]:
    return run(load_rules())


def test_each_requirement_was_seen_in_each_state(results: list[RowResult]) -> None:
    seen: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for result in results:
        if result.decision is not None and result.decision.gate is not None:
            gate = f"{result.decision.feature}/{result.decision.gate}"
            for outcome in result.decision.outcomes:
                seen[gate, outcome.id].add(outcome.state)
    missing = []
    for feature, gates in load_rules().gates.items():
        for gate in gates:
            options = [one for option in gate.options for one in option.requires]
            for requirement in (*gate.requires, *options):
                states = seen[f"{feature}/{gate.name}", requirement.id]
                missing += [
                    f"{feature}/{gate.name}: {requirement.id} never {state}"
                    for state in ("passed", "failed", "unknown")
                    if state not in states
                ]
    assert not missing, "\n".join(missing)


def test_what_may_be_waived_was_waived(results: list[RowResult]) -> None:
    waived = {one.id for result in results if result.decision for one in result.decision.outcomes if one.was}
    waivable = {one.id for gate in load_rules().gates["shared_experts_fusion"] for one in gate.requires if one.waivable}
    assert waivable - waived == set()


def test_each_model_of_the_corpus_has_a_row() -> None:
    rows = read_table(TABLES / "corpus.table.yaml")
    named = {Path(row.data["from"]).name for row in rows}
    assert named == {path.name for path in CORPUS.iterdir() if path.is_dir()}
    assert all(row.data["expect"].get("decided_by") or row.data["expect"]["state"] in ("on", "mixed") for row in rows)


def test_a_family_without_a_gate_says_why() -> None:
    rules = load_rules()
    gated: set[object] = set()
    for gate in rules.gates["shared_experts_fusion"]:
        assert isinstance(gate.applies_to, conditions.Test) and gate.applies_to.fact == "model.family"
        named = gate.applies_to.operand
        gated |= set(named) if isinstance(named, tuple) else {named}
    gateless = {name for name, family in rules.families.items() if "shared_experts_fusion" in family.gateless}
    assert gated | gateless == set(rules.families)
    assert not gated & gateless


DEEPSEEK = "gates/shared_experts_fusion/deepseek_v3.yaml"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (DEEPSEEK, "  - use: one-storage\n", ""),
        (DEEPSEEK, "[256, 384]", "[160, 256, 384]"),
        (DEEPSEEK, "quant.method: quark", "quant.method: [quark, fp8]"),
        ("requirements.yaml", "server.enable_eplb: false", "server.enable_eplb: [true, false]"),
        ("features/moe_backend.yaml", "sm80, sm86", "sm80, sm130, sm86"),
    ],
    ids=["evidence dropped", "count widened", "method widened", "balancing allowed", "device widened"],
)
def test_a_rule_that_goes_wrong_fails_a_row(tmp_path: Path, file: str, old: str, new: str) -> None:
    shutil.copytree(RULES, tmp_path / "rules")
    path = tmp_path / "rules" / file
    before = path.read_text("utf-8")
    assert old in before
    path.write_text(before.replace(old, new), "utf-8")
    assert any(not result.passed for result in run(load_rules(tmp_path / "rules")))
