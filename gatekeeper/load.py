"""A folder of YAML to a RuleSet: every file read, checked against its schema, typed; all faults in one error."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from gatekeeper.data import data_folder
from gatekeeper.errors import Fault, RuleError, Where
from gatekeeper.parse_rules import MANIFEST, RuleParser
from gatekeeper.passed import remembering, shape_faults
from gatekeeper.rules import RuleSet
from gatekeeper.source import Document, Path_, scan_file, scan_yaml

Kinds: TypeAlias = dict[str, list[Document]]

# Kind of file by its folder, and of the files that stand alone.
_FOLDERS = {"features": "feature", "gates": "gate", "facts": "facts", "families": "family", "formats": "format"}
_ALONE = {f"{kind}.yaml": kind for kind in ("conditions", "requirements", "platforms", "layouts")}
# What a rule set takes from the one that it extends.
_BROKEN = "broken"
_AMENDMENT = "amendment"
_OVERLAY = "overlay"
_INHERITED = frozenset({"feature", "facts", "family", "format", *_ALONE.values(), _AMENDMENT, _BROKEN})
# Keys whose entries stand each for itself, and keys whose entries other files name.
_ENTRIES = frozenset({"requires", "options", "facts", "conditions", "requirements", "platforms", "layouts"})
_STAND_INS: Mapping[str, str] = {**dict.fromkeys(("summary", "reason", "doc"), ""), "protects": "correctness"}
"""Texts, and what a request may waive: without one, a file can be checked as if it were there."""
_TELLING = {
    "gate": ("summary", "this declares a feature, and stands under `gates/`; move it to `features/`"),
    "feature": ("gate", "this is a gate, and stands under `features/`; move it to `gates/FEATURE/`"),
}
"""The key that tells that a file stands in the wrong folder, and what to say instead of what follows from it."""
_MISSING = re.compile(r"missing key `(\w+)`")
_DECLARING = frozenset({"facts", "conditions", "requirements", "feature"})


@cache
def shipped_rules() -> RuleSet:
    """Return the rule set that ships with the project, read once."""
    return load_rules()


def load_rules(path: Path | str | None = None, overlays: Sequence[Path | str] = (), *, fresh: bool = False) -> RuleSet:
    """Load the rule set of a folder (the shipped one without `path`), with overlays laid over it in their order.

    A file whose shape was right before is not checked for it again, save with `fresh`. Raises `RuleError` with every
    fault found.
    """
    if not fresh:
        try:
            with remembering():
                return _load(path, overlays)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            pass  # a wrong shape among the remembered ones, which others have put there: check them all, and say it
    return _load(path, overlays)


def _load(path: Path | str | None, overlays: Sequence[Path | str]) -> RuleSet:
    faults: list[Fault] = []
    own: set[str] = set()
    kinds = _extended(data_folder("rules") if path is None else Path(path), faults, own)
    over: list[Kinds] = []
    missing: list[Fault] = []
    for one in overlays:
        try:
            over.append(_read_folder(Path(one), faults, own))
        except RuleError as error:
            missing += error.faults
    if missing:  # without them nothing can be said of names: only what stands by itself is told
        raise RuleError([*faults, *missing])
    return _build(_laid_over(kinds, over, faults), faults, own)


def parse_rule_set(files: Mapping[str, str], overlays: Sequence[Mapping[str, str]] = ()) -> RuleSet:
    """Load a rule set from texts by relative path, ``{"ruleset.yaml": ..., "gates/x/y.yaml": ...}``, and overlays."""
    faults: list[Fault] = []
    kinds, *over = [_parse_texts(one, faults) for one in (files, *overlays)]
    return _build(_laid_over(kinds, over, faults), faults, {name for one in (files, *overlays) for name in one})


def _parse_texts(files: Mapping[str, str], faults: list[Fault]) -> Kinds:
    documents = []
    for name, text in sorted(files.items()):
        document, found = scan_yaml(text, name)
        documents.append((name, document))
        faults += found
    return _by_kind(documents, faults)


def _laid_over(kinds: Kinds, overlays: Sequence[Kinds], faults: list[Fault]) -> Kinds:
    """Add what overlays hold: their manifests name them, and they extend nothing."""
    for overlay in overlays:
        for manifest in overlay["ruleset"]:
            if "extends" in manifest.data:
                message = "an overlay extends nothing: it amends the rule set that it is laid over; remove `extends`"
                faults.append(Fault("wrong-overlay", message, manifest.where(("extends",))))
        overlay[_OVERLAY] = overlay.pop("ruleset")
        overlay["ruleset"] = []
        kinds = {kind: [*kinds.get(kind, []), *found] for kind, found in overlay.items()}
    return {_OVERLAY: [], **kinds}


def _read_folder(folder: Path, faults: list[Fault], files: set[str]) -> Kinds:
    """Read the files of one folder, without what it extends; their names are added to `files`."""
    try:
        if not (folder / MANIFEST).is_file():
            message = f"not a rule set: expected a folder with `{MANIFEST}`; name one with --rules or --overlay"
            raise RuleError([Fault("no-manifest", message, Where(str(folder)))])
        paths = list(_rule_files(folder))
    except OSError as error:
        message = f"can't read this folder: {error.strerror}; name a rule set with --rules"
        raise RuleError([Fault("unreadable", message, Where(str(error.filename or folder)))]) from None
    documents = []
    folders = {one: _short(one) for one in {path.parent for path in paths}}
    for path in paths:
        document, found = scan_file(path, str(Path(folders[path.parent], path.name)))
        documents.append((path.relative_to(folder).as_posix(), document))
        files.add(document.file)
        faults += found
    return _by_kind(documents, faults)


def _extended(folder: Path, faults: list[Fault], files: set[str], opened: tuple[Path, ...] = ()) -> Kinds:
    """Read a folder and what it extends."""
    kinds = _read_folder(folder, faults, files)
    base = kinds["ruleset"][0].data.get("extends") if kinds["ruleset"] else None
    if base is None:
        return kinds
    where = kinds["ruleset"][0].where(("extends",))
    here = _resolved(folder)
    base_folder = data_folder("rules") if base == "shipped" else _resolved(folder / base)
    if base_folder in opened or base_folder == here:
        raise RuleError([*faults, Fault("cycle", f"`{base}` extends this rule set in turn", where)])
    if not _has_manifest(base_folder):
        message = f"`{base}` is no rule set; expected `shipped`, or the path of a folder with `{MANIFEST}`"
        raise RuleError([*faults, Fault("no-manifest", message, where)])
    inherited = _extended(base_folder, faults, set(), (*opened, here))
    return {k: [*(inherited[k] if k in _INHERITED else []), *own] for k, own in kinds.items()}


def _resolved(path: Path) -> Path:
    """Return a path without links and `..`; one that can't be followed as it is."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a NUL in it
        return path


