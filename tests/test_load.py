"""Loading a rule set: every fault is found in one run, with its place; nothing that is wrong crashes or loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatekeeper import RuleError, load_rules, parse_rule_set
from gatekeeper.load import shipped_rules
from tests.small import FACTS, FEATURE, FILES, MANIFEST, faults, files
from tests.strategies import to_yaml

HEAD = "feature: fused\nsummary: One thing instead of two.\n"
REQUIREMENT = "{id: a, protects: support, that: {model.n: 3}, reason: No.}"


def gate(name: str, applies_to: str, more: str = "") -> str:
    return f"feature: fused\ngate: {name}\napplies_to: {applies_to}\nrequires: [{REQUIREMENT}]\n{more}"


DECLARED = {"features/fused.yaml": HEAD}


FAULTS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "faults.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", FAULTS, ids=[row["name"] for row in FAULTS])
def test_each_fault_has_its_code_its_place_and_a_hint(row: dict[str, Any]) -> None:
    found, expected = faults(row["files"]), row.get("expect", [])
    assert [part for part in expected if not any(part in one for one in found)] == [], found
    assert bool(found) == bool(expected), found


def test_covers_needs_the_method_by_whose_rules_a_list_is_read() -> None:
    feature = f"{HEAD}requires: [{REQUIREMENT.replace('model.n: 3', 'model.tags: {covers: a}')}]"
    changes = {"facts/all.yaml": FACTS.replace("quant.method", "quant.other"), "features/fused.yaml": feature}
    assert ["unknown fact `quant.method`" in fault for fault in faults(changes)] == [True]


def test_a_fault_is_said_once_and_not_again_for_what_follows_from_it() -> None:
    # A fact whose declaration is at fault is not unknown as well, wherever it is used.
    for broken in (
        FACTS.replace("type: integer, minimum: 1", "type: int, minimum: 1"),
        FACTS.replace("type: integer, minimum: 1", "type: integer, default: x, minimum: 1"),
        FACTS.replace("  model.n:", "  model.n: {a: [}\n  model.n:"),
    ):
        found = faults({"facts/all.yaml": broken})
        assert len(found) == 1 and found[0].startswith("facts/all.yaml:"), found


def test_everything_wrong_is_found_in_one_run() -> None:
    found = faults(
        {
            "ruleset.yaml": MANIFEST.replace("language: 1", "language: 9"),
            "facts/more.yaml": """\
                facts:
                  a.b: {type: integer, doc: A fact., default: x}
                  a.c: {type: intger, doc: A fact.}
                """,
            "features/fused.yaml": """\
                feature: fused
                feature: fused
                summary: One thing instead of two.
                requires:
                  - {id: one, protects: support, that: {model.nn: 3}, reason: No.}
                  - {id: two, protects: support, that: {model.n: three}, reason: No.}
                  - {id: three, protects: support, that: {model.n: {gte: 3}}, reason: No.}
                  - {id: four, protects: sport, that: {model.n: 3}, reason: No.}
                  - {id: five, protects: support, that: {a.b: 3, a.c: 3}, reason: No.}
                """,
            "features/torn.yaml": "feature: torn\nsummary: 'It is torn\n",
            "gates/fused/x.yaml": "feature: torn\ngate: x\n",
            "readme.yaml": "a: 1",
        }
    )
    assert [fault.rsplit(": ", 1)[0].split(": ")[:2] for fault in found] == [
        ["facts/more.yaml:2:3", "bad-fact"],
        ["facts/more.yaml:3:9", "wrong-value"],
        ["features/fused.yaml:2:1", "duplicate-key"],
        ["features/fused.yaml:5:41", "unknown-fact"],
        ["features/fused.yaml:6:41", "wrong-value"],
        ["features/fused.yaml:7:53", "unknown-key"],
        ["features/fused.yaml:8:16", "wrong-value"],
        ["features/torn.yaml:3:1", "syntax"],
        ["readme.yaml:1:1", "unexpected-file"],
        ["ruleset.yaml:3:1", "unknown-language"],
    ]


@pytest.mark.parametrize("name", ["facts/more.yaml", "conditions.yaml", "gates/fused/a.yaml", "features/more.yaml"])
def test_an_empty_key_is_an_unknown_one(name: str) -> None:
    found = faults({**files(DECLARED), name: "'': null\n"})
    assert found
    assert [fault for fault in found if "unexpected-file" in fault or fault.endswith(": ")] == []


def write(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_a_folder_is_the_same_rule_set_as_its_texts(tmp_path: Path) -> None:
    assert load_rules(write(tmp_path, files())).digest == parse_rule_set(files()).digest


def test_folders_that_are_odd_do_no_harm(tmp_path: Path) -> None:
    write(tmp_path, files())
    digest = load_rules(tmp_path).digest
    (tmp_path / "gates" / "x.yaml").mkdir(parents=True)
    (tmp_path / "gates" / "loop").symlink_to(tmp_path / "gates", target_is_directory=True)
    (tmp_path / "gates" / "notes.txt").write_text("no rule")
    write(tmp_path / "gallery" / "other", {"ruleset.yaml": "not even: [a rule set"})
    assert load_rules(tmp_path).digest == digest


def test_a_link_that_leads_nowhere_is_a_fault(tmp_path: Path) -> None:
    write(tmp_path, files())
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "gone.yaml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RuleError, match=r"gone\.yaml: not-a-file: expected a YAML file, there is none"):
        load_rules(tmp_path)


@pytest.mark.parametrize("name", ["missing", "x" * 300, "file.txt", "nul\0"])
def test_what_is_no_rule_set_is_one_fault(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("no folder")
    with pytest.raises(RuleError) as caught:
        load_rules(tmp_path / name)
    assert [fault.code for fault in caught.value.faults] in (["no-manifest"], ["unreadable"])


def test_extending_takes_the_catalogue_and_the_features_but_no_gates(tmp_path: Path) -> None:
    write(tmp_path / "base", {**files(DECLARED), "gates/a.yaml": gate("a", "{model.n: 1}")})
    extended = write(tmp_path / "own", {"ruleset.yaml": MANIFEST + "extends: ../base\n"})
    rules = load_rules(extended)
    assert "model.n" in rules.catalogue
    assert rules.gates == {"fused": ()}


@pytest.mark.parametrize(
    ("extends", "code"),
    [(".", "cycle"), ("../base", "cycle"), ("../nothing", "no-manifest"), ("../../../..", "no-manifest")],
)
def test_extending_itself_or_nothing_is_a_fault_at_that_line(tmp_path: Path, extends: str, code: str) -> None:
    write(tmp_path / "base", {**files(), "ruleset.yaml": MANIFEST + "extends: ../own\n"})
    own = write(tmp_path / "own", {"ruleset.yaml": MANIFEST + f"extends: {extends}\n"})
    with pytest.raises(RuleError) as caught:
        load_rules(own)
    (fault,) = caught.value.faults
    assert (fault.code, fault.where.line) == (code, 4)


def test_a_base_is_not_redefined_in_silence(tmp_path: Path) -> None:
    conditions = "conditions: {few: {doc: Only a few., that: {model.n: 3}}}"
    requirements = "requirements: {one: {protects: support, that: {model.n: 3}, reason: No.}}"
    named = {"conditions.yaml": conditions, "requirements.yaml": requirements}
    write(tmp_path / "base", {**files(), **named})
    own = write(tmp_path / "own", {"ruleset.yaml": MANIFEST + "extends: ../base\n", **named})
    with pytest.raises(RuleError) as caught:
        load_rules(own)
    assert [fault.code for fault in caught.value.faults] == ["duplicate-condition", "duplicate-requirement"]


def test_the_digest_is_over_content_not_bytes() -> None:
    base = parse_rule_set(files()).digest
    commented = parse_rule_set(files({"features/fused.yaml": "# a word\n" + FEATURE, "facts/all.yaml": FACTS + "\n\n"}))
    assert commented.digest == base
    renamed = {**FILES, "features/other.yaml": FEATURE}
    del renamed["features/fused.yaml"]
    assert parse_rule_set(renamed).digest == base
    assert parse_rule_set(files({"features/fused.yaml": FEATURE.replace("ge: 4", "ge: 5")})).digest != base
    versions = [FEATURE.replace("model.n: {ge: 4}", f"library.torch: {{ge: {text}}}") for text in ("2.1", "2.10")]
    assert len({parse_rule_set(files({"features/fused.yaml": text})).digest for text in versions}) == 2


def test_faults_come_in_the_same_order_in_every_process() -> None:
    code = "from tests.small import faults; print(faults({'ruleset.yaml': '{}', 'conditions.yaml': '{a: 1, b: 2}'}))"
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(answers) == 1


def test_the_shipped_rules_are_sound() -> None:
    assert shipped_rules().name == "shipped"


WORDS = [
    "facts",
    "model.n",
    "a.b",
    "type",
    "doc",
    "derive",
    "values",
    "fields",
    "default",
    "from",
    "items",
    "feature",
    "summary",
    "scope",
    "request",
    "force",
    "outputs",
    "value",
    "else",
    "requires",
    "id",
    "use",
    "protects",
    "when",
    "that",
    "reason",
    "options",
    "option",
    "degraded",
    "conditions",
    "requirements",
    "platforms",
    "layouts",
    "sets",
    "family",
    "format",
    "matches",
    "names",
    "all",
    "any",
    "not",
    "every_layer",
    "where",
    "fact",
    "eq",
    "in",
    "covers",
    "any_item",
    "name",
    "version",
    "language",
    "extends",
    "gate",
    "applies_to",
    "on_failure",
    "signatures",
    "moe_layer",
]
JSON_LIKE: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "a", "model.n", "{", "on", "because x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=14,
)
KINDS = sorted({*FILES, "gates/f/g.yaml", "conditions.yaml", "requirements.yaml", "platforms.yaml", "layouts.yaml",
                "families/f.yaml", "formats/f.yaml"})  # fmt: skip
ONE = {"protects": "support", "that": {"model.n": 3}, "reason": "No."}
SOUND: dict[str, Any] = {
    "facts/all.yaml": {"facts": {"model.n": {"type": "integer", "doc": "A number."}}},
    "features/fused.yaml": {"feature": "fused", "summary": "One thing.", "requires": [{"id": "a", **ONE}]},
    "conditions.yaml": {"conditions": {"a": {"doc": "One thing.", "that": {"model.n": 3}}}},
    "requirements.yaml": {"requirements": {"a": ONE}},
    "gates/f/g.yaml": {"feature": "fused", "gate": "g", "applies_to": {"model.n": 4}, "options": [{"option": "a"}]},
    "ruleset.yaml": {"name": "a", "version": 1, "language": 1},
}  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, Any]:
    """One file in which something, or everything, is something else."""
    kind = draw(st.sampled_from(KINDS))
    data = draw(JSON_LIKE)
    if kind not in SOUND or draw(st.integers(0, 4)) == 0:
        return kind, data

    def walk(node: Any) -> Any:
        if not isinstance(node, dict | list) or draw(st.integers(0, 3)) == 0:
            return data
        if isinstance(node, list):
            return [walk(one) for one in node]
        key = draw(st.sampled_from(sorted(node)))
        return {**node, key: walk(node[key])}

    return kind, walk(SOUND[kind])


def document_loads_or_is_a_fault(kind: str, data: Any) -> None:
    try:
        parse_rule_set({**FILES, kind: to_yaml(data)})
    except RuleError as error:
        found = error.faults
    else:
        return
    assert found and all(fault.code and fault.message for fault in found)


@given(drawn=damaged())
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_any_document_loads_or_is_a_fault(drawn: tuple[str, Any]) -> None:
    document_loads_or_is_a_fault(*drawn)


@pytest.mark.slow_property
@given(drawn=damaged())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_document_loads_or_is_a_fault_at_length(drawn: tuple[str, Any]) -> None:
    document_loads_or_is_a_fault(*drawn)


@pytest.mark.parametrize("base", ['"\\0"', "loop", "x" * 300])
def test_a_base_that_no_path_leads_to_is_a_fault(base: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "ruleset.yaml").write_text(f"{MANIFEST}extends: {base}\n")
    with pytest.raises(RuleError) as caught:
        load_rules(tmp_path, fresh=True)
    assert [(fault.code, fault.where.line) for fault in caught.value.faults] == [("no-manifest", 4)]


def test_every_overlay_that_is_missing_is_told_with_the_faults_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "ruleset.yaml").write_text(MANIFEST)
    (tmp_path / "features" / "a.yaml").write_text("feature: a\n")
    with pytest.raises(RuleError) as caught:
        load_rules(tmp_path, [tmp_path / "b", tmp_path / "c"])
    assert [(fault.code, Path(fault.where.file).name) for fault in caught.value.faults] == [
        ("no-manifest", "b"),
        ("no-manifest", "c"),
        ("missing-key", "a.yaml"),
    ]
