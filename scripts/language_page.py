"""Keep the generated parts of docs/language.md: `python scripts/language_page.py` rewrites them in place.

They stand between `<!-- generated: WHAT -->` and `<!-- end -->`, and come from the schemas, the operators and the
page's own examples, as does what commands print. The examples are fenced blocks whose first line says what they are;
tests/test_language_docs.py runs them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from gatekeeper.analysis.prose import listed
from gatekeeper.diagnostics import diagnostics
from gatekeeper.markdown import code, table
from gatekeeper.operators import NEGATED, OPERATORS, SCALARS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "language.md"

FENCE = re.compile(r"^```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(
    r"(^<!-- generated: (?P<what>[^\n]+) -->\n)(?P<old>.*?)(^<!-- end -->$)", re.MULTILINE | re.DOTALL
)
HEADING = re.compile(r"^(#{2,3}) (.+)$", re.MULTILINE)

KEYS: Mapping[str, str] = {
    "ruleset": "ruleset#",
    "feature": "feature#",
    "output": "feature#/properties/outputs/additionalProperties",
    "gate": "gate#",
    "requirement": "common#/$defs/requirement",
    "option": "common#/$defs/option",
    "facts": "facts#/properties/facts/additionalProperties",
    "family": "family#",
    "format": "format#",
    "amendment": "amendment#",
    "row": "table#/properties/rows/items",
    "expect": "table#/properties/rows/items/properties/expect",
}
"""Where the keys of each table are declared."""

LINKS: Mapping[str, str] = {
    "condition": "a [condition](#conditions)",
    "requirement": "a [requirement](#requirements)",
    "option": "an [option](#options)",
    "protects": "`correctness`, `support` or `speed`",
    "fact_name": "a fact",
    "facts": "facts and their values",
    "layer_list": "of each layer, its facts",
    "groups": "groups of facts",
    "allow": "[waivers](#waivers)",
    "refs": "threads and addresses",
    "because": "a sentence",
    "output_value": "a value, or `{fact: NAME}`",
    "option_outputs": "output names to values",
}
"""What a value is that many keys share, where its name says more than its type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced example: ```` ```yaml example=walk ````."""

    language: str
    words: tuple[str, ...]
    """What it is: `table values conditions faults warnings lints`; a file where there is none."""
    attributes: Mapping[str, str]
    text: str
    line: int

    @property
    def file(self) -> str:
        """The file that it stands in: `# features/x.yaml` on its first line, or `file=` where there are no comments."""
        first = re.match(r"# (\S+\.yaml)\n", self.text)
        return first[1] if first else self.attributes.get("file", "")

    @property
    def example(self) -> str:
        return self.attributes.get("example", "")

    @property
    def data(self) -> Any:
        return yaml.safe_load(self.text)


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page in their order."""
    found = []
    for match in FENCE.finditer(page):
        words = match["info"].split()
        found.append(
            Block(
                language=match["language"],
                words=tuple(word for word in words if "=" not in word),
                attributes=dict(word.split("=", 1) for word in words if "=" in word),
                text=match["text"],
                line=page[: match.start()].count("\n") + 1,
            )
        )
    return found


def refreshed(page: str) -> str:
    """Return the page with its generated parts made anew."""

    def remake(match: re.Match[str]) -> str:
        return match[1] + "\n".join(["", *_generate(match["what"], page), "", ""]) + match[4]

    return GENERATED.sub(remake, page)


def _generate(what: str, page: str) -> list[str]:
    if what == "contents":
        return _contents(page)
    if what == "operators":
        return _operators(page)
    kind, _, name = what.partition(" ")
    if kind == "codes":
        codes = [(code(one.code), one.title) for one in diagnostics().values() if one.severity == name]
        return table(("code", "says that there is"), codes)[:-1]
    return table(("key", "value", "what it is"), _key_rows(name))[:-1]


def slug(heading: str) -> str:
    """Return the anchor that code hosts give a heading."""
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower())
    return kept.replace(" ", "-")


def _contents(page: str) -> list[str]:
    without_code = FENCE.sub("", page)
    return [
        f"{'  ' * (len(level) - 2)}- [{title.replace('`', '')}](#{slug(title)})"
        for level, title in HEADING.findall(without_code)
    ]


def _operators(page: str) -> list[str]:
    words = resolve("common#/$defs/test")["properties"]
    examples = [row["that"] for block in blocks(page) if block.words == ("conditions",) for row in block.data]
    rows = []
    for word, operator in OPERATORS.items():
        absent = "holds" if word in NEGATED else "does not hold"
        types = _types(operator.left)
        rows.append((code(word), types, operator.operand, words[word]["description"], absent, _example(word, examples)))
    rows.append(
        ("`absent`", "any", "boolean", words["absent"]["description"], "as it says", _example("absent", examples))
    )
    head = ("word", "facts of type", "right side", "holds where it", "absent fact", "example")
    return table(head, rows)[:-1]


def _types(types: frozenset[str]) -> str:
    if types >= SCALARS:
        return "all but list and record" if types == SCALARS else "all but list"
    return ", ".join(sorted(types))


def _example(word: str, conditions: list[Any]) -> str:
    for condition in conditions:
        for fact, test in condition.items():
            if isinstance(test, dict) and word in test and "." in fact:
                return code(f"{fact}: {_flow(test)}")
    return ""


def _flow(value: Any) -> str:
    """Return a value as a flow mapping has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z][\w. -]*", value) else json.dumps(value)
    return json.dumps(value)


