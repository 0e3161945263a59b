"""Each lint: where it arises, where it does not, and where it is waived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gatekeeper.analysis.lint import LINTS, lint
from gatekeeper.load import load_rules, parse_rule_set
from tests.small import FEATURE, files
from tests.test_load import write

ROWS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "lints.yaml").read_text(encoding="utf-8"))
HEAD = "feature: fused\nsummary: One thing instead of two.\n"


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_a_lint_arises_where_it_should_and_nowhere_else(row: dict[str, Any]) -> None:
    changes = dict(row.get("files", {}))
    if "fused" in row:
        changes["features/fused.yaml"] = HEAD + row["fused"]
    base = {str(fault) for fault in lint(parse_rule_set(files()))}
    faults = [fault for fault in lint(parse_rule_set(files(changes))) if fault.code == row["lint"]]
    # Whatever the row leaves unused in the small rule set is no concern of its.
    found = [
        f"{one.where}: {one.message}" for one in faults if not (one.where.file == "facts/all.yaml" or str(one) in base)
    ]
    expected = row.get("expect", [])
    assert len(found) == len(expected), found
    assert [part for part in expected if not any(part in one for one in found)] == [], found
    assert {fault.severity for fault in faults} <= {"warning"}


def test_every_lint_has_rows_with_and_without_findings() -> None:
    for code in LINTS:
        rows = [row for row in ROWS if row["lint"] == code]
        assert any("expect" in row for row in rows), code


def test_what_is_inherited_is_the_concern_of_its_own_rule_set(tmp_path: Path) -> None:
    base = write(
        tmp_path / "base", files({"conditions.yaml": "conditions: {idle: {doc: An idle one., that: {model.n: 0}}}"})
    )
    own = write(
        tmp_path / "own",
        {
            "ruleset.yaml": "name: own\nversion: 1\nlanguage: 1\nextends: ../base\n",
            "features/other.yaml": "feature: other\nsummary: Another thing.\n",
        },
    )
    assert {"never-passes", "unused-condition", "unused-fact"} <= {fault.code for fault in lint(load_rules(base))}
    found = lint(load_rules(own))
    assert {fault.where.file for fault in found} <= {str(own / "features" / "other.yaml")}


def test_an_overlay_is_looked_at_with_what_it_amends(tmp_path: Path) -> None:
    base = parse_rule_set(files())
    amendment = """\
amends: fused/fused
add:
  - {requirement: {id: few, protects: support, that: {model.n: {lt: 4}}, reason: "It is {model.n}."}, because: So.}
"""
    over = {
        "ruleset.yaml": "name: mine\nversion: 1\nlanguage: 1\n",
        "gates/x.yaml": amendment.replace("So.", "It is so."),
    }
    rules = parse_rule_set(files(), [over])
    added = {str(fault) for fault in lint(rules)} - {str(fault) for fault in lint(base)}
    assert sorted(one.split(": ")[1] for one in added) == ["missing-refs", "never-passes"]


def test_lints_come_in_the_order_of_files_and_lines() -> None:
    found = lint(parse_rule_set(files({"features/fused.yaml": FEATURE.replace("{model.n}, not 4", "too few")})))
    places = [(fault.where.file, fault.where.line, fault.where.column) for fault in found]
    assert places == sorted(places) and len(places) > 10


@pytest.mark.parametrize("example", ["before-25390", "regression-25390"])
def test_the_examples_are_free_of_lints(example: str, root: Path) -> None:
    assert lint(load_rules(root / "examples" / example)) == []
