"""Schemas for editors: they accept what loads, mark what is misspelt, and are written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from gatekeeper import RuleSet, load_rules, parse_rule_set
from gatekeeper.cli import group
from gatekeeper.diagnostics import diagnostics
from gatekeeper.editor_schema import editor_schemas
from gatekeeper.source import parse_yaml, read_yaml
from tests import strategies
from tests.editor_page import PAGE, modeline, neovim_schemas, vscode_settings
from tests.small import files

ROOT = Path(__file__).resolve().parent.parent
KINDS = {path.name.removesuffix(".schema.json") for path in (ROOT / "schema").glob("*.schema.json")}
FOLDERS = {"features": "feature", "gates": "gate", "facts": "facts", "families": "family", "formats": "format"}
# Of rule sets that may be extended or laid over, only the shipped one is loaded here.
SHIPPED = [
    file
    for file in [*sorted((ROOT / "rules").rglob("*.yaml")), *sorted((ROOT / "tests" / "tables").glob("*.yaml"))]
    if not any((folder / "ruleset.yaml").exists() for folder in file.parents if folder != ROOT / "rules")
]
GATE = """\
feature: shared_experts_fusion
gate: new
requires:
  - use: one-storage
  - id: enough
    protects: support
    that: {CONDITION}
    reason: It does not hold.
"""


class Schemas:
    """The schemas of one rule set, and what they say of a file."""

    def __init__(self, rules: RuleSet) -> None:
        self.by_kind = editor_schemas(rules)
        resources = [(f"{kind}.schema.json", Resource.from_contents(one)) for kind, one in self.by_kind.items()]
        self.registry: Registry[Any] = Registry().with_resources(resources)

    def marks(self, kind: str, text: str) -> list[str]:
        validator = Draft202012Validator({"$ref": f"{kind}.schema.json"}, registry=self.registry)
        data = parse_yaml(text, kind).data
        return [f"{list(error.absolute_path)}: {error.message}" for error in validator.iter_errors(data)]


@cache
def shipped() -> Schemas:
    return Schemas(load_rules())


def kind_of(name: str) -> str:
    """The kind of a file by its name, as docs/editors.md has it."""
    if name.endswith(".table.yaml"):
        return "table"
    folder = name.partition("/")[0]
    return FOLDERS.get(folder, folder.removesuffix(".yaml"))


def gate(condition: str) -> str:
    return GATE.replace("{CONDITION}", condition)


def test_every_kind_is_there_as_a_valid_schema_whose_references_lead_somewhere() -> None:
    schemas = shipped()
    assert schemas.by_kind.keys() == KINDS
    for kind, schema in schemas.by_kind.items():
        Draft202012Validator.check_schema(schema)
        resolver = schemas.registry.resolver(base_uri=f"{kind}.schema.json")
        assert [one for one in references(schema) if not isinstance(resolver.lookup(one).contents, dict)] == []


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_fact_stands_in_a_condition_with_its_docs() -> None:
    facts = load_rules().catalogue
    properties = shipped().by_kind["common"]["$defs"]["condition"]["properties"]
    assert {name for name in properties if "." in name} == set(facts)
    for name, spec in facts.items():
        assert properties[name]["description"] == spec.doc
        assert properties[name]["title"] == name
        assert f"Known from the stage {facts.stage_of(name)} on." in properties[name]["markdownDescription"]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_shipped_file_is_not_marked(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    kind = re.search(r"/([a-z]+)\.schema\.json", text)
    assert kind
    if "rules" not in read_yaml(file).data or kind[1] != "table":  # that table is about the names of another rule set
        assert shipped().marks(kind[1], text) == []


def sound() -> Iterator[Any]:
    """Files in the place of some of the small rule set's, with which it loads."""
    for case in yaml.safe_load((ROOT / "tests" / "faults.yaml").read_text(encoding="utf-8")):
        if "expect" not in case and "extends" not in str(case["files"].get("ruleset.yaml")):
            yield pytest.param(case["files"], id=case["name"])
    for one in diagnostics().values():
        if one.right and "extends" not in str(one.right.get("ruleset.yaml")):
            yield pytest.param(one.right, id=one.code)


