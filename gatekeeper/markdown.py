"""Small pieces of Markdown, as code hosts render it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CODE = re.compile(r"(`[^`]*`)")
_SPECIAL = re.compile(r"([\\*_<>\[\]|])")
_THREAD = re.compile(r"([A-Za-z0-9._-]+/[A-Za-z0-9._-]+)#([0-9]+)")


def prose(text: str) -> str:
    """Return plain text so that nothing in it is markup, but for code in backticks."""
    parts = _CODE.split(text.replace("\n", " "))
    return "".join(part if part.startswith("`") and len(part) > 1 else _SPECIAL.sub(r"\\\1", part) for part in parts)


def cell(text: str) -> str:
    """Return Markdown as it may stand in a table: one line, and no bar that would end the cell."""
    return re.sub(r"(?<!\\)\|", r"\\|", text.replace("\n", " ")) or " "


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table, and an empty one behind it."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows), ""]


def code(text: str) -> str:
    """Return text as code."""
    return f"`{text}`"


def ref(text: str) -> str:
    """Return a link to a public thread (`owner/repo#12`) or an address; any other text as it is."""
    found = _THREAD.fullmatch(text)
    if found:
        return f"[{text}](https://github.com/{found[1]}/issues/{found[2]})"
    return f"<{text}>" if re.match(r"https?://[^\s<>]+$", text) else prose(text)


def refs(texts: Iterable[str]) -> str:
    """Return several of them in a row, each once."""
    return ", ".join(ref(text) for text in dict.fromkeys(texts))
