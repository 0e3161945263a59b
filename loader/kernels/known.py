"""Ways to run the experts, behind one signature; which one is used is the decision of `moe_backend`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from loader.kernels.base import ExpertWeights, Kernel
from loader.kernels.eager import eager
from loader.kernels.grouped import grouped


def triton(x_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """See `Kernel`; with configurations of `weights.table`, or counted ones."""
    from loader.kernels.triton_backend import run  # Triton is installed where there is a GPU

    return run(x_TD, topk_weights_TK, topk_ids_TK, weights)


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {"eager": eager, "grouped_mm": grouped, "triton": triton, "triton_untuned": triton}
)
"""By the option's name in ``rules/features/moe_backend``."""