@pytest.mark.parametrize("changes", [*sound()])
def test_what_loads_is_not_marked(changes: dict[str, str]) -> None:
    own = files({name: text for name, text in changes.items() if not name.startswith("overlay/")})
    over = {name.removeprefix("overlay/"): text for name, text in changes.items() if name.startswith("overlay/")}
    rules = {name: text for name, text in own.items() if kind_of(name) != "table"}
    schemas = Schemas(parse_rule_set(rules, [over] if over else []))
    texts = [*own.items(), *over.items()]
    assert [(name, found) for name, text in texts if (found := schemas.marks(kind_of(name), text))] == []


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], max_examples=25)
@given(strategies.rule_sets())
def test_no_rule_set_that_loads_is_marked(
    made: tuple[Mapping[str, Any], Mapping[str, str], list[Mapping[str, str]]],
) -> None:
    _, own, overlays = made
    schemas = Schemas(parse_rule_set(own, overlays))
    texts = [item for one in (own, *overlays) for item in one.items()]
    assert [(name, text, found) for name, text in texts if (found := schemas.marks(kind_of(name), text))] == []


@pytest.mark.parametrize(
    ("text", "at"),
    [
        (gate("{model.n_routed_expert: 256}"), "'that'"),
        (gate("{any: [{use: own-loader}, {model.famly: x}]}"), "'any', 1"),
        (gate("{every_layer: {that: {layer.routed_stor.format: bf16}}}"), "'every_layer', 'that'"),
        (gate("{platform.vendor: cud}"), "'platform.vendor'"),
        (gate("{platform.vendor: [hip, cud]}"), "'platform.vendor', 1"),
        (gate("{platform.vendor: {in: [cud]}}"), "'in', 0"),
        (gate("{platform.vendor: {gt: cuda}}"), "'platform.vendor'"),
        (gate("{model.n_routed_experts: many}"), "'model.n_routed_experts'"),
        (gate("{model.n_routed_experts: {ge: true}}"), "'ge'"),
        (gate("{server.enable_eplb: 'on'}"), "'server.enable_eplb'"),
        (gate("{quant.ignored_modules: lm_head}"), "'quant.ignored_modules'"),
        (gate("{layer.shared_storage: {fact: layer.routed}}"), "'fact'"),
        (gate("{model.n_routed_experts: {fact: model.family}}"), "'fact'"),  # not comparable
        (gate("{use: own-loadr}"), "'use'"),
        (gate("{use: [own-loader, own-loadr]}"), "'use', 1"),
        (gate("{use: own-loader}").replace("one-storage", "one-store"), "'requires', 0, 'use'"),
        (gate("{use: own-loader}\n    allow: [{code: open-rang, because: It is so.}]"), "'code'"),
        (gate("{feature.moe_backend.option: eager, feature.moe_backnd.option: eager}"), "'that'"),
        (gate("{use: own-loader}").replace("_fusion", "_fusio"), "'feature'"),
        ("amends: shared_experts_fusion/deepseek\ndrop: [{requirement: x, because: It is so long.}]\n", "'amends'"),
    ],
)
def test_a_misspelt_name_in_a_gate_is_marked(text: str, at: str) -> None:
    found = shipped().marks("gate", text)
    assert found and all(at in one for one in found), found


@pytest.mark.parametrize(
    ("kind", "text", "at"),
    [
        ("feature", "{feature: x, summary: A feature., request: server.moe_runner_backnd}", "'request'"),
        ("feature", "{feature: x, summary: A feature., request: {force: server.moe_runner_backend}}", "'force'"),
        ("feature", "{feature: x, summary: A feature., request: server.enable_eplb}", "'request'"),
        ("platforms", "{platforms: {x: {doc: A machine., sets: {platform.vendr: cuda}}}}", "'sets'"),
        ("platforms", "{platforms: {x: {doc: A machine., sets: {platform.vendor: cud}}}}", "'platform.vendor'"),
        ("layouts", "{layouts: {x: {doc: A layout., sets: {parallel.tp_size: 0}}}}", "'parallel.tp_size'"),
        ("layouts", "{layouts: {x: {doc: A layout., sets: {parallel.moe_tp_size: 2}}}}", "'sets'"),  # derived
        ("table", "{table: fusion, rows: []}", "'table'"),
        ("table", "{table: moe_backend, base: {platform: h20000}, rows: []}", "'platform'"),
        ("table", "{table: moe_backend, base: {layout: tp9}, rows: []}", "'layout'"),
        ("table", "{table: moe_backend, base: {assume: [servr]}, rows: []}", "'assume', 0"),
        ("table", "{table: moe_backend, base: {unknown: [server.enable_epl]}, rows: []}", "'unknown', 0"),
        ("table", "{table: moe_backend, base: {facts: {model.hiden_size: 8}}, rows: []}", "'facts'"),
        ("table", "{table: moe_backend, base: {layers: [{layer.role: mtb}]}, rows: []}", "'layer.role'"),
        ("record", "{facts: {layer.routed_storage: {formt: bf16}}}", "'layer.routed_storage'"),
    ],
)
def test_a_misspelt_name_elsewhere_is_marked(kind: str, text: str, at: str) -> None:
    found = shipped().marks(kind, text)
    assert found and all(at in one for one in found), found


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("gate", gate("{quant.method: a-quantizer-of-tomorrow}")),
        ("gate", gate("{platform.arch: {in: [sm200]}, library.torch: {ge: 2.10, lt: '3'}}")),
        ("gate", gate("{layer.routed_excluded: true, layer.shared_excluded: partly}")),
        ("gate", gate("{model.moe_intermediate_size: {divisible_by: {fact: parallel.tp_size}}}")),
        ("gate", "amends: shared_experts_fusion/deepseek_v3\ndrop: [{requirement: gone, because: It is so long.}]\n"),
        ("record", "{facts: {platform.vendor: null, layer.routed_storage: {format: bf16, block: null}}}"),
        ("layouts", "{layouts: {x: {doc: A layout., sets: {parallel.tp_size: 32}}}}"),  # more than is suggested
    ],
)
def test_what_is_only_suggested_forbids_nothing(kind: str, text: str) -> None:
    assert shipped().marks(kind, text) == []


