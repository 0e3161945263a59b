"""YAML text to plain values that remember where they stood, and the schema check; every fault of a file in one run.

YAML 1.2 (core schema) through PyYAML's C parser. The text is read as events, so that aliases, tags, merge keys and
deep nesting are refused before anything is built from them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
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
_NULL = frozenset({"", "~", "null", "Null", "NULL"})


class WrittenInt(int):
    """An integer that remembers how it was written: a version reads the text, not the number."""

    text: str


class WrittenFloat(float):
    """A number that remembers how it was written, so that version 2.10 is not 2.1."""

    text: str


class Document:
    """One parsed file: `data` is plain mappings, lists and scalars; `where` finds any of them again."""

    def __init__(self, file: str, data: Any, marks: dict[Path_, tuple[int, int]]) -> None:
        self.file = file
        self.data = data
        self._marks = marks

    def where(self, path: Iterable[str | int] = ()) -> Where:
        """Return the place of the value at `path` (of its key, in a mapping), or of its nearest ancestor."""
        path = tuple(path)
        while path not in self._marks and path:
            path = path[:-1]
        return Where(self.file, *self._marks.get(path, (0, 0)))


def nearest(word: str, words: Iterable[str]) -> str:
    """Return a hint that names the closest of `words`, or nothing."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f", did you mean `{found[0]}`?" if found else ""


def read_yaml(path: Path, shown_as: str | None = None) -> Document:
    """Parse one file; raises `RuleError` with every fault found."""
    file = shown_as or str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise RuleError([Fault("not-a-file", "expected a YAML file, found a folder", Where(file))]) from None
    except OSError as error:
        raise RuleError([Fault("unreadable", f"can't read this file: {error.strerror}", Where(file))]) from None
    if len(raw) > MAX_BYTES:
        raise RuleError([Fault("too-large", f"larger than {MAX_BYTES >> 20} MiB; split it", Where(file))])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RuleError([Fault("not-utf8", "expected UTF-8 text; save the file as UTF-8", Where(file, line))]) from None
    return parse_yaml(text, file)


def parse_yaml(text: str, file: str) -> Document:
    """Parse YAML text; `file` is the name that faults show. Raises `RuleError` with every fault found."""
    parser = _Parser(text, file)
    data = parser.parse()
    if parser.faults:
        raise RuleError(parser.faults)
    return Document(file, data, parser.marks)


def parse_scalar(text: str, source: str = "--set") -> Any:
    """Read one value by the same rules as a file (`8`, `true`, `[1, 2]`, `2.10`)."""
    return parse_yaml(text, source).data


class _Parser:
    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.lines = text.split("\n")
        self.faults: list[Fault] = []
        self.marks: dict[Path_, tuple[int, int]] = {}
        self._text = text
        self._events: Iterator[Any] = iter(())

    def parse(self) -> Any:
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
            if "'\\t'" in problem:
                problem += " (YAML is indented with spaces)"
            where = Where(self.file, mark.line + 1, mark.column + 1) if mark else Where(self.file)
            self.faults.append(Fault("syntax", f"not YAML: {problem}", where))
        except yaml.YAMLError as error:  # a character that YAML forbids, such as NUL
            self.faults.append(Fault("syntax", f"not YAML: {' '.join(str(error).split())}", Where(self.file)))
        except _TooDeep:
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
            raise _TooDeep
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
                self._fault(event, "cut-text", f"a comma cut the text before `{key}`; quote the whole text")
            result[key] = self._value(inner, (*path, key), flow=flow)
        return result

    def _scalar(self, event: Any, path: Path_) -> Any:
        if event.style:
            return event.value
        if path and path[-1] in TEXT_KEYS:
            rest = self.lines[event.end_mark.line][event.end_mark.column :]
            if rest.lstrip().startswith("#"):
                self._fault(event, "comment-in-text", f"a comment cuts this `{path[-1]}`; quote it")
        return resolve_plain(event.value)


class _TooDeep(Exception):
    pass


def resolve_plain(text: str) -> Any:
    """Resolve an unquoted scalar by the YAML 1.2 core schema; only `true` and `false` are booleans."""
    if text in _NULL:
        return None
    if text in ("true", "false"):
        return text == "true"
    if _INTEGER.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        # Longer than any integer of a config; also the limit of Python's own conversion.
        if len(text) > 4000:
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
        return Resource.from_contents(load_schema(uri.removesuffix(".schema.json")), DRAFT202012)

    registry: Registry[Any] = Registry(retrieve=retrieve)  # type: ignore[call-arg]  # attrs alias of `_retrieve`
    return Draft202012Validator({"$ref": f"{kind}.schema.json"}, registry=registry)


def check_schema(document: Document, kind: str) -> list[Fault]:
    """Return what of `document` does not fit ``schema/<kind>.schema.json``."""
    return [_schema_fault(document, error) for error in _leaves(_validator(kind).iter_errors(document.data))]


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


def _schema_fault(document: Document, error: ValidationError) -> Fault:
    path = tuple(error.absolute_path)
    where = document.where(path)
    given: Any = error.instance
    kind, value, schema = str(error.validator), cast(Any, error.validator_value), cast(Any, error.schema)
    if kind == "additionalProperties":
        properties = schema.get("properties", {})
        patterns = schema.get("patternProperties", {})
        extra = [k for k in given if k not in properties and not any(re.search(p, k) for p in patterns)]
        key = extra[0] if extra else "?"
        hint = nearest(key, properties) or f"; expected {_listed(properties)}"
        return Fault("unknown-key", f"unknown key `{key}`{hint}", document.where((*path, key)))
    if kind == "required":
        missing = [k for k in value if k not in given]
        return Fault("missing-key", f"missing key `{missing[0]}`", where)
    name = f"`{path[-1]}`" if path and isinstance(path[-1], str) else "this"
    expected = schema.get("description", "") if isinstance(schema, dict) else ""
    if kind == "type":
        wanted = value if isinstance(value, str) else " or ".join(value)
        message = f"{name} must be {wanted}, not {_shown(given)}"
        if isinstance(given, str) and given in {"on", "off", "yes", "no", "True", "False"} and "boolean" in wanted:
            message += "; only `true` and `false` are booleans"
        return Fault("wrong-type", message, where)
    if kind in ("enum", "const"):
        options = value if kind == "enum" else [value]
        hint = nearest(str(given), map(str, options))
        return Fault("wrong-value", f"{name} must be {_listed(options)}, not {_shown(given)}{hint}", where)
    if kind == "pattern":
        return Fault("wrong-value", f"{name} is {_shown(given)}; expected {expected or value}", where)
    if kind == "propertyNames" or (error.parent is not None and error.parent.validator == "propertyNames"):
        return Fault("wrong-value", f"{_shown(given)} can't be a name here; expected {expected}", where)
    return Fault("wrong-shape", f"{name}: {error.message}", where)


def _listed(options: Iterable[Any]) -> str:
    words = [f"`{json.dumps(o) if not isinstance(o, str) else o}`" for o in options]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`"
