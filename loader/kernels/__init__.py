"""Ways to run the experts, behind one signature; which one is used is the decision of `moe_backend`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from loader.kernels.base import ExpertWeights, Kernel
from loader.kernels.eager import eager
from loader.kernels.grouped import grouped

KERNELS: Mapping[str, Kernel] = MappingProxyType({"eager": eager, "grouped_mm": grouped})
"""By the option's name in ``rules/features/moe_backend``."""

__all__ = ["KERNELS", "ExpertWeights", "Kernel"]