def test_an_overlay_brings_its_own_names() -> None:
    overlay = {
        "ruleset.yaml": "name: over\nversion: 1\nlanguage: 1\n",
        "facts/more.yaml": "facts: {env.SITE: {type: string, doc: The site., given_by: [environment]}}\n",
    }
    before, after = Schemas(parse_rule_set(files())), Schemas(parse_rule_set(files(), [overlay]))
    text = "feature: fused\nrequires: [{id: x, protects: speed, that: {env.SITE: here}, reason: Not here.}]\n"
    assert before.marks("gate", text) != [] == after.marks("gate", text)


# ------------------------------------------------------------------------------------------------------ the command


def schema(*arguments: str | Path) -> Result:
    return CliRunner().invoke(group, ["schema", *map(str, arguments)])


def test_the_command_writes_one_file_a_kind(tmp_path: Path) -> None:
    done = schema(tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{tmp_path / 'out'}: {len(KINDS)} schemas, ")
    written = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out").glob("*.json")}
    assert written == {f"{kind}.schema.json": one for kind, one in shipped().by_kind.items()}


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "gatekeeper", "schema", str(tmp_path / seed)]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()} for seed in ("1", "2"))
    assert first == second


def test_earlier_schemas_are_replaced(tmp_path: Path) -> None:
    rules, out = tmp_path / "rules", tmp_path / "out"
    for name, text in files().items():
        (rules / name).parent.mkdir(parents=True, exist_ok=True)
        (rules / name).write_text(text, encoding="utf-8")
    assert schema(out, "--rules", rules).exit_code == 0
    assert "model.brand_new" not in (out / "common.schema.json").read_text(encoding="utf-8")
    (rules / "facts" / "new.yaml").write_text("facts: {model.brand_new: {type: integer, doc: It is new.}}\n")
    assert schema(out, "--rules", rules).exit_code == 0
    assert "model.brand_new" in (out / "common.schema.json").read_text(encoding="utf-8")


def test_a_folder_with_other_files_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = schema(tmp_path)
    assert done.exit_code == 1
    assert "`notes.txt`" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert schema(tmp_path, "--force").exit_code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_schemas_that_check_rules_are_never_written_over() -> None:
    before = {path: path.read_bytes() for path in (ROOT / "schema").iterdir()}
    done = schema(ROOT / "schema", "--force")
    assert done.exit_code == 2
    assert "give another folder" in done.stderr
    assert {path: path.read_bytes() for path in (ROOT / "schema").iterdir()} == before


def test_nothing_is_written_for_a_rule_set_with_faults(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "ruleset.yaml").write_text("name: x\n")
    assert schema(tmp_path / "out", "--rules", tmp_path / "rules").exit_code == 1
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- the page


def test_the_settings_on_the_page_name_a_schema_for_every_kind_of_file_that_people_write() -> None:
    schemas = vscode_settings()["yaml.schemas"]
    assert neovim_schemas() == schemas
    # Amendments are under gates/ and come with that schema.
    kinds = {"ruleset", *FOLDERS.values(), "conditions", "requirements", "platforms", "layouts", "table"}
    assert kinds < KINDS
    assert set(schemas) == {f".schemas/{kind}.schema.json" for kind in kinds}
    assert modeline() == "# yaml-language-server: $schema=../../.schemas/gate.schema.json"
    assert "gatekeeper schema .schemas --rules rules" in PAGE.read_text(encoding="utf-8")
