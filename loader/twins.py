"""Layers that share the modules of another one, apart from what is replaced: for comparisons."""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from loader.kernels.base import Kernel
from loader.moe import MoELayer

M = TypeVar("M", bound=nn.Module)


class Routing(NamedTuple):
    """What the router, and the gate of a shared expert on its own, said of some tokens."""

    weights_TK: Tensor
    ids_TK: Tensor
    gate_T1: Tensor | None
    """None where there is no such gate."""

    @classmethod
    def of(cls, layer: MoELayer, x_TD: Tensor) -> Routing:
        """What `layer` says."""
        gate = None if layer.shared is None else layer.shared.gate
        weights_TK, ids_TK = layer.router(x_TD)
        return cls(weights_TK, ids_TK, None if gate is None else gate(x_TD))

    def first(self, tokens: int) -> Routing:
        """Of the first tokens alone."""
        gate_T1 = None if self.gate_T1 is None else self.gate_T1[:tokens]
        return Routing(self.weights_TK[:tokens], self.ids_TK[:tokens], gate_T1)


def routed(layer: MoELayer, routing: Routing) -> MoELayer:
    """`layer` for tokens of which is known where they go."""
    twin = shallow(layer)
    twin.router = _Fixed((routing.weights_TK, routing.ids_TK))
    if twin.shared is not None and routing.gate_T1 is not None:
        twin.shared = shallow(twin.shared)
        twin.shared._modules["gate"] = _Fixed(routing.gate_T1)
    return twin


def by_kernel(layer: MoELayer, kernel: Kernel) -> MoELayer:
    """`layer` with its experts computed by `kernel`."""
    twin = shallow(layer)
    twin.experts = shallow(twin.experts)
    twin.experts.kernel = kernel
    if twin.shared is not None:
        twin.shared = shallow(twin.shared)
        twin.shared.experts = shallow(twin.shared.experts)
        twin.shared.experts.kernel = kernel
    return twin


def shallow(module: M) -> M:
    """A copy whose submodules, parameters and attributes can be replaced without touching the original."""
    twin = copy.copy(module)
    twin._modules, twin._parameters = dict(module._modules), dict(module._parameters)
    return twin


class _Fixed(nn.Module):
    """A router, or the gate of a shared expert, that has already answered."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, x_TD: Tensor) -> object:
        return self._answer
