"""Numbers for people."""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1} | {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
UNITS |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}
"""Bytes of a unit: GB is 10**9, GiB 2**30."""


def count(number: int, word: str) -> str:
    """``2 layers``, ``1 layer``."""
    return f"{number} {word}" + ("" if number == 1 else "s")


def human(nbytes: int) -> str:
    """``1.5 GiB``"""
    size, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def bytes_of(text: str) -> int:
    """The bytes that ``80GiB``, ``141 GB`` or ``1000`` say; raises `ValueError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)", text.strip())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"`{text}` is no size; write 80GiB, 141GB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2]])
