"""YAML text to plain values that remember where they stood, and the schema check; every fault of a file in one run.

YAML 1.2 (core schema) through PyYAML's C parser. The text is read as events, so that aliases, tags, merge keys and
deep nesting are refused before anything is built from them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import yaml

from gatekeeper.data import data_folder
from gatekeeper.errors import Fault, RuleError, Where

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

Path_: TypeAlias = tuple[str | int, ...]

MAX_BYTES = 8 * 2**20
MAX_DEPTH = 64
# A comment behind one of these cuts the sentence: `reason: Fixed in #25974` reads as "Fixed in".
TEXT_KEYS = frozenset({"reason", "summary", "doc", "degraded", "because"})

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Faults that leave the data as the author meant them.
_HARMLESS = frozenset({"duplicate-key", "anchor", "tag", "comment-in-text"})
_NUMBER_STARTS = frozenset("+-.0123456789")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})


class WrittenInt(int):
    """An integer that remembers how it was written: a version reads the text, not the number."""

    text: str


class WrittenFloat(float):
    """A number that remembers how it was written, so that version 2.10 is not 2.1."""

    text: str


class Document:
    """One parsed file: `data` is plain mappings, lists and scalars; `where` finds any of them again."""

    def __init__(self, file: str, data: Any, marks: dict[Path_, tuple[int, int]], text: str = "") -> None:
        self.file = file
        self.data = data
        self.text = text
        self._marks = marks
        self._lines: list[str] | None = None

    def with_data(self, data: Any) -> Document:
        """Return the same document with other data, whose places are found as before."""
        return Document(self.file, data, self._marks, self.text)

    def where(self, path: Iterable[str | int] = ()) -> Where:
        """Return the place of the value at `path` (of its key, in a mapping), or of its nearest ancestor."""
        path = tuple(path)
        while path not in self._marks and path:
            path = path[:-1]
        if self._lines is None:
            self._lines = self.text.splitlines()
        return Where(self.file, *self._marks.get(path, (0, 0)), self._lines)


def nearest(word: str, words: Iterable[str]) -> str:
    """Return a hint that names the closest of `words` (both of two that are equally close), or nothing."""
    written = {one.lower(): one for one in words}  # `SM90` is as good as `sm90`
    close = difflib.get_close_matches(word.lower(), written, n=2, cutoff=0.6)
    closeness = [difflib.SequenceMatcher(None, one, word.lower()).ratio() for one in close]
    if not close:
        return ""
    both = len(close) > 1 and closeness[0] == closeness[1]
    found = [written[one] for one in close]
    return f", did you mean `{found[0]}`{f' or `{found[1]}`' if both else ''}?"


def read_yaml(path: Path, shown_as: str | None = None) -> Document:
    """Parse one file; raises `RuleError` with every fault found."""
    return _sound(*scan_file(path, shown_as))


def parse_yaml(text: str, file: str) -> Document:
    """Parse YAML text; `file` is the name that faults show. Raises `RuleError` with every fault found."""
    return _sound(*scan_yaml(text, file))


def _sound(document: Document, faults: list[Fault]) -> Document:
    if faults:
        raise RuleError(faults)
    return document


def scan_file(path: Path, shown_as: str | None = None) -> tuple[Document, list[Fault]]:
    """Parse one file as far as it goes, and say what is wrong with it; see `scan_yaml`."""
    file = shown_as or str(path)

    def unread(code: str, message: str) -> tuple[Document, list[Fault]]:
        return Document(file, None, {}), [Fault(code, message, Where(file))]

    try:
        if not path.is_file():
            there = "found a folder" if path.is_dir() else "found something else" if path.exists() else "there is none"
            return unread("not-a-file", f"expected a YAML file, {there}")
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        return unread("unreadable", f"can't read this file: {error.strerror}; check its permissions")
    if len(raw) > MAX_BYTES:
        return unread("too-large", f"larger than {MAX_BYTES >> 20} MiB; split it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        above, _, before = raw[: error.start].rpartition(b"\n")
        line = above.count(b"\n") + 1 + (b"\n" in raw[: error.start])
        text = raw.decode(errors="backslashreplace")
        where = Where(file, line, len(before.decode()) + 1, text.splitlines())
        return Document(file, None, {}), [Fault("not-utf8", "expected UTF-8 text; save the file as UTF-8", where)]
    return scan_yaml(text, file)


def scan_yaml(text: str, file: str) -> tuple[Document, list[Fault]]:
    """Parse YAML text as far as it goes, and say what is wrong with it.

    With a fault such as a duplicate key the data is there all the same, so that the rest of it can be checked; with
    one of syntax it is None.
    """
    parser = _Parser(text, file)
    data = parser.parse()
    whole = all(fault.code in _HARMLESS for fault in parser.faults)
    lines = text.splitlines() if parser.faults else []
    faults = [replace(fault, where=replace(fault.where, lines=lines)) for fault in parser.faults]
    return Document(file, data if whole else None, parser.marks, text), faults


def parse_scalar(text: str, source: str = "--set") -> Any:
    """Read one value by the same rules as a file (`8`, `true`, `[1, 2]`, `2.10`)."""
    return parse_yaml(text, source).data


class _Parser:
    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.faults: list[Fault] = []
        self.marks: dict[Path_, tuple[int, int]] = {}
        self._text = text
        self._events: Iterator[Any] = iter(())

    def parse(self) -> Any:
        try:
            # The C parser takes UTF-8, which has no lone surrogates (a command line or JSON may hold some).
            self._text.encode()
        except UnicodeEncodeError as error:
            line = self._text.count("\n", 0, error.start) + 1
            self.faults.append(
                Fault("not-utf8", "expected Unicode text; a surrogate is no character", Where(self.file, line))
            )
            return None
        try:
            self._events = iter(yaml.parse(self._text, Loader=yaml.CLoader))
            data: Any = None
            documents = 0
            for event in self._events:
                if isinstance(event, yaml.DocumentStartEvent):
                    documents += 1
                    if documents > 1:
                        self._fault(event, "many-documents", "expected one YAML document; write one file each")
                        return None
                elif isinstance(event, yaml.NodeEvent):
                    data = self._value(event, (), flow=False)
            return data
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = error.problem or "can't be parsed"
            if mark and self._text[mark.index : mark.index + 1] == "\t":
                problem += " (YAML is indented with spaces)"
            if problem.startswith("mapping values"):
                problem += "; quote a text that holds `: `, and indent the keys of one mapping alike"
            where = Where(self.file, mark.line + 1, mark.column + 1) if mark else Where(self.file)
            self.faults.append(Fault("syntax", f"not YAML: {problem}", where))
        except yaml.reader.ReaderError as error:  # a character that YAML forbids, such as NUL
            before = self._text.encode()[: error.position].decode(errors="ignore")
            where = Where(self.file, before.count("\n") + 1, len(before) - before.rfind("\n"))
            message = f"not YAML: the character #x{error.character:04x} is not allowed in it; remove it"
            self.faults.append(Fault("syntax", message, where))
        except _Unreadable:
            pass
        return None

    def _fault(self, event: Any, code: str, message: str) -> None:
        mark = event.start_mark
        self.faults.append(Fault(code, message, Where(self.file, mark.line + 1, mark.column + 1)))

    def _mark(self, path: Path_, event: Any) -> None:
        self.marks.setdefault(path, (event.start_mark.line + 1, event.start_mark.column + 1))

    def _value(self, event: Any, path: Path_, *, flow: bool | None) -> Any:
        self._mark(path, event)
        if isinstance(event, yaml.AliasEvent):
            self._fault(event, "alias", f"aliases are not allowed; write the value of `*{event.anchor}` out")
            return None
        if event.anchor is not None:
            self._fault(event, "anchor", f"anchors are not allowed; remove `&{event.anchor}`")
        if event.tag is not None:
            self._fault(event, "tag", f"tags are not allowed; remove `{event.tag}`")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            self._fault(event, "too-deep", f"nested deeper than {MAX_DEPTH} levels")
            raise _Unreadable
        if path and path[-1] in TEXT_KEYS and event.flow_style:
            sign = "{" if isinstance(event, yaml.MappingStartEvent) else "["
            self._fault(event, "cut-text", f"a text that starts with `{sign}` is quoted; quote this `{path[-1]}`")
            raise _Unreadable
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(inner := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(inner, (*path, len(items)), flow=event.flow_style))
            return items
        return self._mapping(path, flow=event.flow_style)

    def _mapping(self, path: Path_, *, flow: bool | None) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                self._fault(event, "key", "expected a word as key")
                self._value(event, (*path, "?"), flow=flow)
                self._value(next(self._events), (*path, "?"), flow=flow)
                continue
            key = event.value
            if key == "<<" and not event.style:
                self._fault(event, "merge-key", "merge keys are not allowed; write the entries out")
            if key in result:
                first = self.marks[(*path, key)][0]
                self._fault(event, "duplicate-key", f"`{key}` stands twice in this mapping, first in line {first}")
            self._mark((*path, key), event)
            inner = next(self._events)
            if flow and isinstance(inner, yaml.ScalarEvent) and inner.value == "" and not inner.style:
                cure = "if it is the rest of a text that a comma cut, quote the whole text"
                if ":" in key and " " not in key:
                    cure = "write a space behind the colon"
                message = f"`{_cut(key)}` has no value; {cure}"
                self._fault(event, "cut-text", message)
            result[key] = self._value(inner, (*path, key), flow=flow)
        return result

    def _scalar(self, event: Any, path: Path_) -> Any:
        if event.style:
            return event.value
        if path and path[-1] in TEXT_KEYS:
            rest = self._text[event.end_mark.index :].lstrip(" \t")
            if rest.startswith("#"):
                self._fault(event, "comment-in-text", f"a comment cuts this `{path[-1]}`; quote it")
        return resolve_plain(event.value)


class _Unreadable(Exception):
    """The rest of the file can't be understood; the fault is there already."""


