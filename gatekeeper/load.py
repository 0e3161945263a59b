"""A folder of YAML to a RuleSet: every file read, checked against its schema, typed; all faults in one error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath

from gatekeeper.data import data_folder
from gatekeeper.errors import Fault, RuleError, Where
from gatekeeper.parse_rules import MANIFEST, RuleParser
from gatekeeper.rules import RuleSet
from gatekeeper.source import Document, check_schema, parse_yaml, read_yaml

# Kind of file by its folder, and of the files that stand alone.
_FOLDERS = {"features": "feature", "gates": "gate", "facts": "facts", "families": "family", "formats": "format"}
_ALONE = {f"{kind}.yaml": kind for kind in ("conditions", "requirements", "platforms", "layouts")}
# What a rule set takes from the one that it extends.
_INHERITED = frozenset({"feature", "facts", "family", "format", *_ALONE.values()})


@cache
def shipped_rules() -> RuleSet:
    """Return the rule set that ships with the project, read once."""
    return load_rules()


def load_rules(path: Path | str | None = None) -> RuleSet:
    """Load the rule set of a folder (the shipped one without `path`). Raises `RuleError` with every fault found."""
    folder = data_folder("rules") if path is None else Path(path)
    faults: list[Fault] = []
    documents = _read_folder(folder, faults, ())
    return _build(documents, faults)


def parse_rule_set(files: Mapping[str, str]) -> RuleSet:
    """Load a rule set from texts by relative path, ``{"ruleset.yaml": ..., "gates/x/y.yaml": ...}``."""
    faults: list[Fault] = []
    documents = []
    for name, text in sorted(files.items()):
        try:
            documents.append((name, parse_yaml(text, name)))
        except RuleError as error:
            faults += error.faults
    return _build(_by_kind(documents, faults), faults)


def _read_folder(folder: Path, faults: list[Fault], opened: tuple[Path, ...]) -> dict[str, list[Document]]:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        message = f"not a rule set: expected a folder with `{MANIFEST}`; name one with --rules"
        raise RuleError([Fault("no-manifest", message, Where(str(folder)))])
    documents = []
    for path in _rule_files(folder):
        try:
            documents.append((path.relative_to(folder).as_posix(), read_yaml(path, _short(path))))
        except RuleError as error:
            faults += error.faults
    kinds = _by_kind(documents, faults)
    base = kinds["ruleset"][0].data.get("extends") if kinds["ruleset"] else None
    if base is not None:
        base_folder = data_folder("rules") if base == "shipped" else (folder / base).resolve()
        if base_folder in opened or base_folder == folder.resolve():
            where = kinds["ruleset"][0].where(("extends",))
            raise RuleError([Fault("cycle", f"`{base}` extends this rule set in turn", where)])
        inherited = _read_folder(base_folder, faults, (*opened, folder.resolve()))
        kinds = {k: [*(inherited[k] if k in _INHERITED else []), *own] for k, own in kinds.items()}
    return kinds


def _short(path: Path) -> str:
    """Show a path as a person would type it: relative to here if it is below, else as given."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _rule_files(folder: Path) -> Iterable[Path]:
    """Yield the YAML files of this rule set; a folder with a manifest of its own is another."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if not (path / MANIFEST).exists():
                yield from _rule_files(path)
        elif path.suffix in (".yaml", ".yml"):
            yield path


def _by_kind(documents: list[tuple[str, Document]], faults: list[Fault]) -> dict[str, list[Document]]:
    kinds: dict[str, list[Document]] = {k: [] for k in ("ruleset", *_FOLDERS.values(), *_ALONE.values())}
    for name, document in documents:
        top = PurePosixPath(name).parts[0]
        kind = "ruleset" if name == MANIFEST else _ALONE.get(name) or (_FOLDERS.get(top) if "/" in name else None)
        if kind is None:
            expected = ", ".join([MANIFEST, *_ALONE, *(f"{folder}/" for folder in _FOLDERS)])
            message = f"a rule set has no `{name}`; expected one of {expected}"
            faults.append(Fault("unexpected-file", message, document.where()))
        elif found := check_schema(document, kind):
            faults += found
        else:
            kinds[kind].append(document)
    return kinds


def _build(kinds: dict[str, list[Document]], faults: list[Fault]) -> RuleSet:
    builder = RuleParser(kinds, faults)
    rules = builder.build()
    if faults:
        raise RuleError(faults)
    assert rules is not None
    return rules
