"""What fills one layer: each placement compared with the header before a byte is read, and accounted for after."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gatekeeper import CheckpointError, Index, TensorInfo
from loader.accounts import Ledger, Slot
from loader.checkpoint import DTYPES, dtype_name
from loader.errors import BuildError
from loader.formats.base import Span
from loader.plan import LayerPlan, Placement
from loader.transfer import Extent, Transfer

MAX_SHOWN = 20


class _Place(NamedTuple):
    """Rows of a parameter, in every slot of it."""

    shape: torch.Size
    dtype: torch.dtype
    slots: Sequence[Tensor]
    """Bytes by expert; of a parameter that is not stacked, of one."""


class Filling:
    """The transfers of one layer, and the ledger over them: `reckon` while they are carried out, `account` after."""

    def __init__(
        self,
        plan: LayerPlan,
        slots: Mapping[Slot, int],
        index: Index,
        parameter: Callable[[str], Tensor],
        names: Sequence[str] | None = None,
    ) -> None:
        """`slots` and `parameter` are of the layer as it was really allocated; `names`: all of the index, sorted."""
        self._plan, self._index, self._parameter = plan, index, parameter
        self._problems: list[str] = []
        self._faults: list[str] | None = None
        self._fitting: list[Placement] = []
        self._places: dict[tuple[str, Span], _Place] = {}
        self._blocks: dict[object, Extent] = {}
        self._found = torch.zeros((len(plan.notes), 2), dtype=torch.int64)
        keys = [*(placement.key for placement in plan.placements), *(note.key for note in plan.notes), *plan.unused]
        owed = {key: index.tensors[key].shape for key in keys if key in index.tensors}
        if plan.held is None:  # one rank alone does not use every tensor of the layer
            owed |= {name: index.tensors[name].shape for name in _below(plan.name, names or sorted(index.tensors))}
        self._ledger = Ledger(slots, owed, whole=plan.held is None)
        transfers = [self._transfer(placement) for placement in plan.placements]
        two, found = Extent.of(torch.empty(2, dtype=torch.int64, device="meta")), self._found.view(torch.uint8).unbind()
        transfers += [Transfer(self._info(n.key), two, f) for n, f in zip(plan.notes, found, strict=True)]
        # Where something does not fit the load fails, so that there is nothing to be read for.
        self.transfers = [] if self._problems else [transfer for transfer in transfers if transfer]

    def reckon(self) -> None:
        """Work out what would not add up if every byte arrived."""
        for p in self._fitting:
            self._ledger.write((p.param, p.expert), p.rows, p.key, p.source, p.again, p.view)
        for key in [*self._plan.unused, *(note.key for note in self._plan.notes)]:
            self._ledger.read(key)
        self._faults = self._ledger.faults()

    def account(self) -> None:
        """Raise `BuildError` with everything that does not add up in this layer."""
        for note, found in zip(self._plan.notes, self._found.tolist(), strict=True):
            if not self._problems and found != list(note.shape):
                self._problems.append(f"`{note.key}` says {found}, the weight is {list(note.shape)}")
        if self._faults is None:
            self.reckon()
        problems = self._problems + (self._faults or [])
        if problems:
            shown = problems[:MAX_SHOWN]
            shown += [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
            lines = "\n".join(f"  {line}" for line in shown)
            raise BuildError(f"layer {self._plan.index} does not add up:\n{lines}")

    def _transfer(self, placement: Placement) -> Transfer | None:
        """None for what does not fit, which is a problem."""
        info = self._info(placement.key)
        place = self._place(placement)
        dtype = DTYPES.get(info.dtype)
        block = None if dtype is None else self._block(placement, info.shape, dtype, len(place.shape))
        # A copy would broadcast in silence, and bytes would be taken for anything.
        if block is None or block.source.shape != place.shape or dtype != place.dtype:
            theirs = f"{list(info.shape)} {info.dtype}" if block is None else _words(block.source)
            ours = _words(place)
            self._problems.append(f"`{placement.key}` is {theirs}, its place in {placement.param} {ours}")
            return None
        self._fitting.append(placement)
        return Transfer(info, block, place.slots[placement.expert or 0])

    def _place(self, placement: Placement) -> _Place:
        """Worked out for all slots at once: a call into torch for each would wait for the threads that read."""
        alike = (placement.param, placement.rows)
        place = self._places.get(alike)
        if place is None:
            whole = self._parameter(placement.param).detach()
            stack = whole[None] if placement.expert is None else whole
            rows = stack[:, placement.rows[0] : placement.rows[1]]
            slots = rows.view(len(rows), -1).view(torch.uint8).unbind()
            place = self._places[alike] = _Place(rows.shape[1:], rows.dtype, slots)
        return place

    def _block(self, placement: Placement, shape: tuple[int, ...], dtype: torch.dtype, axes: int) -> Extent:
        """On the meta device: what is cut out is known by shape, strides and offset before a byte is read."""
        alike = (placement.view, placement.source, shape, dtype, axes)
        block = self._blocks.get(alike)
        if block is None:
            whole = torch.empty(shape, dtype=dtype, device="meta")
            block = self._blocks[alike] = Extent.of(placement.cut(whole, axes))
        return block

    def _info(self, key: str) -> TensorInfo:
        try:
            return self._index.tensors[key]
        except KeyError:
            raise CheckpointError(f"`{self._index.folder}` has no tensor `{key}`") from None


def _below(prefix: str, names: Sequence[str]) -> Sequence[str]:
    """Those of some sorted names that stand below a dotted prefix; `/` comes right after the dot."""
    return names[bisect_left(names, f"{prefix}.") : bisect_left(names, f"{prefix}/")]


def _words(what: Tensor | _Place) -> str:
    return f"{list(what.shape)} {dtype_name(what.dtype)}"