def _has_manifest(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError:
        return False


def _short(path: Path) -> str:
    """Show a path as a person would type it: relative to here if it is below, else as given."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError, RuntimeError):  # OSError: the current folder is gone; RuntimeError: a loop of links
        return str(path)


def _rule_files(folder: Path) -> Iterable[Path]:
    """Yield the YAML files of this rule set; a folder with a manifest of its own is another."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            # A link to a folder above would be walked for ever.
            above = path.is_symlink() and path.resolve() in path.absolute().parents
            if not above and not (path / MANIFEST).exists():
                yield from _rule_files(path)
        elif path.suffix in (".yaml", ".yml"):
            yield path


def _by_kind(documents: list[tuple[str, Document]], faults: list[Fault]) -> Kinds:
    names = ("ruleset", *_FOLDERS.values(), *_ALONE.values(), _AMENDMENT, _BROKEN)
    kinds: Kinds = {kind: [] for kind in names}
    for name, document in documents:
        top = PurePosixPath(name).parts[0]
        kind = "ruleset" if name == MANIFEST else _ALONE.get(name) or (_FOLDERS.get(top) if "/" in name else None)
        if kind is None:
            expected = ", ".join([MANIFEST, *_ALONE, *(f"{folder}/" for folder in _FOLDERS)])
            message = f"a rule set has no `{name}`; expected one of {expected}"
            faults.append(Fault("unexpected-file", message, document.where()))
            continue
        if document.data is None and any(fault.where.file == document.file for fault in faults):
            kinds[_BROKEN].append(document)
            continue
        if kind == "gate" and isinstance(document.data, dict) and "amends" in document.data:
            kind = _AMENDMENT
        found = shape_faults(document, kind)
        telling = _TELLING.get(kind)
        if telling and any(fault.code == "unknown-key" and path == (telling[0],) for path, fault in found):
            faults.append(Fault("unexpected-file", telling[1], document.where()))
            kinds[_BROKEN].append(document)
            continue
        faults += [fault for _, fault in found]
        if found:
            kinds[_BROKEN].append(document)
            document, paths = _with_stand_ins(document, found)
            document = _without(document, paths) if paths else document
        if document.data is not None:
            kinds[kind].append(document)
    return kinds


def _with_stand_ins(document: Document, found: list[tuple[Path_, Fault]]) -> tuple[Document, list[Path_]]:
    """Put in what is missing and decides nothing of the rest, and return where everything else is that is at fault."""
    data, others = deepcopy(document.data), []
    for path, fault in found:
        at: Any = data
        for step in path[:-1]:
            at = at[step]
        missing = _MISSING.match(fault.message) if fault.code == "missing-key" else None
        if missing and missing[1] in _STAND_INS:
            (at[path[-1]] if path else at)[missing[1]] = _STAND_INS[missing[1]]
        elif not (path and path[-1] in _STAND_INS and isinstance(at[path[-1]], str) and fault.code == "wrong-shape"):
            others.append(path)
    return document.with_data(data), others


def _without(document: Document, paths: list[tuple[str | int, ...]]) -> Document:
    """Leave the entries out that are at fault, so that the others can be checked; no data if that can't be done."""
    if not all(len(path) > 1 and path[0] in _ENTRIES for path in paths):
        return document.with_data(None)
    data = {**document.data}
    for top, entry in {(path[0], path[1]) for path in paths}:
        if isinstance(data[top], list):
            # None keeps the places of the others.
            data[top] = [None if index == entry else one for index, one in enumerate(data[top])]
        else:
            data[top] = {name: one for name, one in data[top].items() if name != entry}
    return document.with_data(data)


def _build(kinds: Kinds, faults: list[Fault], own: Iterable[str]) -> RuleSet:
    broken = kinds.pop(_BROKEN)
    parser = RuleParser(kinds, faults, partial=frozenset(document.file for document in broken))
    rules = parser.build(frozenset(own))
    if faults:
        raise RuleError(_first_causes(faults, kinds, broken, parser.catalogue))
    assert rules is not None
    return rules


_FOLLOWING = frozenset({"unknown-fact", "unknown-condition", "unknown-requirement", "unknown-feature"})
_UNKNOWN = re.compile(r"unknown \w+ `([^`]+)`")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def _first_causes(faults: list[Fault], kinds: Kinds, broken: list[Document], sound: Container[str]) -> list[Fault]:
    """Leave out what is unknown only because the file that declares it, or the entry there, is at fault itself.

    `sound` are the facts whose declaration is not: what is said to be a part of one is unknown in earnest.
    """
    if not kinds["ruleset"]:
        # Without its manifest it is not known what the rule set extends.
        return [fault for fault in faults if fault.code not in _FOLLOWING]
    declared: set[str] = set()
    for document in [*broken, *kinds["facts"]]:
        if not isinstance(document.data, dict):
            declared.update(_WORD.findall(document.text))
            continue
        for key in _DECLARING & document.data.keys():
            content = document.data[key]
            declared.update(content if isinstance(content, dict) else [str(content)])

    def follows(fault: Fault) -> bool:
        found = _UNKNOWN.search(fault.message) if fault.code in _FOLLOWING else None
        parts = found[1].split(".") if found else []
        names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(name in declared and name not in sound for name in names)

    return [fault for fault in faults if not follows(fault)]
