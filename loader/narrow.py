"""Strips of experts: a few columns of the intermediate and of the hidden size, which make an expert of their own.

``y = sum over f of down[:, f] * silu(gate[f] @ x) * (up[f] @ x)``: each f adds its own term, so that a strip of them is
a narrow expert; an x that is zero outside some columns needs no others of gate and up, and each number of y is a row of
down. Verification compares strips, each expert's at another place, so that it need not unpack whole experts.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from loader.checkpoint import Checkpoint
from loader.formats import FORMATS, Part
from loader.formats.base import Span
from loader.moe import Experts, MoELayer
from loader.plan import LayerPlan, Rank

M = TypeVar("M", bound=nn.Module)

STRIP, HIDDEN_STRIP = 32, 256
"""Columns of the intermediate and of the hidden size in a strip, or of whole quantization blocks that are wider."""


class Source(Protocol):
    """Where raw tensors come from by name: a checkpoint, or a strip of one."""

    def fetch(self, name: str) -> Tensor:
        """The tensor, on the CPU."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Where the raw tensors of a strip come from."""

    rows: Source
    """Of gate and up."""
    columns: Source
    """Of down."""


class Strips:
    """Which strip of which expert, in a layer as it was loaded and in the checkpoint alike."""

    def __init__(self, plan: LayerPlan, rank: Rank | None, seed: int) -> None:
        self._plan, self._rank, self._seed = plan, rank, seed
        self.held = plan.held or (0, plan.n_routed)
        self.shared_weight = plan.shared_weight
        self.shared_slots = plan.n_shared if plan.shared == "slot" else 0
        formats = [plan.format] + ([plan.shared_format] if plan.shared_format else [])
        self.hidden = _place(formats, plan.hidden_size, HIDDEN_STRIP, f"{seed} hidden")

    def of_routed(self, checkpoint: Checkpoint, expert: int) -> Strip:
        """The strip of a routed expert, by its number in the whole layer."""
        plan = self._plan
        offset = self._rank.moe_tp_rank * plan.width if self._rank else 0
        return self._strip(checkpoint, plan.format, self._span(expert - self.held[0]), offset)

    def of_shared(self, checkpoint: Checkpoint) -> Iterator[Strip]:
        """Strips of the shared expert: one where it is on its own, one for each slot that it fills."""
        plan = self._plan
        if plan.shared == "separate" and plan.shared_format is not None:
            offset = self._rank.index * plan.shared_width if self._rank else 0
            yield self._strip(checkpoint, plan.shared_format, self._shared_span(), offset)
        slices = self._rank.moe_tp_size if self._rank else 1
        for slot in range(self.shared_slots):
            offset = slot * plan.width * slices + (self._rank.moe_tp_rank * plan.width if self._rank else 0)
            yield self._strip(checkpoint, plan.format, self._span(self.held[1] - self.held[0] + slot), offset)

    def narrowed(self, layer: MoELayer, x_TD: Tensor) -> tuple[MoELayer, int]:
        """`layer` with nothing but strips, for these tokens cut to `hidden`; and how many experts are in it."""
        plan = self._plan
        weights_TK, ids_TK = layer.router(x_TD)
        slots_U, renumbered_TK = ids_TK.unique(return_inverse=True)
        narrow = _shallow(layer)
        narrow.router = _Fixed((weights_TK, renumbered_TK))
        narrow.experts = self._cut(layer.experts, {slot: self._span(slot) for slot in slots_U.tolist()}, plan.width)
        if layer.shared is not None:
            narrow.shared = _shallow(layer.shared)
            narrow.shared.experts = self._cut(layer.shared.experts, {0: self._shared_span()}, plan.shared_width)
            if layer.shared.gate is not None:
                narrow.shared._modules["gate"] = _Fixed(layer.shared.gate(x_TD))
        return narrow, len(slots_U) + (layer.shared is not None)

    def _cut(self, experts: Experts, spans: Mapping[int, Span], width: int) -> Experts:
        narrow, d = _shallow(experts), self._plan.hidden_size
        for part in experts.weight_format.parts:
            w13, w2 = getattr(experts, f"w13_{part.suffix}"), getattr(experts, f"w2_{part.suffix}")
            half, columns = w13.shape[1] // 2, slice(*part.stored_columns(self.hidden, d))
            rows = [(slot, part.stored_rows(span, width)) for slot, span in spans.items()]
            gates_and_ups = [
                torch.cat([w13[s, a:b, columns], w13[s, half + a : half + b, columns]]) for s, (a, b) in rows
            ]
            narrow._parameters[f"w13_{part.suffix}"] = _stacked(gates_and_ups)
            out = slice(*part.stored_rows(self.hidden, d))
            downs = [w2[slot, out, slice(*part.stored_columns(span, width))] for slot, span in spans.items()]
            narrow._parameters[f"w2_{part.suffix}"] = _stacked(downs)
        return narrow

    def _span(self, slot: int) -> Span:
        return _place([self._plan.format], self._plan.width, STRIP, f"{self._seed} {slot}")

    def _shared_span(self) -> Span:
        assert self._plan.shared_format is not None
        return _place([self._plan.shared_format], self._plan.shared_width, STRIP, f"{self._seed} shared")

    def _strip(self, checkpoint: Checkpoint, format_name: str, span: Span, offset: int) -> Strip:
        parts = {part.suffix: part for part in FORMATS[format_name].parts}
        there = span[0] + offset, span[1] + offset
        return Strip(_Cut(checkpoint, parts, there, self.hidden), _Cut(checkpoint, parts, self.hidden, there))


class _Cut:
    """Raw tensors of one projection cut to rows and columns, in elements; scalars are whole."""

    def __init__(self, checkpoint: Checkpoint, parts: Mapping[str, Part], rows: Span, columns: Span) -> None:
        self._checkpoint, self._parts, self._rows, self._columns = checkpoint, parts, rows, columns

    def fetch(self, name: str) -> Tensor:
        part = self._parts.get(name.rpartition(".")[2])
        if part is None or len(self._checkpoint.info(name).shape) != 2:
            return self._checkpoint.fetch(name)
        rows = self._checkpoint.fetch(name, _items(self._rows, part.rows_per_item))
        return rows[:, slice(*_items(self._columns, part.columns_per_item))]


def _items(span: Span, per_item: int) -> Span:
    return span[0] // per_item, -(-span[1] // per_item)


class _Fixed(nn.Module):
    """A router, or the gate of a shared expert, that has already answered."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, x_TD: Tensor) -> object:
        return self._answer


def _place(formats: Sequence[str], width: int, strip: int, seed: str) -> Span:
    """Some place of whole blocks; all of `width` where it has no more than one strip."""
    parts = [part for name in formats for part in FORMATS[name].parts]
    size = math.lcm(*(size for part in parts for size in (part.rows_per_item, part.columns_per_item)), strip)
    count = width // size
    if count <= 1:
        return 0, width
    place = random.Random(seed).randrange(count)
    return place * size, (place + 1) * size


def _shallow(module: M) -> M:
    """A copy whose submodules and parameters can be replaced without touching the original."""
    twin = copy.copy(module)
    twin._modules, twin._parameters = dict(module._modules), dict(module._parameters)
    return twin


def _stacked(each: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack(list(each)), requires_grad=False)
