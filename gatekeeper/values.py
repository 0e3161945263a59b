"""The values that facts take, and the two ways in which there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import total_ordering
from typing import Any, Literal, TypeAlias, Union, cast

from gatekeeper.errors import one_line


class Missing(Enum):
    """Why a fact has no value. Neither is ever a value of YAML or JSON."""

    ABSENT = "absent"
    """The source was read and has no such thing."""
    UNKNOWN = "unknown"
    """The source was not read, or has not resolved it yet."""

    def __repr__(self) -> str:
        return self.name


ABSENT: Literal[Missing.ABSENT] = Missing.ABSENT
UNKNOWN: Literal[Missing.UNKNOWN] = Missing.UNKNOWN

Truth: TypeAlias = bool | None
"""Strong Kleene: True, False, or None for unknown."""


@total_ordering
@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """A version, compared by its release numbers: `2.10.0+cpu` equals `2.10`, `2.11.0.dev1` equals `2.11`.

    The release segment is PEP 440's (https://packaging.python.org/en/latest/specifications/version-specifiers/);
    driver versions such as `595.58.03` read the same way. Raises `ValueError` where there is none.
    """

    text: str
    release: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        from packaging import version  # only who compares versions pays for the import

        try:
            numbers = list(version.Version(self.text).release)
        except version.InvalidVersion:
            raise ValueError(f"`{self.text}` is not a version") from None
        while numbers and not numbers[-1]:
            numbers.pop()
        object.__setattr__(self, "release", tuple(numbers))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and self.release == other.release

    def __lt__(self, other: Version) -> bool:
        return self.release < other.release

    def __hash__(self) -> int:
        return hash(self.release)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, eq=False)
class Arch:
    """A device architecture such as `sm90` or `gfx942`; ordered within one vendor's numbering only.

    AMD's number ends in two hexadecimal digits, minor version and stepping (https://llvm.org/docs/AMDGPUUsage.html).
    """

    text: str
    order: tuple[int, ...] = field(init=False)
    vendor: str = field(init=False)

    def __post_init__(self) -> None:
        found = re.fullmatch(r"([a-z]+)(\d+)([0-9a-f]*)([a-z]*)", self.text)
        vendor, order = self.text, cast(tuple[int, ...], ())
        if found and found[1] == "gfx" and (digits := re.fullmatch(r"gfx(\d+)([0-9a-f])([0-9a-f])", self.text)):
            vendor, order = "gfx", (int(digits[1]), int(digits[2], 16), int(digits[3], 16))
        elif found:
            vendor, order = found[1], (int(found[2]),)
        object.__setattr__(self, "vendor", vendor)
        object.__setattr__(self, "order", order)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arch) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def _comparable(self, other: Arch) -> bool:
        return self.vendor == other.vendor

    def __lt__(self, other: Arch) -> bool:
        return self._comparable(other) and self.order < other.order

    def __le__(self, other: Arch) -> bool:
        return self._comparable(other) and self.order <= other.order

    def __gt__(self, other: Arch) -> bool:
        return self._comparable(other) and self.order > other.order

    def __ge__(self, other: Arch) -> bool:
        return self._comparable(other) and self.order >= other.order

    def __str__(self) -> str:
        return self.text


Value: TypeAlias = Union[
    bool, int, float, str, Version, Arch, tuple["Value", ...], Mapping[str, "Value | Literal[Missing.ABSENT]"]
]
"""A known value: scalars, lists as tuples, records as mappings; a field that isn't in a record is unknown."""

Values: TypeAlias = Mapping[str, "Value | Literal[Missing.ABSENT]"]
"""Fact name to value; a name that isn't there is unknown."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a source said of one fact."""

    value: Value | Missing
    witness: str = ""
    """Where it was read, for a person: ``config.json: text_config.n_routed_experts``."""
    note: str = ""
    """Why it is absent or unknown, where the reason is worth telling."""


Readings: TypeAlias = Mapping[str, Reading]
"""Fact name to reading; a name that isn't there is unknown."""


def records_equal(pairs: Iterable[tuple[Value | Missing, Value | Missing]]) -> Truth:
    """Compare two records field by field, strong Kleene; the pairs are the values of each field on either side.

    A field absent on both sides is equal. A record none of whose fields is there is itself absent, and absent on
    either side is false.
    """
    result: Truth = True
    left_may_be = right_may_be = False
    for left, right in pairs:
        left_may_be |= left is not ABSENT
        right_may_be |= right is not ABSENT
        if left is UNKNOWN or right is UNKNOWN:
            result = None
        elif left is ABSENT or right is ABSENT:
            if left is not right:
                return False
        elif isinstance(left, bool) != isinstance(right, bool) or left != right:
            return False
    return result if left_may_be and right_may_be else False


def plain(value: Value | Missing) -> Any:
    """Return a value as JSON has it; absent is `None`. Unknown has no JSON form and must not reach this."""
    if value is ABSENT:
        return None
    if isinstance(value, Version | Arch):
        return value.text
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    assert value is not UNKNOWN
    return value


def shown(value: Value | Missing) -> str:
    """Return a value as a sentence shows it: `none` if absent, `unknown` if unknown; always one line.

    What can't be printed is escaped: strangers write checkpoints, and sentences reach terminals and logs.
    """
    return one_line(spelt(value))


def spelt(value: Value | Missing) -> str:
    """Return a value as a text, exactly."""
    if value is ABSENT:
        return "none"
    if value is UNKNOWN:
        return "unknown"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(spelt(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {spelt(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)
