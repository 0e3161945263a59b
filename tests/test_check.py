"""`gatekeeper check` and `gatekeeper help`: what a person sees, JSON, SARIF, and the exit codes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from gatekeeper.cli import COMMANDS
from gatekeeper.cli.faults import WIDTH, counted, excerpt, fault_lines
from gatekeeper.diagnostics import diagnostics
from gatekeeper.errors import Fault, Where
from tests.shipped import ROOT
from tests.small import FEATURE, files
from tests.test_cli import gatekeeper, run, write

BROKEN = {"features/fused.yaml": FEATURE.replace("model.n:", "model.nn:"), "x.yaml": "a: 1"}
# Every fact of the small rule set that its one gate does not read is a lint.
LINTED = FEATURE.replace("{model.n}, not 4", "too few")


@pytest.fixture
def broken(tmp_path: Path) -> str:
    return write(tmp_path, files(BROKEN))


@pytest.fixture
def linted(tmp_path: Path) -> str:
    return write(tmp_path, files({"features/fused.yaml": LINTED}))


def test_a_sound_rule_set_is_counted() -> None:
    result = gatekeeper("check", "--strict")
    assert result.exit_code == 0
    assert result.stdout.startswith("shipped ") and "; no faults. digest " in result.stdout
    assert result.stderr == ""
    assert json.loads(gatekeeper("check", "--format", "json").stdout) == []


def test_every_fault_is_shown_with_its_line_a_caret_and_where_to_read_more(broken: str) -> None:
    result = gatekeeper("check", "--rules", broken)
    assert result.exit_code == 1
    assert result.stdout == (
        f"{broken}/features/fused.yaml:4:44: error[unknown-fact]: unknown fact `model.nn`, did you mean `model.n`?\n"
        '  4 |   - {id: enough, protects: support, that: {model.nn: {ge: 4}}, reason: "There are {model.n}, not 4."}\n'
        "    |                                            ^^^^^^^^\n"
        "  help: gatekeeper help unknown-fact\n"
        "\n"
        f"{broken}/x.yaml:1:1: error[unexpected-file]: a rule set has no `x.yaml`; expected one of ruleset.yaml, "
        "conditions.yaml, requirements.yaml, platforms.yaml, layouts.yaml, features/, gates/, facts/, families/, "
        "formats/\n"
        "  1 | a: 1\n"
        "    | ^\n"
        "  help: gatekeeper help unexpected-file\n"
    )
    assert result.stderr == "2 errors\n"


def test_a_broken_rule_set_looks_the_same_in_every_command(broken: str) -> None:
    checked = run("check", "--rules", broken)
    assert checked.returncode == 1
    for command in (["decide", "no-such-target"], ["facts"], ["test", str(ROOT / "tests" / "tables")]):
        done = run(*command, "--rules", broken)
        assert done.returncode == 1
        assert (done.stdout, done.stderr) == ("", f"{checked.stdout}2 errors; nothing was done\n")


def test_lints_are_warnings_and_with_strict_errors(linted: str) -> None:
    result = gatekeeper("check", "--rules", linted)
    assert result.exit_code == 0
    assert ": warning[reason-without-value]: the reason of `enough` names no actual value" in result.stdout
    assert re.fullmatch(r"\d+ warnings\n", result.stderr)
    assert "small 1: 1 feature, 1 gate, 1 requirement, " in result.stdout
    strict = gatekeeper("check", "--rules", linted, "--strict")
    assert strict.exit_code == 1
    assert strict.stdout.splitlines()[:4] == result.stdout.replace("warning[", "error[").splitlines()[:4]
    # At load they say nothing.
    assert gatekeeper("facts", "--rules", linted).exit_code == 0


def test_json_has_every_part_of_a_fault(broken: str) -> None:
    found = json.loads(gatekeeper("check", "--rules", broken, "--format", "json").stdout)
    assert [(one["code"], one["line"], one["severity"]) for one in found][:1] == [("unknown-fact", 4, "error")]
    assert found[1] == {
        "code": "unexpected-file",
        "severity": "error",
        "file": f"{broken}/x.yaml",
        "line": 1,
        "column": 1,
        "message": found[1]["message"],
        "source": "a: 1",
        "help": "gatekeeper help unexpected-file",
    }


def test_overlays_are_checked_with_what_they_are_laid_over(tmp_path: Path) -> None:
    base = write(tmp_path / "base", files())
    amendment = "amends: fused/fused\ndrop: [{requirement: enuogh, because: We do not need it.}]\n"
    over = write(
        tmp_path / "over", {"ruleset.yaml": "name: mine\nversion: 1\nlanguage: 1\n", "gates/x.yaml": amendment}
    )
    result = gatekeeper("check", "--rules", base, "--overlay", over)
    assert result.exit_code == 1
    assert "gates/x.yaml:2:9: error[unknown-requirement]: gate `fused/fused` has no requirement" in result.stdout


# ------------------------------------------------------------------------------------------------------------ SARIF

# What the schema of SARIF 2.1.0 asks of each object that is written, and of the texts in it.
REQUIRED = {"log": {"version", "runs"}, "run": {"tool"}, "driver": {"name"}, "rule": {"id"}, "result": {"message"}}
LEVELS = {"none", "note", "warning", "error"}


def sarif(*arguments: str) -> dict[str, Any]:
    log: dict[str, Any] = json.loads(gatekeeper("check", *arguments, "--format", "sarif").stdout)
    assert log.keys() >= REQUIRED["log"] and log["version"] == "2.1.0"
    assert log["$schema"].endswith("/sarif-schema-2.1.0.json")
    (one,) = log["runs"]
    assert one.keys() >= REQUIRED["run"]
    driver = one["tool"]["driver"]
    assert driver.keys() >= REQUIRED["driver"]
    for rule in driver["rules"]:
        assert rule.keys() >= REQUIRED["rule"]
        assert all(rule[key]["text"] for key in ("shortDescription", "fullDescription", "help"))
        assert rule["defaultConfiguration"]["level"] in LEVELS
    for result in one["results"]:
        assert result.keys() >= REQUIRED["result"] and result["message"]["text"]
        assert result["level"] in LEVELS
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        (location,) = result["locations"]
        region = location["physicalLocation"].get("region", {"startLine": 1})
        assert region["startLine"] >= 1 and region.get("startColumn", 1) >= 1
        assert all(isinstance(text, str) and text for text in result["partialFingerprints"].values())
    return one  # type: ignore[no-any-return]


def test_sarif_has_what_its_readers_need(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(broken)
    one = sarif("--rules", ".")
    assert [rule["id"] for rule in one["tool"]["driver"]["rules"]] == list(diagnostics())
    first = one["results"][0]
    assert (first["ruleId"], first["level"]) == ("unknown-fact", "error")
    assert first["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "features/fused.yaml"},
        "region": {
            "startLine": 4,
            "startColumn": 44,
            "snippet": {"text": FEATURE.splitlines()[3].replace("n: {", "nn: {")},
        },
    }
    assert one["columnKind"] == "unicodeCodePoints"


def test_sarif_of_lints_and_of_nothing(linted: str) -> None:
    assert sarif()["results"] == []
    assert {result["level"] for result in sarif("--rules", linted)["results"]} == {"warning"}
    assert {result["level"] for result in sarif("--rules", linted, "--strict")["results"]} == {"error"}


def test_a_fingerprint_outlives_lines_above_it_and_tells_equal_lines_apart(tmp_path: Path) -> None:
    def prints(folder: str, text: str) -> list[str]:
        write(tmp_path / folder, files({"features/fused.yaml": text}))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / folder)
            found = [r for r in sarif("--rules", ".")["results"] if r["ruleId"] == "missing-refs"]
        return [result["partialFingerprints"]["codeAndLine/v1"] for result in found]

    item = '  - {id: ID, protects: support, that: {model.n: {ge: 4}}, reason: "There are {model.n}."}\n'
    head = "feature: fused\nsummary: One thing instead of two.\nrequires:\n"
    before = prints("one", head + item.replace("ID", "a") + item.replace("ID", "b"))
    after = prints("two", "# A line more.\n" + head + item.replace("ID", "a") + item.replace("ID", "b"))
    assert before == after and len(set(before)) == 2


def test_a_path_with_odd_characters_is_a_valid_uri(tmp_path: Path) -> None:
    folder = write(tmp_path / "a b#é", files(BROKEN))
    uri = sarif("--rules", folder)["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri.startswith("file:///") and uri.endswith("/a%20b%23%C3%A9/features/fused.yaml")


def test_a_path_that_is_no_text_is_a_valid_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / os.fsdecode(b"caf\xe9"), files(BROKEN))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / os.fsdecode(b"caf\xe9"), Path(os.fsdecode(b"caf\xe9"))):
        first = sarif("--rules", str(folder))["results"][0]
        assert "caf%E9/features/fused.yaml" in first["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]


# ---------------------------------------------------------------------------------------------------- the line shown


@pytest.mark.parametrize(
    ("source", "column", "shown", "marked"),
    [
        ("a: b", 1, "a: b", "a"),
        ("a: b", 4, "a: b", "b"),
        ("that: {model.nn: 3}", 8, "that: {model.nn: 3}", "model.nn"),
        ('reason: "two words", x: 1', 9, 'reason: "two words", x: 1', '"two words"'),
        ("reason: 'two words'", 9, "reason: 'two words'", "'two words'"),
        ("url: https://x.y/z?a=b", 6, "url: https://x.y/z?a=b", "https://x.y/z?a=b"),
        ("[a, b]", 1, "[a, b]", "["),
        ("\ta: b", 2, "    a: b", "a"),
        ("a:\tb", 4, "a:    b", "b"),
        ("模型: x", 5, "模型: x", "x"),
        ("模型: x", 1, "模型: x", "模型"),
        ("e\u0301x: y", 6, "e\u0301x: y", "y"),
        ("a: \x1b[31mred", 4, "a: \\x1b[31mred", "\\x1b"),
        ("a: \u202eb", 5, "a: \\u202eb", "b"),
        ("abc", 99, "abc", " "),
        ("", 1, "", " "),
        ("x" * 300, 1, "x" * WIDTH + "…", "x" * WIDTH),
        ("a" * 150 + " key: 1", 152, "…" + "a" * 23 + " key: 1", "key"),
        ("a" * 500 + " key: 1", 502, "…" + "a" * 23 + " key: 1", "key"),
        ("模" * 80 + " key: 1", 82, "…" + "模" * 11 + " key: 1", "key"),
    ],
)
def test_the_caret_stands_under_the_word(source: str, column: int, shown: str, marked: str) -> None:
    line, before, count = excerpt(source, column)
    cells = [char for char in line for _ in range(_cells(char))]
    if marked == " ":
        assert (line, count) == (shown, 1)
        return
    under = "".join(cells[before : before + count])
    assert line == shown
    assert under == "".join(char for char in marked for _ in range(_cells(char)))


def _cells(char: str) -> int:
    return 0 if char == "\u0301" else 2 if "\u3000" <= char <= "\u9fff" else 1


def test_a_long_line_never_takes_more_than_its_width() -> None:
    for column in (1, 50, WIDTH - 1, WIDTH, WIDTH + 1, 399, 400):
        line, before, count = excerpt("key: value, " * 100, column)
        assert len(line) <= WIDTH + 1 and before + count <= WIDTH


def test_what_a_fault_says_can_not_steer_a_terminal() -> None:
    fault = Fault("unknown-fact", "unknown fact `\x1b]0;x\x07`", Where("a\x1bb.yaml", 1, 1, ["\x1b[2J: 1"]))
    assert not [char for line in fault_lines(fault) for char in line if char == "\x07"]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(fault_lines(fault)))
    assert "\x1b" not in plain and "\\x1b[2J: 1" in plain


def test_a_fault_of_a_whole_file_has_no_line() -> None:
    lines = list(fault_lines(Fault("too-large", "larger than 8 MiB; split it", Where("x.yaml"))))
    assert len(lines) == 2 and "x.yaml" in lines[0]
    assert counted([]) == ""


# ------------------------------------------------------------------------------------------------------------- help


def test_help_lists_every_code() -> None:
    result = gatekeeper("help")
    assert result.exit_code == 0
    for one in diagnostics().values():
        assert re.search(rf"^  {one.code} +{re.escape(one.title)}$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("code", diagnostics())
def test_help_explains_a_code(code: str) -> None:
    one = diagnostics()[code]
    result = gatekeeper("help", code)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{code} ({'error' if one.severity == 'error' else 'lint'}): {one.title}\n")
    told = " ".join(result.stdout.split())
    assert " ".join(one.means.split()) in told and " ".join(f"Why: {one.because}".split()) in told
    for text in (*one.wrong.values(), *(t for name, t in one.right.items() if one.wrong.get(name) != t)):
        assert all(f"  {line}\n" in result.stdout for line in (text or "").splitlines())


def test_help_names_the_nearest_code_and_shows_commands() -> None:
    result = gatekeeper("help", "opne-range")
    assert result.exit_code == 2 and "did you mean `open-range`?" in result.stderr
    assert gatekeeper("help", "qqq").stderr.rstrip().endswith("`gatekeeper help` lists all")
    for command in COMMANDS:
        assert gatekeeper("help", command).stdout == gatekeeper(command, "--help").stdout
