"""One row of every tensor, byte by byte against the slot that must hold it; slots and rows are counted here anew.

What must be there is read while the layer is filled, so that little is left to do after.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatekeeper import MoeTensors, TensorInfo
from loader.errors import VerificationError
from loader.formats import Part
from loader.formats.base import BIAS, Span
from loader.gathered import moved
from loader.moe import Experts, MoELayer
from loader.plan import LayerPlan, Rank
from loader.raw import Matrix, Reader
from loader.runs import rows_of

Mlp = Mapping[str, Mapping[str, TensorInfo]]
"""Parts of gate, up and down by suffix, a bias as `BIAS`."""


@dataclass(frozen=True, slots=True)
class Spot:
    """One row, or column, of all slots of a parameter: of gate and of up, or of down."""

    held: Tensor
    """``(S, P, runs, run)`` of the layer, or of a column ``(S, P, N)``, a view; P projections."""
    expected: Tensor
    """``(S, P, bytes)`` of the checkpoint."""
    where: str
    """``row 17``"""
    name: str
    """``w13_weight``"""
    infos: Mapping[str, Sequence[TensorInfo]]
    """Whose rows they are, by projection and slot."""

    def differing(self, found: Tensor) -> tuple[int, str] | None:
        """The first slot and projection that hold something else; `found` is what is in `held`, on the CPU."""
        found_SPN = _bytes(found)
        if torch.equal(found_SPN, self.expected):
            return None
        slot, projection = (found_SPN != self.expected).any(2).nonzero()[0].tolist()
        return slot, list(self.infos)[projection]


def spots_of(
    layer: MoELayer, plan: LayerPlan, rank: Rank | None, tensors: MoeTensors, reader: Reader, seed: int
) -> list[Spot]:
    """A random row of each part of each projection of each slot of a layer that need not be filled yet.

    Of tensors that are saved transposed it is a column of the slot, which is a row of the file.
    """
    slices, place = (rank.moe_tp_size, rank.moe_tp_rank) if rank else (1, 0)
    first, last = plan.routed_here
    mlps: list[tuple[Mlp, int, int]] = [(_all_of(tensors, expert), place, slices) for expert in range(first, last)]
    if plan.shared == "slot" and tensors.shared:
        mlps += [(tensors.shared, slot * slices + place, plan.n_shared * slices) for slot in range(plan.n_shared)]
    draw = _Draw(reader, random.Random(seed))
    spots = list(draw.spots(layer.experts, _laid_out(plan, "experts"), mlps))
    if plan.shared == "separate" and tensors.shared and layer.shared is not None:
        slices, place = (rank.tp_size, rank.index) if rank else (1, 0)
        spots += draw.spots(layer.shared.experts, _laid_out(plan, "shared"), [(tensors.shared, place, slices)])
    return spots


def compare_rows(layer: MoELayer, spots: Sequence[Spot], found: Sequence[Tensor] | None = None) -> int:
    """The number of rows, once the layer is filled; raises `VerificationError` at the first that differs, naming slot,
    row and tensor. `found` is what is in ``held`` of each, where that was fetched from a device already."""
    held = [spot.held for spot in spots]
    for spot, each in zip(spots, moved(held, torch.device("cpu")) if found is None else found, strict=True):
        if (differing := spot.differing(each)) is not None:
            slot, projection = differing
            raise VerificationError(
                f"layer {layer.index} (`{layer.name}`): slot {slot} of {spot.name} does not hold "
                f"`{spot.infos[projection][slot].name}`: {spot.where} of {projection} differs; the layer was loaded "
                f"wrongly",
                layer=layer.index,
                figure=math.nan,
                tolerance=0.0,
            )
    return sum(len(infos) for spot in spots for infos in spot.infos.values())


class _Draw:
    def __init__(self, reader: Reader, draw: random.Random) -> None:
        self._reader, self._draw = reader, draw

    def spots(
        self, experts: Experts, laid_out: Mapping[str, tuple[int, ...]], mlps: list[tuple[Mlp, int, int]]
    ) -> Iterator[Spot]:
        """Slot i of `experts` must hold slice `place` of `slices` of MLP i; `laid_out`: shapes once it is filled."""
        parts = {part.name: part for part in experts.layout.parts}
        for name, parameter in experts.named_parameters():
            part = parts.get(name.partition("_")[2])
            suffix = BIAS if part is None else part.suffix
            projections = ("gate", "up") if name.startswith("w13_") else ("down",)
            held = rows_of(parameter.detach().view(laid_out[name])).unflatten(1, (len(projections), -1))
            infos = {projection: [mlp[projection][suffix] for mlp, _, _ in mlps] for projection in projections}
            height, runs, run = held.shape[2:]
            width = runs * run
            # One line of gate and up, so that the device gives both at once.
            if self._reader.matrix(infos[projections[0]][0]).is_by_rows:
                line, kind = self._draw.randrange(height), "row"
                held, rows, columns = held[:, :, line], (line, line + 1), (0, width)
            else:
                line, kind = self._draw.randrange(width), "column"
                held, rows, columns = held[..., line // run, line % run], (0, height), (line, line + 1)
            lines = []
            for projection in projections:
                wanted = [
                    self._cut(info, part, projection, place, slices, rows, columns)
                    for info, (_, place, slices) in zip(infos[projection], mlps, strict=True)
                ]
                lines.append(self._reader.read(wanted).flatten(1))
            yield Spot(held, _bytes(torch.stack(lines, 1)), f"{kind} {line}", name, infos)

    def _cut(
        self, info: TensorInfo, part: Part | None, projection: str, place: int, slices: int, rows: Span, columns: Span
    ) -> Matrix:
        """What a slot must hold there; what does not divide along an axis is whole in every slice."""
        matrix, top, left = self._reader.matrix(info), 0, 0
        if projection == "down":
            if part is not None and part.columns_per_item is not None:
                left = matrix.width * place // slices
        elif part is None or part.rows_per_item is not None:
            top = matrix.height * place // slices
        return matrix.cut((top + rows[0], top + rows[1]), (left + columns[0], left + columns[1]))


def _all_of(tensors: MoeTensors, expert: int) -> Mlp:
    """Tensors of one routed expert, its biases among them."""
    biases = tensors.expert_bias(expert)
    return {
        projection: {**parts, **({BIAS: biases[projection]} if projection in biases else {})}
        for projection, parts in tensors.expert(expert).items()
    }


def _laid_out(plan: LayerPlan, module: str) -> Mapping[str, tuple[int, ...]]:
    """Shapes of a module's parameters in memory, by name."""
    return {
        param.name.rpartition(".")[2]: param.laid_out for param in plan.params if param.name.split(".")[2] == module
    }


def _bytes(rows: Tensor) -> Tensor:
    """``(S, P, bytes)`` of rows ``(S, P, ...)``."""
    return rows.flatten(2).contiguous().view(torch.uint8)
