"""Faults for a person: file, line and column, what is wrong, the line itself with a caret, and where to read more."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

import click

from gatekeeper.analysis.prose import count
from gatekeeper.errors import Fault, Severity

COLOURS: dict[Severity, str] = {"error": "red", "warning": "yellow"}
WIDTH = 120
"""Cells of a line that are shown; a longer one is cut around the caret."""
_TAB = 4
_LEAD = 24
"""Cells before the caret that stay where a line is cut."""
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\'[^\']*\'|[^\s,:{}\[\]"\']+(?::[^\s,:{}\[\]"\']+)*|.')


def fault_lines(fault: Fault) -> Iterator[str]:
    """Yield one fault in the manner of compilers; the last line says where its code is explained."""
    where = fault.where
    label = click.style(f"{fault.severity}[{fault.code}]", fg=COLOURS[fault.severity], bold=True)
    yield f"{click.style(printable(str(where)), bold=True)}: {label}: {printable(fault.message)}"
    if where.source:
        shown, caret, count = excerpt(where.source, where.column)
        number = str(where.line)
        bar = click.style(f"{' ' * len(number)} |", dim=True)
        yield f"  {click.style(f'{number} |', dim=True)} {shown}"
        if where.column:
            mark = click.style("^" * count, fg=COLOURS[fault.severity], bold=True)
            yield f"  {bar} {' ' * caret}{mark}"
    yield click.style(f"  help: gatekeeper help {fault.code}", dim=True)


def show(faults: Iterable[Fault], *, err: bool = False) -> None:
    """Print faults, with a blank line between two; each code is referred to `gatekeeper help` once."""
    told: set[str] = set()
    for position, fault in enumerate(faults):
        lines = list(fault_lines(fault))
        if fault.code in told:
            lines.pop()
        told.add(fault.code)
        click.echo("\n".join([*([""] if position else []), *lines]), err=err)


def counted(faults: Iterable[Fault]) -> str:
    """Say how many there are: ``2 errors, 1 warning``."""
    counts = Counter(fault.severity for fault in faults)
    return ", ".join(count(counts[word], word) for word in COLOURS if counts[word])


def excerpt(source: str, column: int) -> tuple[str, int, int]:
    """Return a line as a terminal shows it, the cells before the caret, and how many cells the word there takes.

    Tabs become spaces, what can't be printed a visible escape, and wide characters count for two cells.
    """
    start = max(column - 1, 0)
    found = _WORD.match(source, start)
    end = found.end() if found else start + 1
    before = [_cell(char) for char in source[max(0, start - WIDTH) : start]]
    first = 0
    if sum(map(_width, before)) > WIDTH - 2 * _LEAD or start > WIDTH:
        while first < len(before) and sum(map(_width, before[first:])) > _LEAD:
            first += 1
    lead = ("…" if first or start > WIDTH else "") + "".join(before[first:])
    room, rest = WIDTH - _width(lead), ""
    for char in source[start:]:
        cell = _cell(char)
        if _width(rest + cell) > room:
            rest += "…"
            break
        rest += cell
    word = "".join(map(_cell, source[start : min(end, start + WIDTH)]))
    return (lead + rest).rstrip(), _width(lead), max(1, min(_width(word), room))


def printable(text: str) -> str:
    """Return a text in which nothing can steer a terminal."""
    return "".join(_cell(char) for char in text)


def _cell(char: str) -> str:
    if char == "\t":
        return " " * _TAB
    if char.isprintable():
        return char
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def _width(text: str) -> int:
    """Return how many cells a terminal gives a text."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
