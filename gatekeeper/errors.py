"""What can go wrong, as values: a fault is one thing wrong with one place; errors carry faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["error", "warning"]


def one_line(text: str) -> str:
    """Return a text with visible escapes in the place of line breaks and of all else that can't be printed."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a file; lines and columns count from 1, 0 means the whole file."""

    file: str
    line: int = 0
    column: int = 0
    lines: Sequence[str] = field(default=(), compare=False, repr=False)
    """The lines of the file, where it was read as text; for showing this one."""

    @property
    def source(self) -> str:
        """The line itself, or nothing."""
        return self.lines[self.line - 1] if 0 < self.line <= len(self.lines) else ""

    def __str__(self) -> str:
        if not self.line:
            return self.file
        return f"{self.file}:{self.line}" + (f":{self.column}" if self.column else "")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong: a stable code, a one-line message that ends with what to do, and the place."""

    code: str
    message: str
    where: Where
    severity: Severity = "error"
    """`warning`: a lint, which stops nothing unless `check --strict` asks for it."""

    def __post_init__(self) -> None:
        # A message is one line, whatever an author wrote between the backticks.
        object.__setattr__(self, "message", one_line(self.message))

    def __str__(self) -> str:
        return f"{self.where}: {self.code}: {self.message}"


class GatekeeperError(Exception):
    """Base of every error that this project raises on purpose; the command line prints it without a traceback."""


class RuleError(GatekeeperError):
    """A rule set, table or map that can't be used; `faults` has everything found in one run."""

    def __init__(self, faults: list[Fault]) -> None:
        places = {fault: (fault.where.file, fault.where.line, fault.where.column) for fault in faults}
        self.faults = tuple(sorted(places, key=lambda fault: (*places[fault], fault.code, fault.message)))
        super().__init__("\n".join(map(str, self.faults)))


class FactError(GatekeeperError):
    """A fact that can't be believed: unknown name, value of the wrong type, or sources that contradict each other.

    Its message is one line, whatever the value was.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class CheckpointError(GatekeeperError):
    """A checkpoint folder that can't be read: missing, torn, hostile or contradictory."""


class RefusedError(GatekeeperError):
    """A decision that is an error, or a requested feature that is still pending."""
