"""`gatekeeper docs`: pages say what the rules say, read well, link to what is there; the committed ones are current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from markdown_it import MarkdownIt

from gatekeeper import parse_rule_set
from gatekeeper.cli import group
from gatekeeper.docs import gate_pages
from gatekeeper.load import shipped_rules
from gatekeeper.markdown import prose, refs, table
from gatekeeper.written import MARKER, differences, write_folder
from tests.small import FACTS, files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "gates"
REFRESH = "gatekeeper docs docs/gates --source ../../rules"

FEATURE = """\
feature: fused
summary: One *thing* instead of <two> | three.
mode: shadow
scope: layer
request: {force: server.force, forbid: server.forbid}
refs: ["a/b#12", "https://example.org/why", "the manual, page 3"]
outputs:
  width: {type: integer, value: {fact: model.m}, else: 0, doc: How wide.}
  kind: {type: string, else: null}
"""
GATE = """\
feature: fused
gate: small
mode: enforce
applies_to: {model.family: [a, b], use: spread}
request: required
on_failure: error
outputs: {width: 9}
requires:
  - use: spoken
  - id: late
    protects: speed
    on_failure: error
    at: layout
    that: {model.n: {ge: 4}}
    reason: "{model.n} is {{few}}: {difference}"
options:
  - option: fast
    outputs: {kind: f}
    requires: [{id: even, protects: support, that: {model.n: {divisible_by: 2}}, reason: "{model.n} is odd."}]
  - {option: slow, degraded: It takes twice as long., outputs: {kind: s}}
"""
SHARED = """\
requirements:
  spoken:
    protects: correctness
    when: {use: spread}
    that:
      any:
        - {layer.one: {fact: layer.two}}
        - {model.tags: {contains: x}, model.m: 7}
        - {model.sizes: {every_item: 128}}
    reason: It is not so.
    refs: ["a/b#3"]
"""
CONDITIONS = """\
conditions:
  spread: {doc: On several ranks., that: {parallel.tp_size: {gt: 1}}}
