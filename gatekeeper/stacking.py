"""Experts stacked in one tensor: where one expert's projection lies in it, as numbers; no tensor is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

KINDS = ("gate_up", "gate", "up", "down")
"""Tensors that may hold a projection of all experts at once."""
PROJECTIONS_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"gate_up": ("gate", "up"), "gate": ("gate",), "up": ("up",), "down": ("down",)}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One matrix (or vector) inside a tensor that holds those of all experts.

    Take item `item`, merge all axes behind its first (``(2F, D / 32, 16)`` to ``(2F, D / 2)``), swap rows and columns
    if `transposed`, and keep `rows`.
    """

    item: int
    """The expert: 3"""
    rows: range
    """Of gate and up in one: ``range(0, 2048)``, or ``range(0, 4096, 2)`` where they take turns."""
    transposed: bool
    """Whether the tensor has rows and columns the other way round."""

    def shape(self, tensor: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the matrix in a tensor of this shape: ``(2048, 7168)``."""
        return (len(self.rows), *_item(tensor, self.transposed)[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacking:
    """How a family stacks its experts; `names.stacked` of its file."""

    module: str
    """The module that holds them, as exclude lists name it: ``experts``."""
    names: Mapping[str, str]
    """``gate_up`` (or ``gate`` and ``up``) and ``down`` to their names below the block: ``experts.gate_up_proj``."""
    transposed: bool | frozenset[str] | None = False
    """Whether the last two axes are swapped: in all parts, or in those with these suffixes; None: see `settled`."""
    interleaved: bool = False
    """Whether the rows of gate and up take turns in ``gate_up``, gate first."""
    usual: bool = False
    """Whether its authors publish them so; else they may be saved so again, and config.json announces single ones."""

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Stacking:
        """Read `names.stacked` of a family whose shape was checked."""
        transposed = data.get("transposed", False)
        transposed = None if transposed == "by_shape" else transposed
        return cls(
            module=data["module"],
            names=MappingProxyType({kind: data[kind] for kind in KINDS if kind in data}),
            transposed=frozenset(transposed) if isinstance(transposed, list | tuple) else transposed,
            interleaved=data.get("interleaved", False),
            usual=data.get("usual", False),
        )

    def settled(self, shapes: Mapping[str, tuple[int, ...]]) -> Stacking:
        """This with `transposed` told by the shapes of the weights, by kind, where the family leaves it open.

        Swapped, ``gate_up`` ``(E, D, 2F)`` has twice the columns that ``down`` ``(E, F, D)`` has rows; as they stand,
        ``(E, 2F, D)`` and ``(E, D, F)``, it has as many. Never do both hold, whatever the sizes.
        """
        if self.transposed is not None:
            return self
        gate_up, down = shapes.get("gate_up", ()), shapes.get("down", ())
        return replace(self, transposed=len(gate_up) == len(down) == 3 and gate_up[2] == 2 * down[1])

    def name_of(self, projection: str) -> str:
        """The tensor that holds a projection of all experts: ``experts.gate_up_proj`` for ``up``."""
        return next(name for kind, name in self.names.items() if projection in PROJECTIONS_OF[kind])

    def view(self, kind: str, projection: str, suffix: str, tensor: tuple[int, ...], expert: int) -> View | None:
        """Where `projection` of `expert` is in the part `suffix` of tensor `kind`; None where it can't be cut out."""
        if len(tensor) < 2 or not expert < tensor[0]:
            return None
        swapped = suffix in self.transposed if isinstance(self.transposed, frozenset) else self.transposed
        swapped = bool(swapped) and len(tensor) > 2
        rows = _item(tensor, swapped)[0]
        if kind != "gate_up":
            return View(item=expert, rows=range(rows), transposed=swapped)
        if rows % 2:
            return None
        second = projection == "up"
        turns = range(second, rows, 2)
        halves = range(rows // 2, rows) if second else range(rows // 2)
        return View(item=expert, rows=turns if self.interleaved else halves, transposed=swapped)


def _item(tensor: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """Shape of one expert's item as a matrix, or as a vector where it has one axis."""
    matrix = (tensor[1], prod(tensor[2:])) if len(tensor) > 2 else tensor[1:]
    return matrix[::-1] if transposed else matrix
