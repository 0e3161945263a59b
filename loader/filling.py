"""What fills one layer: each placement compared with the header before a byte is read, and accounted for after."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gatekeeper import CheckpointError, Index, TensorInfo
from loader.accounts import Ledger, Slot
from loader.checkpoint import DTYPES, dtype_name
from loader.errors import BuildError
from loader.plan import LayerPlan, Placement
from loader.transfer import Transfer

MAX_SHOWN = 20


class Filling:
    """The transfers of one layer, and the ledger over them; `account` once they have been carried out."""

    def __init__(
        self, plan: LayerPlan, slots: Mapping[Slot, int], index: Index, parameter: Callable[[str], Tensor]
    ) -> None:
        """`slots` and `parameter` are of the layer as it was really allocated."""
        self._plan, self._index, self._parameter = plan, index, parameter
        self._problems: list[str] = []
        self._fitting: list[Placement] = []
        self._found = torch.zeros((len(plan.notes), 2), dtype=torch.int64)
        keys = [placement.key for placement in plan.placements] + [note.key for note in plan.notes]
        owed = {key: index.tensors[key].shape for key in keys if key in index.tensors}
        if plan.held is None:  # one rank alone does not use every tensor of the layer
            owed |= {name: info.shape for name, info in index.tensors.items() if name.startswith(f"{plan.name}.")}
        self._ledger = Ledger(slots, owed, whole=plan.held is None)
        transfers = [self._transfer(placement) for placement in plan.placements]
        transfers += [Transfer(self._info(note.key), None, self._found[i]) for i, note in enumerate(plan.notes)]
        # Where something does not fit the load fails, so that there is nothing to be read for.
        self.transfers = [] if self._problems else [transfer for transfer in transfers if transfer]

    def account(self) -> None:
        """Raise `BuildError` with everything that does not add up in this layer."""
        for placement in self._fitting:
            self._ledger.write((placement.param, placement.expert), placement.rows, placement.key, placement.source)
        for note, found in zip(self._plan.notes, self._found.tolist(), strict=True):
            self._ledger.read(note.key)
            if not self._problems and found != list(note.shape):
                self._problems.append(f"`{note.key}` says {found}, the weight is {list(note.shape)}")
        problems = self._problems + self._ledger.faults()
        if problems:
            shown = problems[:MAX_SHOWN]
            shown += [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
            lines = "\n".join(f"  {line}" for line in shown)
            raise BuildError(f"layer {self._plan.index} does not add up:\n{lines}")

    def _transfer(self, placement: Placement) -> Transfer | None:
        """None for what does not fit, which is a problem."""
        info = self._info(placement.key)
        parameter = self._parameter(placement.param).detach()
        slot = parameter if placement.expert is None else parameter[placement.expert]
        rows = slot[placement.rows[0] : placement.rows[1]]
        block = info.shape if placement.source is None else tuple(last - first for first, last in placement.source)
        # A copy would cast between any two dtypes and broadcast, both in silence; bytes would be taken for anything.
        if block != rows.shape or DTYPES.get(info.dtype) != rows.dtype:
            theirs = f"{list(block)} {dtype_name(DTYPES[info.dtype]) if info.dtype in DTYPES else info.dtype}"
            ours = f"{list(rows.shape)} {dtype_name(rows.dtype)}"
            self._problems.append(f"`{placement.key}` is {theirs}, its place in {placement.param} {ours}")
            return None
        self._fitting.append(placement)
        return Transfer(info, placement.source, rows)

    def _info(self, key: str) -> TensorInfo:
        try:
            return self._index.tensors[key]
        except KeyError:
            raise CheckpointError(f"`{self._index.folder}` has no tensor `{key}`") from None
