"""Numbers for people."""

from __future__ import annotations


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
