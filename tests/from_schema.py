"""Hypothesis strategies from the JSON Schemas: files of the right shape and any content, and some of the wrong one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SCHEMAS = Path(__file__).resolve().parent.parent / "schema"
DEPTH = 10  # of `$ref` and nesting; conditions and requirements nest in themselves

FACT_NAME = r"^[a-z][a-z0-9_]*(\.[a-zA-Z0-9_]+)+$"  # as common.schema.json has it

Schema = Mapping[str, Any]

JSON_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-4, 400)
    | st.sampled_from([2**31, 2**63, 2**64 + 1, -(2**70), 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")])
    | st.floats()
    | st.text(max_size=12)
)
JSON = st.recursive(
    JSON_SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@cache
def load(kind: str) -> dict[str, Any]:
    """The schema of one kind of file."""
    schema: dict[str, Any] = json.loads((SCHEMAS / f"{kind}.schema.json").read_text("utf-8"))
    return schema


class Walker:
    """Draws instances of schemas; `words` gives, by the key that a text stands at (or ""), texts worth trying."""

    def __init__(self, draw: st.DrawFn, words: Mapping[str, list[str]], wrong: int = 40) -> None:
        self.draw = draw
        self.words = words
        self.wrong = wrong  # one value in so many is of any shape

    def file(self, kind: str) -> Any:
        """The content of one file."""
        return self.value(load(kind), kind, "", 0)

    def value(self, schema: Any, kind: str, key: str, depth: int) -> Any:
        if schema is True or self.once_in(self.wrong):
            return self.draw(JSON)
        schema, kind = self.resolved(schema, kind)
        schema = self.branch(schema)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.pick(schema["enum"])
        if "oneOf" in schema:
            return self.value(self.pick(schema["oneOf"]), kind, key, depth + 1)
        types = schema.get("type", "object" if "properties" in schema else "string")
        types = [types] if isinstance(types, str) else types
        if depth > DEPTH:  # no deeper: what may be a plain value is one
            types = [one for one in types if one not in ("object", "array")] or types
        return getattr(self, f"a_{self.pick(types)}")(schema, kind, key, depth)

    def once_in(self, count: int) -> bool:
        return self.draw(st.integers(0, count - 1)) == count - 1

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def resolved(self, schema: Schema, kind: str) -> tuple[dict[str, Any], str]:
        """The schema that a `$ref` means, and the file that it stands in."""
        found = dict(schema)
        while "$ref" in found:
            file, _, path = found.pop("$ref").partition("#")
            kind = file.removesuffix(".schema.json") or kind
            target: Any = load(kind)
            for part in filter(None, path.split("/")):
                target = target[part]
            found = {**target, **found}
        return found, kind

    def branch(self, schema: dict[str, Any]) -> dict[str, Any]:
        """One way through `if then else`, where the `if` asks which keys are there."""
        while "if" in schema:
            asked = schema["if"]["required"]
            taken = self.draw(st.booleans())
            branch = schema.get("then" if taken else "else", {})
            schema = {key: value for key, value in schema.items() if key not in ("if", "then", "else")}
            required = [*schema.get("required", ()), *branch.get("required", ()), *(asked if taken else ())]
            allowed = branch.get("propertyNames", {}).get("enum")
            properties = {
                name: each
                for name, each in schema["properties"].items()
                if (allowed is None or name in allowed) and (taken or name not in asked)
            }
            rest = {key: value for key, value in branch.items() if key in ("if", "then", "else")}
            schema = {**schema, **rest, "required": required, "properties": properties}
        return schema

    def a_object(self, schema: Schema, kind: str, key: str, depth: int) -> dict[str, Any]:
        properties, required = schema.get("properties", {}), schema.get("required", ())
        # Operators stand alone or in twos: a test of all of them says nothing.
        share = 3 if len(properties) < 12 and depth < 4 else 10
        chosen = [name for name in properties if name in required or self.once_in(share)]
        asked = schema.get("dependentRequired", {})
        chosen += [
            other for name in chosen for other in asked.get(name, ()) if other not in chosen and other in properties
        ]
        result = {name: self.value(properties[name], kind, name, depth + 1) for name in chosen}
        extra = [*schema.get("patternProperties", {}).items()]
        if isinstance(schema.get("additionalProperties"), Mapping):
            extra.append((schema.get("propertyNames", {}), schema["additionalProperties"]))
        for names, inner in extra:
            pattern = names if isinstance(names, str) else self.resolved(names, kind)[0].get("pattern", "")
            for _ in range(self.draw(st.sampled_from([1, 1, 1, 1, 2] if depth < DEPTH else [1]))):
                name = self.text(pattern, 1, key)
                result[name] = self.value(inner, kind, name, depth + 1)
        missing = schema.get("minProperties", 0) - len(result)
        for name in [name for name in properties if name not in result][: max(missing, 0)]:
            result[name] = self.value(properties[name], kind, name, depth + 1)
        if self.once_in(self.wrong) and result:
            del result[self.pick(result)]
        return result

    def a_array(self, schema: Schema, kind: str, key: str, depth: int) -> list[Any]:
        least = schema.get("minItems", 0)
        count = self.draw(st.integers(least, least + (2 if depth < 4 else 1)))
        return [self.value(schema.get("items", True), kind, key, depth + 1) for _ in range(count)]

    def a_string(self, schema: Schema, kind: str, key: str, depth: int) -> str:
        return self.text(schema.get("pattern", ""), schema.get("minLength", 0), key)

    def text(self, pattern: str, least: int, key: str) -> str:
        """A text that fits: mostly one of the words for this key, else any."""
        words = self.words.get(key) or self.words["fact" if pattern == FACT_NAME else ""]
        fitting = [word for word in words if re.search(pattern, word) and len(word) >= least]
        if fitting and not self.once_in(8):
            return str(self.pick(fitting))
        return self.draw(st.from_regex(pattern, fullmatch=True) if pattern else st.text(min_size=least, max_size=20))

    def a_number(self, schema: Schema, kind: str, key: str, depth: int) -> Any:
        return self.pick([0, 1, 2, 8, -1, 0.5, 2.10, 1e30, 2**64, 128])

    def a_integer(self, schema: Schema, kind: str, key: str, depth: int) -> int:
        return int(self.pick([1, 1, 1, 0, 2, -1, 2**64]))

    def a_boolean(self, schema: Schema, kind: str, key: str, depth: int) -> bool:
        return self.draw(st.booleans())

    def a_null(self, schema: Schema, kind: str, key: str, depth: int) -> None:
        return None


@st.composite
def files(draw: st.DrawFn, kind: str, words: Mapping[str, list[str]]) -> Any:
    """The content of a file of this kind, mostly of the right shape."""
    # Half of them have no wrong shape at all, so that the checks behind the schema are reached.
    return Walker(draw, words, wrong=draw(st.sampled_from([10**6, 60]))).file(kind)
