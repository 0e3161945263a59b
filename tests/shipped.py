"""The shipped catalogue, families and formats, read straight from their files: providers need no rule set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gatekeeper.catalogue import Catalogue
from gatekeeper.errors import Fault, RuleError
from gatekeeper.families import Family
from gatekeeper.formats import Format
from gatekeeper.parse_catalogue import parse_catalogue
from gatekeeper.providers import CheckpointReading, read_checkpoint
from gatekeeper.source import Document, check_schema, read_yaml
from gatekeeper.values import Missing, Reading, Value

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "rules"
CORPUS = ROOT / "tests" / "corpus"


@cache
def catalogue() -> Catalogue:
    """Every shipped fact."""
    faults: list[Fault] = []
    documents = [read_yaml(path) for path in sorted((RULES / "facts").glob("*.yaml"))]
    for document in documents:
        faults += check_schema(document, "facts")
    found = parse_catalogue(documents, faults)
    assert not faults, "\n".join(map(str, faults))
    return found


@cache
def families() -> tuple[Family, ...]:
    """Every shipped family."""
    return tuple(Family.parse(read_yaml(path, f"rules/families/{path.name}")) for path in _files("families"))


@cache
def formats() -> tuple[Format, ...]:
    """Every shipped format."""
    return tuple(Format.parse(read_yaml(path, f"rules/formats/{path.name}")) for path in _files("formats"))


def checked(document: Document, kind: str) -> Document:
    """Check the shape of one file, as loading a rule set does; raises `RuleError`."""
    faults = check_schema(document, kind)
    if faults:
        raise RuleError(faults)
    return document


def family(name: str) -> Family:
    """One family by name."""
    return next(one for one in families() if one.name == name)


def _files(folder: str) -> list[Path]:
    return sorted((RULES / folder).glob("*.yaml"))


def read(target: Path) -> CheckpointReading:
    """Read a checkpoint or a config with everything that is shipped."""
    return read_checkpoint(target, catalogue(), families(), formats())


def write_config(folder: Path, config: Mapping[str, Any], hf_quant: Mapping[str, Any] | None = None) -> Path:
    """Write config.json, and hf_quant_config.json where one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if hf_quant is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(hf_quant))
    return folder


def values(readings: Mapping[str, Reading]) -> dict[str, Value | Missing]:
    """Name to value."""
    return {name: reading.value for name, reading in readings.items()}
