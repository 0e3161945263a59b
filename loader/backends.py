"""Compare the kernels of a layer's backend with `eager`, on the layer as it is loaded: do fast kernels compute right?

Once for each kind of layer, as layers that differ in their numbers alone run the same kernels. Where the layer is on a
GPU it is the whole layer, in the dtype that an engine runs, so that what is compiled for it is what serving needs. On a
CPU, where nothing is compiled and a whole expert takes half a second, strips of experts do.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loader.formats.bf16 import Dense
from loader.kernels import ON_TRITON
from loader.kernels.eager import eager
from loader.moe import MoELayer
from loader.plan import LayerPlan
from loader.twins import by_kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendCheck:
    """What comparing a backend with `eager` came to."""

    backend: str
    """``triton``"""
    dtype: str
    """That it computed in: ``bfloat16``."""
    figure: float
    """Largest difference over eager's largest number: 4.1e-3."""
    tolerance: float
    """What the figure may be at most."""
    tokens: int
    """Tokens compared."""
    whole: bool
    """Whether of whole experts; else of strips."""

    def text(self) -> str:
        """``backend triton against eager: 4.1e-03 off in bfloat16 (allowed 6.3e-02)``"""
        what = "" if self.whole else ", on strips of experts"
        off = f"{self.figure:.1e} off in {self.dtype} (allowed {self.tolerance:.1e})"
        return f"backend {self.backend} against eager: {off}{what}"


def kind_of(plan: LayerPlan) -> Hashable:
    """What the kernels of a layer depend on: its plan, apart from names and from where its numbers are in files."""
    params = tuple((param.name.split(".", 2)[2], param.shape, param.dtype) for param in plan.params)
    return replace(plan, index=0, name="", role="main", params=(), placements=(), notes=(), unused=()), params


def compute_dtype(plan: LayerPlan) -> torch.dtype:
    """What an engine runs the layer in: bfloat16; the Triton kernels take what isn't quantized in its own dtype."""
    layouts = [plan.layout] + ([plan.shared_layout] if plan.shared_layout else [])
    dense = {layout.parts[0].dtype for layout in layouts if isinstance(layout.format, Dense)}
    if plan.backend not in ON_TRITON or not dense:
        return torch.bfloat16
    return dense.pop() if len(dense) == 1 else torch.float32


def fp8_roundings(plan: LayerPlan) -> int:
    """How often the backend rounds to E4M3: our Triton kernels of FP8 blocks do it with the inputs of two products."""
    return 2 if plan.backend in ON_TRITON and "fp8_block" in (plan.format, plan.shared_format) else 0


def outputs(layer: MoELayer, x_TD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `layer` comes to in `dtype`, and by `eager` in float32; ``(T, D)`` in float64 on the CPU."""
    found = torch.stack([layer(x_TD.to(dtype)).float(), by_kernel(layer, eager)(x_TD.float())])
    actual_TD, expected_TD = found.cpu().double()
    return actual_TD, expected_TD
