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
from typing import TypeVar

import torch
from torch import Tensor, nn

from loader.formats import Layout, Part
from loader.formats.base import Span
from loader.moe import Experts, MoELayer
from loader.plan import LayerPlan, Rank
from loader.raw import Matrix

M = TypeVar("M", bound=nn.Module)

STRIP, HIDDEN_STRIP = 32, 256
"""Columns of the intermediate and of the hidden size in a strip, or of whole quantization blocks that are wider."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Where a strip of one expert lies in its raw tensors."""

    rows: Cut
    """Of gate and up."""
    columns: Cut
    """Of down."""

    def of(self, projection: str) -> Cut:
        """The cut of ``gate``, ``up`` or ``down``."""
        return self.columns if projection == "down" else self.rows


class Strips:
    """Which strip of which expert, in a layer as it was loaded and in the checkpoint alike."""

    def __init__(self, plan: LayerPlan, rank: Rank | None, seed: int) -> None:
        self._plan, self._rank = plan, rank
        self.held = plan.held or (0, plan.n_routed)
        self.adds_down_bias = rank is None or rank.adds_down_bias
        self.shared_weight = plan.shared_weight
        self.shared_slots = plan.n_shared if plan.shared == "slot" else 0
        draw = random.Random(seed)
        layouts = [plan.layout] + ([plan.shared_layout] if plan.shared_layout else [])
        (self.hidden,) = _places(1, layouts, plan.hidden_size, HIDDEN_STRIP, draw)
        slots = self.held[1] - self.held[0] + self.shared_slots
        self._spans = _places(slots, [plan.layout], plan.width, STRIP, draw)
        if plan.shared_layout is not None:
            (self._shared_span,) = _places(1, [plan.shared_layout], plan.shared_width, STRIP, draw)

    def of_routed(self, expert: int) -> Strip:
        """The strip of a routed expert, by its number in the whole layer."""
        plan = self._plan
        offset = self._rank.moe_tp_rank * plan.width if self._rank else 0
        return self._strip(plan.layout, self._spans[expert - self.held[0]], offset)

    def of_shared(self) -> Iterator[Strip]:
        """Strips of the shared expert: one where it is on its own, one for each slot that it fills."""
        plan = self._plan
        if plan.shared == "separate" and plan.shared_layout is not None:
            offset = self._rank.index * plan.shared_width if self._rank else 0
            yield self._strip(plan.shared_layout, self._shared_span, offset)
        slices = self._rank.moe_tp_size if self._rank else 1
        for slot in range(self.shared_slots):
            offset = slot * plan.width * slices + (self._rank.moe_tp_rank * plan.width if self._rank else 0)
            yield self._strip(plan.layout, self._spans[self.held[1] - self.held[0] + slot], offset)

    def narrowed(self, layer: MoELayer, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> tuple[MoELayer, int]:
        """`layer` with nothing but strips, for tokens cut to `hidden`, and how many experts are in it.

        `weights_TK` and `ids_TK` are what its router says of `x_TD`.
        """
        plan = self._plan
        slots_U, renumbered_TK = ids_TK.unique(return_inverse=True)
        narrow = _shallow(layer)
        narrow.router = _Fixed((weights_TK, renumbered_TK))
        narrow.experts = self._cut(layer.experts, {slot: self._spans[slot] for slot in slots_U.tolist()}, plan.width)
        if layer.shared is not None:
            narrow.shared = _shallow(layer.shared)
            narrow.shared.experts = self._cut(layer.shared.experts, {0: self._shared_span}, plan.shared_width)
            if layer.shared.gate is not None:
                narrow.shared._modules["gate"] = _Fixed(layer.shared.gate(x_TD))
        return narrow, len(slots_U) + (layer.shared is not None)

    def _cut(self, experts: Experts, spans: Mapping[int, Span], width: int) -> Experts:
        narrow, d = _shallow(experts), self._plan.hidden_size
        if experts.w13_bias is not None:
            b13, half = experts.w13_bias, experts.w13_bias.shape[1] // 2
            gates = [b13[s, a:b] for s, (a, b) in spans.items()]
            ups = [b13[s, half + a : half + b] for s, (a, b) in spans.items()]
            narrow._parameters["w13_bias"] = _stacked(gates, ups)
        if experts.w2_bias is not None:
            narrow._parameters["w2_bias"] = _stacked([experts.w2_bias[s, slice(*self.hidden)] for s in spans])
        for part in experts.layout.parts:
            w13, w2 = getattr(experts, f"w13_{part.name}"), getattr(experts, f"w2_{part.name}")
            half, columns = w13.shape[1] // 2, slice(*part.stored_columns(self.hidden, d))
            rows = [(slot, part.stored_rows(span, width)) for slot, span in spans.items()]
            gates = [w13[s, a:b, columns] for s, (a, b) in rows]
            ups = [w13[s, half + a : half + b, columns] for s, (a, b) in rows]
            narrow._parameters[f"w13_{part.name}"] = _stacked(gates, ups)
            out = slice(*part.stored_rows(self.hidden, d))
            downs = [w2[slot, out, slice(*part.stored_columns(span, width))] for slot, span in spans.items()]
            narrow._parameters[f"w2_{part.name}"] = _stacked(downs)
        return narrow

    def _strip(self, layout: Layout, span: Span, offset: int) -> Strip:
        parts = {part.suffix: part for part in layout.parts}
        there = span[0] + offset, span[1] + offset
        return Strip(Cut(parts, there, self.hidden), Cut(parts, self.hidden, there))


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows and columns of one projection, in elements."""

    parts: Mapping[str, Part]
    rows: Span
    columns: Span

    def part(self, suffix: str, matrix: Matrix) -> Matrix:
        """What it leaves of one part."""
        part = self.parts[suffix]
        return matrix.cut(_items(self.rows, part.rows_per_item), _items(self.columns, part.columns_per_item))

    def bias(self, matrix: Matrix) -> Matrix:
        """What it leaves of the bias, a column."""
        return matrix.cut(self.rows, (0, 1))


def _items(span: Span, per_item: int | None) -> Span:
    return (0, 1) if per_item is None else (span[0] // per_item, -(-span[1] // per_item))


class _Fixed(nn.Module):
    """A router, or the gate of a shared expert, that has already answered."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, x_TD: Tensor) -> object:
        return self._answer


def _places(count: int, layouts: Sequence[Layout], width: int, strip: int, draw: random.Random) -> list[Span]:
    """Some places of whole blocks; all of `width` where it has no more than one strip."""
    parts = [part for layout in layouts for part in layout.parts]
    sizes = (size for part in parts for size in (part.rows_per_item, part.columns_per_item) if size)
    size = math.lcm(*sizes, strip)
    if width < 2 * size:
        return [(0, width)] * count
    places = [size * draw.randrange(width // size) for _ in range(count)]
    return [(place, place + size) for place in places]


def _shallow(module: M) -> M:
    """A copy whose submodules and parameters can be replaced without touching the original."""
    twin = copy.copy(module)
    twin._modules, twin._parameters = dict(module._modules), dict(module._parameters)
    return twin


def _stacked(*halves: Sequence[Tensor]) -> nn.Parameter:
    """A stack whose items are these, gate above up where there are two."""
    return nn.Parameter(torch.cat([torch.stack(list(each)) for each in halves], 1), requires_grad=False)
