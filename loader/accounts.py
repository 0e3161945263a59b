"""The ledger: every row of every slot written exactly once, every block of every tensor used exactly once.

It knows nothing of how a plan is made, so that it can find a plan's own mistakes; building keeps one too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from gatekeeper import View
from loader.formats.base import Span

Slot = tuple[str, int | None]
"""A parameter and the expert in it."""
Block = tuple[Span, Span]
"""Rows and columns of a matrix."""


class _Use(NamedTuple):
    """What one placement takes of a tensor; of a stack, a block of one expert's matrix in it."""

    view: View | None
    block: Block | None

    @property
    def is_whole(self) -> bool:
        return self.view is None and self.block is None


_WHOLE = _Use(None, None)
_ONCE = [_WHOLE]
"""All of a tensor, and no part of it again."""


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
        self._used: dict[str, list[_Use]] = defaultdict(list)

    def write(
        self,
        slot: Slot,
        rows: Span,
        key: str,
        block: Block | None = None,
        again: bool = False,
        view: View | None = None,
    ) -> None:
        """Note that `block` (None: all) of tensor `key`, or of the matrix that `view` shows in it, fills `rows`.

        `again`: on purpose another slot takes the same, and counts as the use of it.
        """
        self._written[slot].append((rows, key))
        if not again:
            self._used[key].append(_WHOLE if view is None and block is None else _Use(view, block))

    def read(self, key: str) -> None:
        """Note that all of tensor `key` was used, to no slot."""
        self._used[key].append(_WHOLE)

    def faults(self) -> list[str]:
        """All that does not add up, sorted; empty when everything does."""
        found = [
            f"{_slot(slot)} {problem}"
            for slot, rows in self._slots.items()
            for problem in _problems_of_rows(self._written[slot], rows)
        ]
        found += [f"{_slot(slot)} is in no layer" for slot in self._written.keys() - self._slots.keys()]
        found += [
            f"`{key}` {problem}"
            for key, shape in self._tensors.items()
            if self._used[key] != _ONCE  # nearly all of them are, and there are many
            for problem in self._uses(key, shape)
        ]
        found += [f"`{key}` is not of these layers" for key in self._used.keys() - self._tensors.keys()]
        return sorted(found)

    def _uses(self, key: str, shape: tuple[int, ...]) -> Iterable[str]:
        uses = self._used[key]
        if not uses:
            yield "is never used"
        elif any(use.is_whole for use in uses):
            if len(uses) > 1:
                yield f"is used {len(uses)} times"
        else:
            yield from _tiling(uses, shape, self._whole)


def _problems_of_rows(written: Sequence[tuple[Span, str]], rows: int) -> list[str]:
    found, position = [], 0
    for (first, last), key in sorted(written):
        if first < position:
            found.append(f"row {first} is written twice, the second time from `{key}`")
        elif first > position:
            found.append(f"rows {position}:{first} are never written")
        position = max(position, last)
    if position < rows:
        found.append(f"rows {position}:{rows} are never written")
    elif position > rows:
        found.append(f"has {rows} rows, row {position - 1} was written")
    return found


def _tiling(uses: Sequence[_Use], shape: tuple[int, ...], whole: bool) -> Iterable[str]:
    """Whether disjoint uses lie in a tensor, or a vector as a column, none twice, and if `whole` cover all of it."""
    areas: dict[int | None, list[tuple[range, Span]]] = defaultdict(list)
    for use in uses:
        areas[None if use.view is None else use.view.item].append(_area(use, shape))
    for item, parts in areas.items():
        where = "" if item is None else f" of expert {item}"
        for i, (rows, columns) in enumerate(parts):
            for other_rows, other_columns in parts[i + 1 :]:
                if _overlap(columns, other_columns) and (twice := _shared_row(rows, other_rows)) is not None:
                    yield f"has a block that is used twice, at row {twice}{where}"
    used = sum(len(rows) * (columns[1] - columns[0]) for parts in areas.values() for rows, columns in parts)
    outside = [
        ((rows.start, rows.stop), columns) for rows, columns in areas.get(None, ()) if _is_outside(rows, columns, shape)
    ]
    if outside:
        yield f"of shape {list(shape)} has no such block: {outside}"
    elif (whole and used != prod(shape)) or (None in areas and len(shape) > 2):
        yield f"of shape {list(shape)} is used in part: {used} elements"


def _is_outside(rows: range, columns: Span, shape: tuple[int, ...]) -> bool:
    return rows.stop > (shape[0] if shape else 1) or columns[1] > prod(shape[1:])


def _area(use: _Use, shape: tuple[int, ...]) -> tuple[range, Span]:
    """Rows and columns that a use takes of its item, or of the tensor where that is one matrix."""
    if use.view is None:
        assert use.block is not None
        return range(*use.block[0]), use.block[1]
    matrix = use.view.shape(shape)
    columns = (0, matrix[1] if len(matrix) > 1 else 1)
    if use.block is None:
        return use.view.rows, columns
    (first, last), columns = use.block
    return use.view.rows[first:last], columns


def _shared_row(a: range, b: range) -> int | None:
    """The first row that is in both; rows of gate and up that take turns are in neither's way."""
    if a.step == b.step == 1:
        first, last = max(a.start, b.start), min(a.stop, b.stop)
        return first if first < last else None
    return min(set(a) & set(b), default=None)


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _slot(slot: Slot) -> str:
    param, expert = slot
    return param if expert is None else f"slot {expert} of {param}"
