"""Table files: what is wrong with one is said with its place; a table that tests nothing has failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gatekeeper import FactError, RuleError
from gatekeeper.load import shipped_rules
from gatekeeper.tables import Mismatch, find_tables, read_table, run_row
from tests.shipped import CORPUS

ROW = "  - name: a row that is fine\n    facts: {model.family: kimi_k25}\n    expect: {state: pending}\n"
OF_KIMI = ROW.replace("facts: {model.family: kimi_k25}", f"from: {CORPUS}/moonshotai__Kimi-K2.5")
HEAD = "table: shared_experts_fusion\nrows:\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "x.table.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "wrong-type: this must be a mapping"),
        ("- a\n", "wrong-type"),
        (HEAD, ":2:1: wrong-type: `rows` must be a list, not `null`"),
        (HEAD.replace("rows:", "rows: []"), ":2:1: no-rows: a table without rows tests nothing; add some"),
        (ROW, "wrong-type"),
        ("rows:\n" + ROW, "missing-key: missing key `table`"),
        (HEAD + ROW + ROW, ":6:5: duplicate-row: row `a row that is fine` stands twice"),
        (HEAD + ROW.replace("state: pending", "state: maybe"), "`state` must be `on`, `off`"),
        (HEAD + ROW.replace("state: pending", "sate: on"), "unknown key `sate`, did you mean `state`?"),
        (HEAD + ROW.replace("    expect: {state: pending}\n", ""), "missing key `expect`"),
        (HEAD + ROW.replace("{state: pending}", "{}"), "`expect` is empty; fill it"),
        (HEAD + ROW.replace("model.family", "family"), "`family` can't stand here; expected a fact name with a dot"),
        (HEAD + ROW.replace("    facts:", "    fact:"), "unknown key `fact`, did you mean `facts`?"),
        (HEAD + "  - {name: x\n", "syntax"),
        (HEAD + ROW.replace("a row that", "a row # that"), ""),
    ],
)
def test_a_table_that_is_wrong(tmp_path: Path, text: str, fault: str) -> None:
    path = write(tmp_path, text)
    if not fault:
        read_table(path)
        return
    with pytest.raises(RuleError) as caught:
        read_table(path)
    assert fault in str(caught.value)
    assert "x.table.yaml" in str(caught.value)


def result(folder: Path, row: str, head: str = HEAD) -> Any:
    (one,) = read_table(write(folder, head + row))
    with capture_logs():
        return run_row(shipped_rules(), one)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (ROW.replace("model.family", "model.famly"), "unknown fact `model.famly`, did you mean `model.family`?"),
        (ROW.replace("kimi_k25", "3"), "expected a text, not the number `3`"),
        (ROW + "    platform: mi355\n", "unknown platform `mi355`, did you mean `mi355x`?"),
        (ROW + "    layout: tp88\n", "unknown layout `tp88`, did you mean `tp8`?"),
        (ROW + "    platform: hopper\n", "unknown platform `hopper`; the presets are a100, "),
        (ROW + "    unread: [quant]\n", "`unread` goes with `from`"),
        (ROW + "    from: nowhere\n", "can't be set|no such file or folder"),
        (OF_KIMI + "    unread: [qaunt]\n", "`quant`?"),
        (OF_KIMI + "    layers: []\n", "does not go with"),
    ],
)  # fmt: skip
def test_a_row_that_can_not_be_decided_is_a_failure_with_its_reason(tmp_path: Path, row: str, error: str) -> None:
    found = result(tmp_path, row)
    assert not found.passed
    assert any(part in found.error for part in error.split("|")), found.error


def test_a_table_of_an_unknown_feature_fails(tmp_path: Path) -> None:
    found = result(tmp_path, ROW, HEAD.replace("fusion", "fushion"))
    assert "unknown feature `shared_experts_fushion`, did you mean `shared_experts_fusion`?" in found.error


def test_a_row_that_passes_and_one_that_does_not(tmp_path: Path) -> None:
    assert result(tmp_path, ROW).passed
    found = result(tmp_path, ROW.replace("pending", "on"))
    assert found.mismatches == (Mismatch(key="state", expected="on", actual="pending"),)


def test_the_base_stands_under_every_row(tmp_path: Path) -> None:
    head = HEAD.replace("rows:", "base: {assume: [server], facts: {server.disable_shared_experts_fusion: true}}\nrows:")
    assert result(tmp_path, ROW.replace("pending", "off, decided_by: request"), head).passed


def test_expected_layers_are_compared(tmp_path: Path) -> None:
    row = ROW.replace("facts: {", "layers: [{layer.index: 3}]\n    facts: {")
    assert result(tmp_path, row.replace("{state: pending}", "{layers: [{index: 3, state: pending}]}")).passed
    wrong = result(
        tmp_path, row.replace("{state: pending}", "{layers: [{index: 3, state: on}, {index: 4, state: on}]}")
    )
    assert [one.key for one in wrong.mismatches] == ["layer 3: state", "layer 4"]


def test_a_path_without_tables_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FactError, match="no table here"):
        find_tables([tmp_path])
    table = write(tmp_path, HEAD + ROW)
    assert find_tables([tmp_path]) == [table]
