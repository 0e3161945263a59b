"""The ledger: every row of every slot written exactly once, every block of every tensor used exactly once.

It knows nothing of how a plan is made, so that it can find a plan's own mistakes; building keeps one too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from loader.formats.base import Span

Slot = tuple[str, int | None]
"""A parameter and the expert in it."""
Block = tuple[Span, Span]


class Ledger:
    """Collects what was written and used, and says what is wrong with the sum."""

    def __init__(
        self, slots: Mapping[Slot, int], tensors: Mapping[str, tuple[int, ...]], *, whole: bool = True
    ) -> None:
        """`slots`: every slot to its number of rows. `tensors`: every tensor that must be used, to its shape.

        `whole` false: one rank's share, for which blocks of tensors are enough, still none of them twice.
        """
        self._slots, self._tensors, self._whole = slots, tensors, whole
        self._written: dict[Slot, list[tuple[Span, str]]] = defaultdict(list)
        self._used: dict[str, list[Block | None]] = defaultdict(list)

    def write(self, slot: Slot, rows: Span, key: str, block: Block | None = None) -> None:
        """Note that `block` of tensor `key` (None: all of it) fills `rows` of `slot`."""
        self._written[slot].append((rows, key))
        self._used[key].append(block)

    def read(self, key: str) -> None:
        """Note that all of tensor `key` was used, to no slot."""
        self._used[key].append(None)

    def faults(self) -> list[str]:
        """All that does not add up, sorted; empty when everything does."""
        found = [f"{_slot(slot)} {problem}" for slot, rows in self._slots.items() for problem in self._rows(slot, rows)]
        found += [f"{_slot(slot)} is in no layer" for slot in self._written.keys() - self._slots.keys()]
        found += [f"`{key}` {problem}" for key, shape in self._tensors.items() for problem in self._uses(key, shape)]
        found += [f"`{key}` is not of these layers" for key in self._used.keys() - self._tensors.keys()]
        return sorted(found)

    def _rows(self, slot: Slot, rows: int) -> Iterable[str]:
        position = 0
        for (first, last), key in sorted(self._written[slot]):
            if first < position:
                yield f"row {first} is written twice, the second time from `{key}`"
            elif first > position:
                yield f"rows {position}:{first} are never written"
            position = max(position, last)
        if position < rows:
            yield f"rows {position}:{rows} are never written"
        elif position > rows:
            yield f"has {rows} rows, row {position - 1} was written"

    def _uses(self, key: str, shape: tuple[int, ...]) -> Iterable[str]:
        blocks = self._used[key]
        if not blocks:
            yield "is never used"
        elif None in blocks:
            if len(blocks) > 1:
                yield f"is used {len(blocks)} times"
        else:
            yield from _tiling([block for block in blocks if block is not None], shape, self._whole)


def _tiling(blocks: list[Block], shape: tuple[int, ...], whole: bool) -> Iterable[str]:
    """Whether disjoint `blocks` lie in a matrix, and cover it if `whole`: as many elements as it has, none twice."""
    for i, (rows, columns) in enumerate(blocks):
        for other_rows, other_columns in blocks[i + 1 :]:
            if _overlap(rows, other_rows) and _overlap(columns, other_columns):
                yield f"has a block that is used twice, at row {max(rows[0], other_rows[0])}"
    used = sum((r[1] - r[0]) * (c[1] - c[0]) for r, c in blocks)
    if len(shape) != 2 or any(r[1] > shape[0] or c[1] > shape[1] for r, c in blocks):
        yield f"of shape {list(shape)} has no such block: {blocks}"
    elif whole and used != shape[0] * shape[1]:
        yield f"of shape {list(shape)} is used in part: {used} elements"


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _slot(slot: Slot) -> str:
    param, expert = slot
    return param if expert is None else f"slot {expert} of {param}"