"""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    texts = {
        "features/fused.yaml": FEATURE,
        "gates/fused/small.yaml": GATE,
        "requirements.yaml": SHARED,
        "conditions.yaml": CONDITIONS,
    }
    return gate_pages(parse_rule_set(files(texts)), folder=Path("nowhere"))


def test_the_committed_pages_are_what_the_shipped_rules_say() -> None:
    pages = gate_pages(shipped_rules(), folder=ROOT / "rules", source="../../rules")
    assert differences(DOCS, pages, by="gatekeeper docs") == [], f"run `{REFRESH}`"


def broken_links(folder: Path) -> list[tuple[str, str]]:
    broken = []
    for path in folder.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text):
            if "://" in target:
                assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+", target), target
                continue
            name, _, anchor = target.partition("#")
            found = (path.parent / name).resolve() if name else path
            if not found.is_file() or (anchor and not has_anchor(found, anchor)):
                broken.append((path.name, target))
    return broken


def has_anchor(path: Path, anchor: str) -> bool:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return re.fullmatch(r"L\d+", anchor) is not None and int(anchor[1:]) <= len(text.splitlines())
    return anchor in re.findall(r"^#+ ([\w-]+)$", text, re.MULTILINE)


def test_each_link_of_the_committed_pages_leads_somewhere() -> None:
    assert len(list(DOCS.rglob("*.md"))) > 20
    assert broken_links(DOCS) == []


def test_each_link_of_other_rules_leads_somewhere_too(pages: dict[str, str], tmp_path: Path) -> None:
    write_folder(tmp_path / "out", pages, by="tests")
    assert broken_links(tmp_path / "out") == []


def test_there_is_a_page_for_each_feature_and_gate_and_one_of_each_kind(pages: dict[str, str]) -> None:
    assert list(pages) == [
        "README.md",
        "facts.md",
        "conditions.md",
        "families.md",
        "formats.md",
        "features/fused.md",
        "features/fused/small.md",
    ]


def test_a_gate_page_says_what_when_and_why(pages: dict[str, str]) -> None:
    page = pages["features/fused/small.md"]
    for line in (
        "`a` or `b`, and `parallel.tp_size` is more than 1 ([spread](../../conditions.md#spread))",
        "- **Asked for**: off unless asked for",
        "- **No option left**: an error",
        "- **Where**: `parallel.tp_size` is more than 1 ([spread](../../conditions.md#spread))",
        "- **Must hold**: at least one of",
        "  - `layer.one` equals `layer.two`",
        "  - `model.tags` contains `x` and `model.m` is 7",
        "  - `model.sizes` has items of which every one is 128",
        "- **Otherwise** off: It is not so.",
        "- **Otherwise** an error: `model.n` is {few}: (what differs)",
        "- **Known** at the stage `layout` at the latest",
        "- **Seen in**: [a/b#3](https://github.com/a/b/issues/3)",
        "Protects **speed**: a request waives it.",
        "Protects **support**: asking for `fast` waives it.",
        "- **Otherwise** `fast` is out: `model.n` is odd.",
        "**Degraded**: It takes twice as long.",
        "With it, `kind` is `s`.",
        "| `width` | integer | 9 | 0 | How wide. |",
        "| `kind` | string | what the gate or the option gives | none |   |",
    ):
        assert f"{line}\n" in page, line
    assert "shadow" not in page, "the gate enforces what the feature would only shadow"


def test_a_feature_page_says_how_to_ask_for_it_and_what_is_lost(pages: dict[str, str]) -> None:
    page = pages["features/fused.md"]
    for line in (
        r"One \*thing\* instead of \<two\> \| three.",
        "- **Decided**: once for each MoE layer that a runner loads",
        "- **Asked for**: asked for by `server.force` and forbidden by `server.forbid`",
        "- **Mode**: shadow: it is decided and logged, and consumers see it as off",
        "- **Seen in**: [a/b#12](https://github.com/a/b/issues/12), <https://example.org/why>, the manual, page 3",
        "2. **slow**: It takes twice as long.",
        "| `width` | integer | `model.m` | 0 | How wide. |",
    ):
        assert f"{line}\n" in page, line


def test_the_facts_page_has_every_fact_once(pages: dict[str, str]) -> None:
    declared = re.findall(r"^  ([a-z]+\.[a-z_.]+):", FACTS, re.MULTILINE)
    for name in declared:
        assert pages["facts.md"].count(f"\n| `{name}` |") == 1, name
    assert (
        "| `parallel.tp_size` | integer | Ranks. An operator may set 1, 2 or 4. | given by flags | layout |"
        in pages["facts.md"]
    )


def test_tables_have_as_many_cells_as_heads_whatever_stands_in_them(pages: dict[str, str]) -> None:
    markdown = MarkdownIt("commonmark").enable("table")
    pages = {
        **pages,
        "hostile.md": "\n".join(table(("a", "b"), [("x | y", "`p | q`"), (prose("<b> *c* [d](e) \\|"), "")])),
    }
    for name, text in pages.items():
        tables = re.findall(r"<table>(.*?)</table>", markdown.render(text), re.DOTALL)
        assert len(tables) == len(re.findall(r"^\|---", text, re.MULTILINE)), name
        for one in tables:
            widths = {len(re.findall(r"<t[hd]\b", row)) for row in re.findall(r"<tr>(.*?)</tr>", one, re.DOTALL)}
            assert len(widths) == 1, name


def test_plain_text_is_not_taken_for_markup() -> None:
    html = MarkdownIt("commonmark").render(prose("a_b_c *d* <e> [f](g) `h*i*` \\ | j"))
    assert html == "<p>a_b_c *d* &lt;e&gt; [f](g) <code>h*i*</code> \\ | j</p>\n"


def test_refs_are_links_where_they_are_threads_or_addresses() -> None:
    assert refs(["a/b#1", "a/b#1"]) == "[a/b#1](https://github.com/a/b/issues/1)"
    assert refs(["https://x.org/y", "see <here>"]) == r"<https://x.org/y>, see \<here\>"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(group, ["docs", *arguments])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def test_the_command_writes_the_pages_and_checks_them(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    code, output = run(out)
    assert (code, output.startswith(f"{out}: ")) == (0, True)
    assert (tmp_path / "out" / MARKER).is_file()
    first = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run(out)[0] == 0
    assert first == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run(out, "--check")[0] == 0
    (tmp_path / "out" / "README.md").write_text("mine")
    code, output = run(out, "--check")
    assert code == 1 and "`README.md` is out of date" in output


def test_the_command_writes_over_nobody_elses_files(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    code, output = run(str(tmp_path))
    assert code == 1 and "notes.md" in output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_pages_name_no_path_of_this_machine(pages: dict[str, str]) -> None:
    for text in (*pages.values(), *(path.read_text() for path in DOCS.rglob("*.md"))):
        assert str(ROOT) not in text