def _key_rows(kind: str) -> Iterator[tuple[str, str, str]]:
    owner = resolve(KEYS[kind])
    required = owner.get("required", ())
    for key, raw in owner["properties"].items():
        yield _key_row(key, raw, needed=key in required)
        if kind == "amendment" and raw.get("items"):
            for inner, one in raw["items"]["properties"].items():
                yield _key_row(f"{key}: {inner}", one, needed=False)


def _key_row(key: str, raw: Mapping[str, Any], *, needed: bool) -> tuple[str, str, str]:
    about = raw.get("description") or _target(raw).get("description", "")
    return f"**`{key}`**" if needed else code(key), _value(raw), about


def _value(raw: Mapping[str, Any]) -> str:
    """Say what may stand behind a key."""
    name = raw.get("$ref", "").rpartition("/")[2]
    if name in LINKS:
        return LINKS[name]
    found = _target(raw)
    if "enum" in found:
        return listed([code(str(word)) for word in found["enum"]], "or")
    kinds = found.get("type", "any")
    if kinds == "array":
        inner = found.get("items", {})
        return f"a list of {_value(inner)}s" if inner.get("type") in _SIMPLE else f"a list: {_value(inner)}"
    words = [_SIMPLE.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    return listed(words, "or")


_SIMPLE = {
    "object": "mapping",
    "array": "list",
    "string": "text",
    "integer": "integer",
    "number": "number",
    "null": "null",
}


@cache
def _schema(name: str) -> Any:
    return json.loads((ROOT / "schema" / f"{name}.schema.json").read_text(encoding="utf-8"))


def resolve(place: str) -> Any:
    """Return what `common#/$defs/option` names."""
    name, _, path = place.partition("#")
    found = _schema(name.removesuffix(".schema.json"))
    for part in filter(None, path.split("/")):
        found = found[part]
    return found


def _target(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in raw:
        return raw
    place = raw["$ref"]
    target: Mapping[str, Any] = resolve(place if not place.startswith("#") else f"common{place}")
    return target


def with_output(page: str) -> str:
    """Return the page with what its commands print."""
    with TemporaryDirectory() as folder:
        for block in blocks(page):
            if block.file:
                path = Path(folder, block.example, block.file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")

        def run(match: re.Match[str]) -> str:
            if match["language"] != "console":
                return match[0]
            command = match["text"].splitlines()[0]
            example = match["info"].removeprefix(" example=")
            done = subprocess.run(
                [sys.executable, "-m", *shlex.split(command.removeprefix("$ "))],
                cwd=Path(folder, example),
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=False,
                capture_output=True,
                text=True,
            )
            return f"```console{match['info']}\n{command}\n{done.stdout}```"

        return FENCE.sub(run, page)


def main() -> None:
    """Rewrite the page."""
    old = PAGE.read_text(encoding="utf-8")
    new = refreshed(refreshed(with_output(old)))
    PAGE.write_text(new, encoding="utf-8", newline="\n")
    print(f"{PAGE.relative_to(ROOT)}: {'rewritten' if new != old else 'up to date'}")


if __name__ == "__main__":
    main()
