"""The catalogue of diagnostics: every code that the source emits is explained, and every example is true."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import pytest

from gatekeeper.analysis.lint import LINTS, lint
from gatekeeper.diagnostics import diagnostics
from gatekeeper.errors import Fault, RuleError
from gatekeeper.load import load_rules, parse_rule_set
from gatekeeper.source import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml
from gatekeeper.tables import read_table
from tests.small import files

ROOT = Path(__file__).resolve().parent.parent
CODES = diagnostics()
OVERLAY = "overlay/"
# What a `kind` may be where a code is made of it: `duplicate-{kind}`, `duplicate-{kind[:-1]}`.
MADE = {"duplicate-{kind}": ("family", "format"), "duplicate-{kind[:-1]}": ("condition", "requirement")}


def emitted() -> Iterator[str]:
    """The codes in calls of `Fault`, `_fault` and the like, and in triples that the schema check yields."""
    for path in sorted((ROOT / "gatekeeper").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in ("Fault", "_fault", "unread", "_unknown"):
                    yield from _codes(node.args[:2])
            elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 3:
                yield from _codes(node.value.elts[1:2])


def _codes(args: list[ast.expr]) -> Iterator[str]:
    """The first text among the arguments, if it can be a code: the argument before it is a place or a parser."""
    for arg in args:
        if isinstance(arg, ast.Constant) and isinstance(arg.value, str):
            yield arg.value
            return
        if isinstance(arg, ast.JoinedStr):
            template = ast.unparse(arg)[2:-1]
            if template in MADE:
                yield from (template.split("{")[0] + kind for kind in MADE[template])
                return


@lru_cache
def accustomed() -> frozenset[str]:
    """The lints of the small rule set as it is."""
    return frozenset(str(fault) for fault in lint(parse_rule_set(files())))


def faults_of(changes: Mapping[str, str | None], tmp_path: Path) -> list[Fault]:
    """What these files add to what is wrong with the small rule set, lints included; tables are read on their own."""
    own = {name: text for name, text in changes.items() if not name.startswith(OVERLAY) and "table" not in name}
    over = {name.removeprefix(OVERLAY): text or "" for name, text in changes.items() if name.startswith(OVERLAY)}
    tables = {name: text or "" for name, text in changes.items() if "table" in name}
    try:
        for name, text in tables.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
            read_table(tmp_path / name)
        found = lint(parse_rule_set(files(own), [over] if over else []))
        return [fault for fault in found if str(fault) not in accustomed()]
    except RuleError as error:
        return list(error.faults)


def test_every_code_of_the_source_is_explained_and_every_one_explained_is_of_the_source() -> None:
    found = set(emitted()) | set(LINTS)
    assert {"unknown-fact", "too-large", "unknown-option", "duplicate-condition", "wrong-shape"} <= found
    assert found == set(CODES)
    assert {code for code, one in CODES.items() if one.severity == "warning"} == set(LINTS)


@pytest.mark.parametrize("code", [code for code, one in CODES.items() if one.wrong])
def test_the_wrong_example_has_the_fault_and_the_right_one_has_not(code: str, tmp_path: Path) -> None:
    wrong = faults_of(CODES[code].wrong, tmp_path)
    assert code in {fault.code for fault in wrong}
    assert all(fault.severity == CODES[fault.code].severity for fault in wrong)
    if CODES[code].severity == "error":
        assert {fault.code for fault in wrong} == {code}, "an example shows one thing"
    right = faults_of(CODES[code].right, tmp_path)
    assert [fault for fault in right if fault.code == code or fault.severity == "error"] == []


def _folder(path: Path) -> None:
    (path / "x.yaml").mkdir()
    read_yaml(path / "x.yaml")


def _unreadable(path: Path) -> None:
    (path / "gates").write_text("")
    (path / "ruleset.yaml").write_text("")
    (path / "loop").symlink_to(path / "loop")
    read_yaml(path / ("x" * 300))


def _large(path: Path) -> None:
    (path / "x.yaml").write_bytes(b"a" * (MAX_BYTES + 1))
    read_yaml(path / "x.yaml")


def _latin(path: Path) -> None:
    (path / "x.yaml").write_bytes("doc: Größe".encode("latin-1"))
    read_yaml(path / "x.yaml")


def _deep(path: Path) -> None:
    parse_yaml("[" * (MAX_DEPTH + 1), "x.yaml")


UNWRITABLE: dict[str, Callable[[Path], None]] = {
    "not-a-file": _folder,
    "unreadable": _unreadable,
    "too-large": _large,
    "not-utf8": _latin,
    "too-deep": _deep,
}


def test_every_code_without_an_example_is_tried_here() -> None:
    assert set(UNWRITABLE) == {code for code, one in CODES.items() if not one.wrong}


@pytest.mark.parametrize("code", UNWRITABLE)
def test_what_no_text_can_show_is_a_fault_too(code: str, tmp_path: Path) -> None:
    with pytest.raises(RuleError) as caught:
        UNWRITABLE[code](tmp_path)
    assert [fault.code for fault in caught.value.faults] == [code]


def test_each_text_is_a_sentence_and_each_title_is_none() -> None:
    for one in CODES.values():
        assert one.title[0].islower() or one.title.startswith(("YAML", "`")), one.code
        assert not one.title.endswith("."), one.code
        assert one.means.strip().endswith(".") and one.because.strip().endswith("."), one.code
        assert bool(one.wrong) == bool(one.right), one.code


def test_the_shipped_rules_have_no_lint_that_is_not_waived() -> None:
    assert lint(load_rules()) == []
