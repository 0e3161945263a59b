"""docs/language.md: every example is loaded, every claim beneath it is decided, and nothing is left out."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from markdown_it import MarkdownIt
from structlog.testing import capture_logs

from gatekeeper import RuleError, RuleSet, decide, from_record, load_rules, parse_rule_set
from gatekeeper.analysis.lint import lint
from gatekeeper.cli import group
from gatekeeper.expressions import _FUNCTIONS
from gatekeeper.operators import OPERATORS
from gatekeeper.source import scan_yaml
from gatekeeper.tables import read_table, run_row
from gatekeeper.values import UNKNOWN, Missing, plain

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "language.md"


def script() -> Any:
    """scripts/language_page.py, which reads the page and makes its generated parts."""
    spec = importlib.util.spec_from_file_location("language_page", ROOT / "scripts" / "language_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["language_page"] = module
    spec.loader.exec_module(module)
    return module


page = script()
BLOCKS: list[Any] = page.blocks(PAGE.read_text(encoding="utf-8"))
EXAMPLES = list(dict.fromkeys(block.example for block in BLOCKS if block.example))
BASE = ("facts/", "conditions.yaml", "requirements.yaml", "platforms.yaml", "layouts.yaml")
"""What an example has of the shipped rules, unless it has a file of that name itself."""
KINDS = {"features": "feature", "gates": "gate", "facts": "facts", "families": "family", "formats": "format"}
"""Kind of file by its folder."""


def blocks(example: str, *words: str) -> list[Any]:
    return [block for block in BLOCKS if block.example == example and block.words == words]


def each(word: str) -> Any:
    """Parametrise a test with every block of a kind."""
    found = [block for block in BLOCKS if block.words == (word,)]
    return pytest.mark.parametrize("block", [pytest.param(one, id=f"{one.example}:{one.line}") for one in found])


@cache
def base() -> Mapping[str, str]:
    rules = ROOT / "rules"
    found = {path.relative_to(rules).as_posix(): path for path in sorted(rules.rglob("*.yaml"))}
    kept = {name: path.read_text(encoding="utf-8") for name, path in found.items() if name.startswith(BASE)}
    return {"ruleset.yaml": "name: page\nversion: 1\nlanguage: 1\n", **kept}


def files(example: str) -> tuple[dict[str, str], dict[str, str]]:
    """The files of an example over the base, and those of its overlay."""
    own = {one.file: one.text for one in BLOCKS if one.example == example and one.file}
    over = {name.removeprefix("site/"): text for name, text in own.items() if name.startswith("site/")}
    own = {name: text for name, text in own.items() if not name.startswith("site/")}
    return {**base(), **own}, over


@cache
def rules_of(example: str, *, overlay: bool = False) -> RuleSet:
    own, over = files(example)
    return parse_rule_set(own, [over] if overlay else [])


def faults(example: str) -> list[str]:
    own, over = files(example)
    with pytest.raises(RuleError) as error:
        parse_rule_set(own, [over] if over else [])
    return [str(fault) for fault in error.value.faults]


def test_every_yaml_block_of_the_page_is_an_example_that_is_tested() -> None:
    known = {(), ("table",), ("values",), ("conditions",), ("faults",), ("warnings",), ("lints",)}
    assert [b.line for b in BLOCKS if b.language in ("yaml", "text", "console") and not b.example] == []
    assert [b.line for b in BLOCKS if b.words not in known] == []
    assert [b.line for b in BLOCKS if b.language == "yaml" and not b.words and not b.file] == [], "say which file it is"
    files_only = [n for n in EXAMPLES if not any(b.words for b in BLOCKS if b.example == n)]
    assert files_only == ["manifest"], "an example claims nothing: add a table, values or faults"


@pytest.mark.parametrize("example", [n for n in EXAMPLES if n != "walk" and blocks(n) and not blocks(n, "faults")])
def test_each_example_loads(example: str, tmp_path: Path) -> None:
    if "extends" in files(example)[0]["ruleset.yaml"]:
        (tmp_path / "ruleset.yaml").write_text(files(example)[0]["ruleset.yaml"], encoding="utf-8")
        assert load_rules(tmp_path).name == "house-rules"
    else:
        assert rules_of(example, overlay=bool(files(example)[1])).name.split("+")[0] == "page"


@each("table")
def test_each_table_of_the_page_holds(block: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.table.yaml"
    path.write_text(block.text, encoding="utf-8")
    if block.example == "walk":
        rules = load_rules(walk(tmp_path) / "my-rules")
    else:
        rules = rules_of(block.example, overlay="overlay" in block.attributes)
    with capture_logs():
        results = [run_row(rules, row) for row in read_table(path)]
    assert [(r.row.name, r.error, list(map(str, r.mismatches))) for r in results if not r.passed] == []


@each("warnings")
def test_each_warning_of_the_page_is_said(block: Any) -> None:
    rules = rules_of(block.example, overlay="overlay" in block.attributes)
    facts = from_record(rules.catalogue, {"facts": {}})
    with capture_logs():
        said = [warning for one in decide(rules, facts).values() for warning in one.warnings]
    wanted = block.text.splitlines()
    assert len(said) == len(wanted)
    assert [line for line in wanted if not any(line in warning for warning in said)] == []


@each("lints")
def test_each_lint_of_the_page_is_found_and_no_other(block: Any) -> None:
    own = {one.file for one in blocks(block.example)}
    found = [str(fault) for fault in lint(rules_of(block.example)) if fault.where.file in own]
    wanted = block.text.splitlines()
    assert len(found) == len(wanted), found
    assert [line for line in wanted if not any(line in one for one in found)] == [], found


CUT_OUT = ("missing-refs", "unused-fact", "unlisted-value")
"""Lints of what an example leaves out, since it shows something else."""


@pytest.mark.parametrize("example", [n for n in EXAMPLES if blocks(n, "table") and n not in ("walk", "waiver")])
def test_no_example_is_a_bad_one(example: str) -> None:
    own = {one.file for one in blocks(example)}
    found = lint(rules_of(example, overlay=bool(files(example)[1])))
    assert [str(fault) for fault in found if fault.where.file in own and fault.code not in CUT_OUT] == []


@each("faults")
def test_each_wrong_example_has_the_faults_shown(block: Any) -> None:
    found = faults(block.example)
    assert [line for line in block.text.splitlines() if not any(line in fault for fault in found)] == [], found
    places = [line for line in block.text.splitlines() if re.match(r"\S+\.yaml:\d+", line)]
    assert len(found) == max(1, len(places)), found


@each("conditions")
def test_each_condition_comes_out_as_shown(block: Any) -> None:
    rows = scan_yaml(block.text, "page.yaml")[0].data
    feature = ["feature: page", "summary: The conditions of one block.", "requires:"]
    for index, row in enumerate(rows):
        condition = page._flow(row["that"])
        feature.append(f"  - {{id: c{index}, protects: support, that: {condition}, reason: It does not hold.}}")
    rules = parse_rule_set({**base(), "features/page.yaml": "\n".join(feature)})
    wrong = []
    for index, row in enumerate(rows):
        assert row.keys() <= {"that", "passed", "failed", "unknown"} and {"passed", "failed"} <= row.keys()
        for state in ("passed", "failed", "unknown"):
            for facts in row.get(state, ()):
                with capture_logs():
                    decision = decide(rules, from_record(rules.catalogue, {"facts": facts}))["page"]
                if decision.outcomes[index].state != state:
                    wrong.append((row["that"], facts, f"{decision.outcomes[index].state}, not {state}"))
    assert wrong == []


@each("values")
def test_each_derived_fact_has_the_value_shown(block: Any) -> None:
    rules = rules_of(block.example)
    for row in scan_yaml(block.text, "page.yaml")[0].data:
        facts = from_record(rules.catalogue, {key: row[key] for key in ("facts", "assume") if key in row})
        found = {name: facts.reading(name).value for name in row.get("gives", {})}
        shown = {name: None if isinstance(value, Missing) else plain(value) for name, value in found.items()}
        assert UNKNOWN not in found.values()
        assert shown == row.get("gives", {})
        assert [name for name in row.get("unknown", ()) if facts.reading(name).value is not UNKNOWN] == []


def walk(folder: Path) -> Path:
    """Lay the files of the walk into a folder."""
    for block in BLOCKS:
        if block.example == "walk" and block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    return folder


def test_the_commands_of_the_walk_print_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(walk(tmp_path))
    shown = [block for block in BLOCKS if block.example == "walk" and block.language == "console"]
    assert shown
    for block in shown:
        command, _, output = block.text.partition("\n")
        result = CliRunner().invoke(group, shlex.split(command.removeprefix("$ gatekeeper ")))
        assert (result.stdout, result.exit_code) == (output, 0)


def test_the_walk_starts_without_a_fault_or_a_lint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(walk(tmp_path))
    result = CliRunner().invoke(group, ["check", "--strict", "--rules", "my-rules"])
    assert result.exit_code == 0, result.output


# The page is complete: every key of a schema, every operator and every function stands in an example.


def examples_by_kind() -> Iterator[tuple[str, Any]]:
    for block in BLOCKS:
        if block.words == ("table",):
            yield "table", read(block)
        elif block.words == ("conditions",):
            yield from (("common#/$defs/condition", row["that"]) for row in read(block))
        elif block.words == () and block.language == "yaml":
            yield kind_of(block), read(block)


def read(block: Any) -> Any:
    return scan_yaml(block.text, "page.yaml")[0].data


def kind_of(block: Any) -> str:
    name = re.sub(r"^(site|my-rules)/", "", block.file)
    folder = name.split("/")[0]
    return "amendment" if "amends" in read(block) else KINDS.get(folder, Path(name).stem)


def keys_used(schema: Mapping[str, Any], data: Any, owner: str) -> Iterator[tuple[str, str]]:
    """Yield (owner, key) for each key of `data` that the schema declares, the owner being the key above."""
    schema, owner = _resolved(schema, owner)
    if isinstance(data, dict):
        for key, value in data.items():
            if key in schema.get("properties", {}):
                yield _pair(owner, key)
                yield from keys_used(schema["properties"][key], value, key)
                continue
            patterns = schema.get("patternProperties", {})
            inner = next((one for pattern, one in patterns.items() if re.search(pattern, key)), None)
            inner = inner or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield from keys_used(inner, value, owner)
    elif isinstance(data, list) and "items" in schema:
        for item in data:
            yield from keys_used(schema["items"], item, owner)


def keys_declared(
    schema: Mapping[str, Any], owner: str, seen: frozenset[str] = frozenset()
) -> Iterator[tuple[str, str]]:
    name = schema.get("$ref", "")
    if name in seen:
        return
    seen |= {name} - {""}
    schema, owner = _resolved(schema, owner)
    for key, inner in schema.get("properties", {}).items():
        yield _pair(owner, key)
        yield from keys_declared(inner, key, seen)
    parts = [schema.get("items"), schema.get("additionalProperties"), *schema.get("patternProperties", {}).values()]
    for inner in parts:
        if isinstance(inner, dict):
            yield from keys_declared(inner, owner, seen)


def _pair(owner: str, key: str) -> tuple[str, str]:
    # `{fact: other}` is one construct, whichever operator it stands behind.
    return ("operator" if key == "fact" and owner in OPERATORS else owner), key


def _resolved(schema: Mapping[str, Any], owner: str) -> tuple[Mapping[str, Any], str]:
    if "$ref" not in schema:
        return schema, owner
    place = schema["$ref"]
    target = page.resolve(place if not place.startswith("#") else f"common{place}")
    # A test of an item is a test; what a definition declares belongs to its name.
    name = place.rpartition("/")[2]
    return target, {"item_test": "test"}.get(name, name)


DOCUMENTED = (
    "ruleset",
    "feature",
    "gate",
    "facts",
    "conditions",
    "requirements",
    "amendment",
    "platforms",
    "layouts",
    "family",
    "format",
    "table",
)
ELSEWHERE: Mapping[tuple[str, str], str] = {
    ("rows", "from"): "needs a checkpoint: README and tests/tables",
    ("rows", "unread"): "goes with `from`",
    ("base", "from"): "goes with `from`",
    ("table", "rules"): "needs a second folder: the tables of rules/gallery",
}
"""Keys that no example of the page can show, and where they are shown."""


def test_every_key_of_the_schemas_stands_in_an_example() -> None:
    used: set[tuple[str, str]] = set()
    for kind, data in examples_by_kind():
        place = kind if "#" in kind else f"{kind}#"
        used |= set(keys_used(page.resolve(place), data, place.rpartition("/")[2].rstrip("#")))
    declared = {pair for kind in DOCUMENTED for pair in keys_declared(page.resolve(f"{kind}#"), kind)}
    missing = {pair for pair in declared - used if pair not in ELSEWHERE}
    assert sorted(missing) == [], "show these keys in an example of docs/language.md"


def test_every_operator_stands_in_a_tested_condition() -> None:
    shown = {
        word for block in BLOCKS if block.words == ("conditions",) for word in re.findall(r"\b\w+\b(?=:)", block.text)
    }
    assert sorted({*OPERATORS, "absent", "all", "any", "not", "use", "fact"} - shown) == []


def test_every_operator_has_a_row_with_an_example() -> None:
    rows = {line.split("|")[1].strip(" `"): line for line in PAGE.read_text().splitlines() if line.startswith("| `")}
    assert [word for word in [*OPERATORS, "absent"] if f"{word}: " not in rows[word].rsplit("|", 2)[1]] == []


def test_every_function_of_derive_is_explained_and_shown() -> None:
    text = PAGE.read_text(encoding="utf-8")
    derived = "".join(block.text for block in BLOCKS if block.file == "facts/derived.yaml")
    assert [name for name in _FUNCTIONS if f"| `{name}(" not in text and f", `{name}(" not in text] == []
    assert [name for name in _FUNCTIONS if f"{name}(" not in derived] == []


def test_the_generated_parts_are_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page.refreshed(text) == text, "run `python scripts/language_page.py`"


# The page is good to read.


def headings(text: str) -> list[str]:
    return [page.slug(title) for _, title in re.findall(r"^(#{1,6}) (.+)$", page.FENCE.sub("", text), re.MULTILINE)]


def test_every_link_of_the_page_leads_somewhere() -> None:
    text = page.FENCE.sub("", PAGE.read_text(encoding="utf-8"))
    anchors = headings(text)
    assert len(anchors) == len(set(anchors))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        assert not name or (PAGE.parent / name).is_file(), target
        assert not anchor or name or anchor in anchors, target


def test_each_table_of_the_page_has_rows_of_one_width() -> None:
    html = MarkdownIt("commonmark").enable("table").render(PAGE.read_text(encoding="utf-8"))
    tables = re.findall(r"<table>(.*?)</table>", html, re.DOTALL)
    assert len(tables) == len(re.findall(r"^\|---", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    for table in tables:
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        assert len({len(re.findall(r"<t[hd]\b", row)) for row in rows}) == 1, table


def test_no_line_is_wider_than_a_screen() -> None:
    text = page.GENERATED.sub("", page.FENCE.sub("", PAGE.read_text(encoding="utf-8")))
    assert [line for line in text.splitlines() if len(line) > 130 and not line.startswith("|")] == []
