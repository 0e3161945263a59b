"""Strips of experts: a few columns of the intermediate and of the hidden size, which make an expert of their own.

``y = sum over f of down[:, f] * silu(gate[f] @ x) * (up[f] @ x)``: each f adds its own term, so that a strip of them is
a narrow expert; an x that is zero outside some columns needs no others of gate and up, and each number of y is a row of
down. Verification compares strips, each expert's at another place, so that it need not unpack whole experts. Strips
leave a device packed as they are, and are computed on the CPU, where no kernel is compiled for their widths.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from loader.formats import Layout, Part
from loader.formats.base import Span
from loader.gathered import moved
from loader.moe import Experts, MoELayer
from loader.plan import LayerPlan, Rank
from loader.raw import Matrix
from loader.runs import rows_of
from loader.twins import Routing, routed, shallow

STRIP, HIDDEN_STRIP = 32, 256
"""Columns of the intermediate and of the hidden size in a strip, or of whole quantization blocks that are wider."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of a number."""


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
        self.held = plan.routed_here
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

    def pieces(self, layer: MoELayer, slots: Sequence[int]) -> list[Piece]:
        """Strips of `slots`, and of a shared expert on its own, in a layer that need not be filled yet."""
        pieces = self._of(layer.experts, slots, [self._spans[slot] for slot in slots], self._plan.width)
        if layer.shared is not None:
            pieces += self._of(layer.shared.experts, [0], [self._shared_span], self._plan.shared_width)
        indices = moved([index for piece in pieces for index in piece.indices], next(layer.parameters()).device)
        return [replace(piece, indices=tuple(indices[3 * i : 3 * i + 3])) for i, piece in enumerate(pieces)]

    def _of(self, experts: Experts, slots: Sequence[int], spans: Sequence[Span], width: int) -> list[Piece]:
        d, slots_U = self._plan.hidden_size, torch.tensor(slots)
        pieces: list[Piece] = []

        def add(name: str, rows: Sequence[Span], columns: Sequence[Span], up_from: int | None = None) -> None:
            rows_UR = _counted(rows)
            if up_from is not None:
                rows_UR = torch.cat([rows_UR, rows_UR + up_from], 1)
            indices = slots_U[:, None, None], rows_UR[:, :, None], _counted(columns)[:, None, :]
            pieces.append(Piece(experts, name, tuple(slots), indices))

        if experts.w13_bias is not None:
            add("w13_bias", spans, [(0, 1)], width)
        if experts.w2_bias is not None:
            add("w2_bias", [self.hidden], [(0, 1)])
        for part in experts.layout.parts:
            rows = [part.stored_rows(span, width) for span in spans]
            add(f"w13_{part.name}", rows, [part.stored_columns(self.hidden, d)], part.shape(width, d)[0])
            columns = [part.stored_columns(span, width) for span in spans]
            add(f"w2_{part.name}", [part.stored_rows(self.hidden, d)], columns)
        return pieces

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


@dataclass(frozen=True, slots=True)
class Piece:
    """What strips are of one parameter of stacked experts."""

    experts: Experts
    name: str
    """``w13_weight``"""
    slots: tuple[int, ...]
    """U slots: (3, 17, 384)."""
    indices: tuple[Tensor, ...]
    """Slots ``(U, 1, 1)``, rows ``(U or 1, R, 1)`` and columns ``(U or 1, 1, C)`` as they are stored, on its device."""

    def numbers(self) -> Tensor:
        """``(U, R, C)``, packed as they are; three calls of the device, which are not waited for."""
        stack = getattr(self.experts, self.name).detach()
        slots, rows, columns = self.indices
        # As integers: not every device copies every small float.
        numbers = rows_of(stack.view(_INTEGERS[stack.dtype.itemsize]))
        run = numbers.shape[-1]
        found_URC: Tensor = numbers[slots, rows, columns // run, columns % run].view(stack.dtype)
        return found_URC


def narrowed(layer: MoELayer, pieces: Sequence[Piece], numbers: Sequence[Tensor], routing: Routing) -> MoELayer:
    """`layer` with nothing but strips, the `numbers` of `pieces`, for tokens cut to `Strips.hidden`.

    An id of `routing` whose strip isn't there has to weigh nothing.
    """
    renumbered = {slot: i for i, slot in enumerate(pieces[0].slots)}
    ids_TK = torch.tensor([[renumbered.get(slot, 0) for slot in row] for row in routing.ids_TK.tolist()])
    narrow = routed(layer, routing._replace(ids_TK=ids_TK))
    narrow.experts = _cut(layer.experts, pieces, numbers)
    if layer.shared is not None and narrow.shared is not None:
        narrow.shared = shallow(narrow.shared)
        narrow.shared.experts = _cut(layer.shared.experts, pieces, numbers)
    return narrow


def _cut(experts: Experts, pieces: Sequence[Piece], numbers: Sequence[Tensor]) -> Experts:
    narrow = shallow(experts)
    for piece, held_URC in zip(pieces, numbers, strict=True):
        if piece.experts is experts:
            strip = held_URC.flatten(1) if piece.name.endswith("_bias") else held_URC
            narrow._parameters[piece.name] = nn.Parameter(strip, requires_grad=False)
    return narrow


def _places(count: int, layouts: Sequence[Layout], width: int, strip: int, draw: random.Random) -> list[Span]:
    """Some places of whole blocks; all of `width` where it has no more than one strip."""
    parts = [part for layout in layouts for part in layout.parts]
    sizes = (size for part in parts for size in (part.rows_per_item, part.columns_per_item) if size)
    size = math.lcm(*sizes, strip)
    if width < 2 * size:
        return [(0, width)] * count
    places = [size * draw.randrange(width // size) for _ in range(count)]
    return [(place, place + size) for place in places]


def _counted(spans: Sequence[Span]) -> Tensor:
    """The numbers in each of some spans of one size, ``(spans, size)``."""
    return torch.tensor([first for first, _ in spans])[:, None] + torch.arange(spans[0][1] - spans[0][0])
