"""One row of every tensor, byte by byte against the slot that must hold it; slots and rows are counted here anew."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gatekeeper import MoeTensors, TensorInfo
from loader import raw
from loader.checkpoint import Checkpoint
from loader.errors import VerificationError
from loader.formats import Part
from loader.moe import Experts, MoELayer
from loader.plan import LayerPlan, Rank

Mlp = Mapping[str, Mapping[str, TensorInfo]]
"""Parts of gate, up and down by suffix."""
BIAS = "bias"
"""What stands for an expert's bias among them; no part is called that."""


def compare_rows(
    layer: MoELayer, plan: LayerPlan, rank: Rank | None, tensors: MoeTensors, checkpoint: Checkpoint, seed: int
) -> int:
    """Compare a random row of each part of each projection of each slot; the number of rows.

    Raises `VerificationError` at the first that differs, naming slot, row and tensor.
    """
    slices, place = (rank.moe_tp_size, rank.moe_tp_rank) if rank else (1, 0)
    first, last = plan.held or (0, plan.n_routed)
    mlps: list[tuple[Mlp, int, int]] = [(_all_of(tensors, expert), place, slices) for expert in range(first, last)]
    if plan.shared == "slot" and tensors.shared:
        mlps += [(tensors.shared, slot * slices + place, plan.n_shared * slices) for slot in range(plan.n_shared)]
    spots = _Spots(layer, checkpoint, random.Random(seed))
    rows = spots.compare(layer.experts, mlps)
    if plan.shared == "separate" and tensors.shared and layer.shared is not None:
        slices, place = (rank.tp_size, rank.index) if rank else (1, 0)
        rows += spots.compare(layer.shared.experts, [(tensors.shared, place, slices)])
    return rows


class _Spots:
    def __init__(self, layer: MoELayer, checkpoint: Checkpoint, draw: random.Random) -> None:
        self._layer, self._checkpoint, self._draw = layer, checkpoint, draw

    def compare(self, experts: Experts, mlps: list[tuple[Mlp, int, int]]) -> int:
        """Slot i of `experts` must hold slice `place` of `slices` of MLP i."""
        count = 0
        parts = {part.name: part for part in experts.layout.parts}
        for name, projection, rows_SC, row, is_up in self._rows(experts):
            part = parts.get(name.partition("_")[2])
            for slot, ((mlp, place, slices), found) in enumerate(zip(mlps, _bytes(rows_SC), strict=True)):
                info = mlp[projection][BIAS if part is None else part.suffix]
                wanted = self._wanted(info, part, projection, row, place, slices, rows_SC.shape[1])
                if not torch.equal(found, _bytes(wanted)[0]):
                    raise VerificationError(
                        f"layer {self._layer.index} (`{self._layer.name}`): slot {slot} of {name} does not hold "
                        f"`{info.name}`: row {row}{' of up' if is_up else ''} differs; the layer was loaded wrongly",
                        layer=self._layer.index,
                        figure=math.nan,
                        tolerance=0.0,
                    )
                count += 1
        return count

    def _rows(self, experts: Experts) -> Iterator[tuple[str, str, Tensor, int, bool]]:
        """Of each stacked parameter and projection the same row of all slots, on the CPU."""
        for name, parameter in experts.named_parameters():
            height = parameter.shape[1] // 2 if name.startswith("w13_") else parameter.shape[1]
            for half, projection in enumerate(("gate", "up") if name.startswith("w13_") else ("down",)):
                row = self._draw.randrange(height)
                found = parameter.detach()[:, half * height + row].cpu()
                yield name, projection, found.reshape(len(found), -1), row, half == 1

    def _wanted(
        self, info: TensorInfo, part: Part | None, projection: str, row: int, place: int, slices: int, columns: int
    ) -> Tensor:
        """The row that a slot must hold; what does not divide along an axis is whole in every slice."""
        matrix = raw.matrix(self._checkpoint, info)
        if projection == "down":
            divides = part is not None and part.columns_per_item is not None
            start = matrix.shape[1] * place // slices if divides else 0
            matrix = matrix[row : row + 1, start : start + columns]
        else:
            divides = part is None or part.rows_per_item is not None
            row += matrix.shape[0] * place // slices if divides else 0
            matrix = matrix[row : row + 1]
        return raw.read(self._checkpoint, info, matrix)


def _all_of(tensors: MoeTensors, expert: int) -> Mlp:
    """Tensors of one routed expert, its biases among them."""
    biases = tensors.expert_bias(expert)
    return {
        projection: {**parts, **({BIAS: biases[projection]} if projection in biases else {})}
        for projection, parts in tensors.expert(expert).items()
    }


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)
