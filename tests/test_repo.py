"""What holds for the repository as a whole: schemas that editors can use, pinned packages, nothing left behind."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = sorted((ROOT / "schema").glob("*.json"))
YAML_FILES = sorted(
    file
    for folder in ("rules", "examples", "tests/tables")
    for suffix in ("*.yaml", "*.yml")
    for file in (ROOT / folder).rglob(suffix)
)
MODELINE = re.compile(r"^# yaml-language-server: \$schema=(\S+)$", re.MULTILINE)

# Written in halves, so that this file is not a finding of its own.
LEFT_BEHIND = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "HACK" + ":")))
PLACES = re.compile(
    "|".join((r"(?<![\w.])/(?:ro" + r"ot|home/\w+|work|Users/\w+)/", "py" + r"pi\.org", "python" + "hosted"))
)


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def text_files() -> Iterator[tuple[str, str]]:
    """Every text file that is, or could be, committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        try:
            yield name, (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue


def findings(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in text_files()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def test_nothing_is_left_to_do() -> None:
    assert findings(LEFT_BEHIND) == []


def test_no_path_of_one_machine_and_no_registry() -> None:
    assert findings(PLACES) == []


def test_every_model_of_the_corpus_is_credited() -> None:
    notice = (ROOT / "tests" / "corpus" / "NOTICE").read_text(encoding="utf-8")
    models = [folder.name for folder in (ROOT / "tests" / "corpus").iterdir() if folder.is_dir()]
    assert models
    assert [name for name in models if name not in notice and name.replace("__", "/") not in notice] == []


def test_there_are_schemas_and_rules() -> None:
    # The tests below are made from what is there: nothing there must not look like nothing wrong.
    assert {"gate.schema.json", "decision.schema.json", "table.schema.json"} <= {file.name for file in SCHEMAS}
    assert ROOT / "rules" / "ruleset.yaml" in YAML_FILES


@pytest.mark.parametrize("file", SCHEMAS, ids=name_of)
def test_schema_is_valid_and_describes_every_property(file: Path) -> None:
    schema = json.loads(file.read_text(encoding="utf-8"))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    assert [where for where, property_ in properties(schema, "#") if not described(file, property_)] == []


def properties(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every property that a schema declares, at any depth, with its place."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from properties(item, f"{where}/{index}")
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("const", "enum", "default", "examples"):
                continue
            if key == "properties":
                for name, property_ in value.items():
                    yield f"{where}/properties/{name}", property_
                    yield from properties(property_, f"{where}/properties/{name}")
            else:
                yield from properties(value, f"{where}/{key}")


def described(file: Path, property_: Any) -> bool:
    """True if an editor has words to show: the property's own, or those of what it refers to."""
    if isinstance(property_, bool):
        return not property_  # `false` forbids the property: there is nothing to show
    if property_.get("description", "").strip():
        return True
    if "$ref" not in property_:
        return False
    name, _, path = property_["$ref"].partition("#")
    target_file = file.parent / name if name else file
    target = json.loads(target_file.read_text(encoding="utf-8"))
    for key in filter(None, path.split("/")):
        target = target[key]
    return described(target_file, target)


@pytest.mark.parametrize("file", YAML_FILES, ids=name_of)
def test_yaml_tells_editors_its_schema(file: Path) -> None:
    head = "\n".join(file.read_text(encoding="utf-8").splitlines()[:5])
    found = MODELINE.search(head)
    assert found, "no `# yaml-language-server: $schema=...` in the first lines"
    assert (file.parent / found[1]).resolve() in SCHEMAS, f"{found[1]} is no file of schema/"


def test_every_package_that_make_installs_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert [str(pin) for pin in pins if [part.operator for part in pin.specifier] != ["=="]] == []
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in pins}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # `bench` is for machines with a GPU, which have a Triton of their own; `make` installs the others.
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra != "bench"]
    asked = [*project["dependencies"], *(line for lines in extras for line in lines)]
    waiting, seen = [Requirement(line) for line in asked], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(next(iter(pinned[name])).version), f"{requirement}, pinned {pinned[name]}"
        # torch may be a build of one's own (TORCH=...), which brings what it needs by itself.
        if name in seen or name == "torch":
            continue
        seen.add(name)
        needed = map(Requirement, metadata.requires(name) or ())
        waiting += [part for part in needed if part.marker is None or part.marker.evaluate({"extra": ""})]
    assert {"pyyaml", "jsonschema", "mypy"} <= seen