def resolve_plain(text: str) -> Any:
    """Resolve an unquoted scalar by the YAML 1.2 core schema; only `true` and `false` are booleans."""
    if text in _NULL:
        return None
    if text in ("true", "false"):
        return text == "true"
    if text[0] not in _NUMBER_STARTS:
        return text  # as most are
    if _INTEGER.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        # Longer than any integer of a config, and below the limit of Python's own conversions.
        if len(text) > 1000:
            return text
        integer = WrittenInt(int(text, base))
        integer.text = text
        return integer
    if _FLOAT.fullmatch(text):
        # Python writes infinity and not-a-number without YAML's dot.
        number = WrittenFloat(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        number.text = text
        return number
    return text


@cache
def load_schema(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of one kind of file."""
    schema: dict[str, Any] = json.loads((data_folder("schema") / f"{kind}.schema.json").read_text("utf-8"))
    return schema


@cache
def _validator(kind: str) -> Draft202012Validator:
    # jsonschema costs about 60 ms to import; only who reads files pays for it.
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT202012

    def retrieve(uri: str) -> Resource[Any]:
        # Python's `$` also matches before a last line break, that of JSON Schema does not.
        text = json.dumps(load_schema(uri.removesuffix(".schema.json"))).replace('$"', '\\\\Z"')
        return Resource.from_contents(json.loads(text), DRAFT202012)

    registry: Registry[Any] = Registry(retrieve=retrieve)  # type: ignore[call-arg]  # attrs alias of `_retrieve`
    return Draft202012Validator({"$ref": f"{kind}.schema.json"}, registry=registry)


def check_schema(document: Document, kind: str) -> list[Fault]:
    """Return what of `document` does not fit ``schema/<kind>.schema.json``."""
    return list(dict.fromkeys(fault for _, fault in schema_faults(document, kind)))


def schema_faults(document: Document, kind: str) -> Iterator[tuple[Path_, Fault]]:
    """Yield what does not fit the schema, each with the path of the value (or key) at fault."""
    for error in _leaves(_validator(kind).iter_errors(document.data)):
        for path, code, message in _explained(error):
            yield path, Fault(code, message, document.where(path))


def check_data(data: Any, kind: str, name: str) -> list[Fault]:
    """Return what of plain data (a line of JSON) does not fit its schema."""
    return check_schema(Document(name, data, {}), kind)


def _leaves(errors: Iterable[ValidationError]) -> Iterator[ValidationError]:
    """Yield the errors that a person can act on: of alternatives, those of the one that came nearest."""
    from jsonschema.exceptions import best_match

    for error in errors:
        if error.context:
            best = best_match([error])
            yield best if best is not None else error
        else:
            yield error


_TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "a text",
    "number": "a number",
    "integer": "an integer",
    "boolean": "true or false",
    "null": "null",
}
# What a name may be made of; a schema's description says what it is for.
_SPELLING = {
    "^[a-z][a-z0-9_]*$": "a name of small letters, digits and underscores",
    "^[a-z0-9][a-z0-9_-]*$": "a name of small letters, digits and hyphens",
    "^[a-z0-9][a-z0-9-]*$": "a name of small letters, digits and hyphens",
    "^because .+": "a sentence that starts with `because`",
}
_SIGNS = {
    **dict.fromkeys(("==", "=", "equals", "equal", "is"), "eq"),
    **dict.fromkeys(("!=", "not_equals", "is_not"), "ne"),
    **dict.fromkeys((">=", "gte", "min", "at_least"), "ge"),
    **dict.fromkeys(("<=", "lte", "max", "at_most"), "le"),
    ">": "gt",
    "<": "lt",
    **dict.fromkeys(("and", "&&"), "all"),
    **dict.fromkeys(("or", "||"), "any"),
    "!": "not",
}
"""What other languages say for operators and connectives."""


def _meant(key: str, properties: Mapping[str, Any], patterns: Iterable[str]) -> str:
    if _SIGNS.get(key) in properties:
        return f", did you mean `{_SIGNS[key]}`?"
    is_name = re.fullmatch("[a-z][a-z0-9_]*", key) and key not in _SIGNS
    facts = is_name and any("\\." in pattern for pattern in patterns)
    or_fact = f", or a fact with its group before a dot, such as `model.{_cut(key)}`" if facts else ""
    return nearest(key, properties) or f"; expected {_listed(properties)}{or_fact}"


_EMPTY = frozenset({"minItems", "minProperties", "minLength"})


def _explained(error: ValidationError) -> Iterator[tuple[Path_, str, str]]:
    """Yield path, code and message of what one error of the schema means to the author, for each key that is wrong."""
    path = tuple(error.absolute_path)
    given: Any = error.instance
    kind, value, schema = str(error.validator), cast(Any, error.validator_value), cast(Any, error.schema)
    name = f"`{path[-1]}`" if path and isinstance(path[-1], str) else "this"
    spelling = _SPELLING.get(value.replace("\\Z", "$")) if kind == "pattern" else None
    expected = spelling or (schema.get("description", "") if isinstance(schema, dict) else "")
    if kind == "additionalProperties":
        properties = schema.get("properties", {})
        patterns = schema.get("patternProperties", {})
        for key in given:
            if key not in properties and not any(re.search(p, key) for p in patterns):
                hint = _meant(key, properties, patterns)
                yield (*path, key), "unknown-key", f"unknown key `{_cut(key)}`{hint}"
    elif kind == "required":
        for key in value:
            if key not in given:
                yield path, "missing-key", f"missing key `{key}`; add it"
    elif kind == "dependentRequired":
        for key in value.keys() & given.keys():
            meant = schema["properties"][key].get("description", "")
            for other in value[key]:
                if other not in given:
                    message = f"`{key}` goes with `{other}`, which is not here; leave it out (it says: {meant})"
                    yield (*path, key), "wrong-shape", message
    elif "propertyNames" in error.absolute_schema_path:
        hint = f"; expected {expected or value}"
        yield (*path, given), "wrong-value", f"`{_cut(given)}` can't stand here{hint}"
    elif kind == "type":
        wanted = _or([_TYPES[word] for word in ([value] if isinstance(value, str) else value)])
        message = f"{name} must be {wanted}, not {_shown(given)}"
        if isinstance(given, str) and given in {"on", "off", "yes", "no", "True", "False"} and "boolean" in value:
            message += "; only `true` and `false` are booleans"
        elif given is None and "." in name:
            message += "; of a fact that is not there say `{absent: true}`"
        elif given is None and path:
            message += "; write it on this line, or indented below it"
        elif given is None:
            message += "; the file is empty"
        elif value == "array":
            message += f"; write `[{given}]`" if isinstance(given, str) else "; start each item with `- `"
        elif value == "object" and name in ("`that`", "`when`", "`applies_to`"):
            message += "; write facts and their tests, such as `{model.n_group: {ge: 4}}`"
        yield path, "wrong-type", message
    elif kind in ("enum", "const"):
        options = value if kind == "enum" else [value]
        hint = nearest(str(given), map(str, options))
        yield path, "wrong-value", f"{name} must be {_listed(options)}, not {_shown(given)}{hint}"
    elif kind == "pattern":
        yield path, "wrong-value", f"{name} is {_shown(given)}; expected {expected or value}"
    elif kind == "minProperties" and given:
        others = [key for key in schema.get("properties", {}) if key not in given]
        yield path, "wrong-shape", f"{name} has only {_listed(given)}; add {_listed(others)}"
    elif kind == "maxProperties":
        message = f"{name} has {_listed(given)}; no more than {value} can stand together, write several"
        yield path, "wrong-shape", message
    elif kind in _EMPTY:
        message = (
            f"{name} is empty; fill it" if not given else f"{name} is {_shown(given)}; write {value} characters or more"
        )
        yield path, "wrong-shape", message
    else:
        yield path, "wrong-shape", f"{name}: {error.message}"


def _or(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _listed(options: Iterable[Any]) -> str:
    return _or([f"`{json.dumps(o) if not isinstance(o, str) else o}`" for o in options])


def _shown(value: Any) -> str:
    return f"`{_cut(json.dumps(value, default=str))}`"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
