"""The one signature of all kernels.

Shapes: T tokens, D hidden size, F intermediate size of a slot, K slots of a token, U experts asked for at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from loader.activation import ExpertConfig
from loader.formats import Layout
from loader.kernels.tuned import Table


class ExpertWeights(Protocol):
    """Where a kernel gets weights from: stacked and packed, dequantized for the experts it asks for."""

    config: ExpertConfig
    """What is computed between the projections, and where a token's weight comes in."""
    layout: Layout
    """How the weights are stored."""

    n_shared: int
    """Slots at the end that all tokens go to, by the last columns of their ids: shared experts."""
    is_part: bool
    """Whether slots of a token may be on other ranks, and weigh nothing here."""
    dense_shared_from: int
    """Tokens of a call from which those are better computed on their own; 0: never."""
    table: Table | None
    """Configurations measured on this device, for the kernels that have some."""

    @property
    def w13_bias(self) -> Tensor | None:
        """``(E, 2F)``; None where the experts have none."""

    @property
    def w2_bias(self) -> Tensor | None:
        """``(E, D)``; None where the experts have none."""

    def stacked(self, prefix: Literal["w13", "w2"]) -> Mapping[str, Tensor]:
        """The stored parts by role, packed as they are, ``(E, rows, columns)``; `w13` has gate rows, then up rows.

        Scales of groups may lie in runs, ``(E, runs, rows, run)`` (`loader.runs`).
        """

    def dequantize(self, experts_U: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``w13_U2FD`` (gate rows, then up rows) and ``w2_UDF`` of the experts with these ids."""

    def biases(self, experts_U: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """``b13_U2F`` and ``b2_UD`` of the experts with these ids; None where they have none."""


class Kernel(Protocol):
    """Computes all slots of all tokens."""

    def __call__(self, x_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, weights: ExpertWeights) -> Tensor:
        """Sum over K of weight times expert, ``(T, D)``: summed in float32, returned in float32 or the dtype of x."""
