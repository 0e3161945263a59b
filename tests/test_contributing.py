"""CONTRIBUTING's walk-through, done as written: a new gate is one YAML file and a table, and no Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = re.compile(r"^```yaml\n(# (?P<file>(?:rules|tests)/\S+)\n.*?)^```$", re.MULTILINE | re.DOTALL)
GATE = "rules/features/shared_expert_placement.yaml"
TABLE = "tests/tables/shared_expert_placement.table.yaml"


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy of the shipped rules, with the files of the walk-through added."""
    shutil.copytree(root / "rules", tmp_path / "rules")
    page = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = {match["file"]: match[1] for match in BLOCK.finditer(page)}
    assert sorted(blocks) == [GATE, TABLE]
    for name, text in blocks.items():
        file = tmp_path / name
        assert not file.exists(), f"{name} is shipped by now: the walk-through needs another example"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return tmp_path


def gatekeeper(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gatekeeper", *arguments, "--rules", "rules"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def test_the_rule_set_stays_sound(copy: Path) -> None:
    """With what the page announces: two waivers of facts that have a reader now."""
    done = gatekeeper(copy, "check")
    assert done.returncode == 0, done.stdout + done.stderr
    warnings = [line for line in done.stdout.splitlines() if ": warning[" in line]
    assert len(warnings) == 2, done.stdout
    assert all("rules/facts/" in line and "warning[unused-waiver]" in line for line in warnings)


def test_its_table_holds(copy: Path) -> None:
    done = gatekeeper(copy, "test", TABLE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_table_would_notice_a_wrong_gate(copy: Path) -> None:
    gate = copy / GATE
    text = gate.read_text(encoding="utf-8")
    assert text.count("moe.shared_shard_width: {divisible_by: 128}") == 1
    gate.write_text(text.replace("shard_width: {divisible_by: 128}", "shard_width: {divisible_by: 64}"))
    done = gatekeeper(copy, "test", TABLE)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "eight ranks would get half a block" in done.stdout


def test_a_misspelt_fact_is_found_with_its_line_and_the_right_name(copy: Path) -> None:
    gate = copy / GATE
    text = gate.read_text(encoding="utf-8")
    gate.write_text(text.replace("that: {moe.shared_shard_width:", "that: {moe.shared_shard_widht:"))
    line = 1 + text[: text.index("that: {moe.shared_shard_width:")].count("\n")
    done = gatekeeper(copy, "check")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"shared_expert_placement.yaml:{line}:" in done.stdout + done.stderr
    assert "did you mean `moe.shared_shard_width`" in done.stdout + done.stderr
