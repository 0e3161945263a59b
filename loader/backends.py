"""Compare the kernels of a layer's backend with `eager`, on the layer as it is loaded: do fast kernels compute right?

Once for each kind of layer, as layers that differ in their numbers alone run the same kernels. Where the layer is on a
GPU it is the whole layer, in the dtype that an engine runs, so that what is compiled for it is what serving needs. On a
CPU, where nothing is compiled and a whole expert takes half a second, strips of experts do.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from loader.activation import ExpertConfig
from loader.checkpoint import DTYPES
from loader.formats.bf16 import Dense
from loader.kernels.base import ExpertWeights
from loader.kernels.configs import ON_TRITON
from loader.kernels.eager import eager
from loader.moe import Experts, MoELayer
from loader.plan import LayerPlan
from loader.twins import by_kernel, shallow


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
    dense = {DTYPES[layout.parts[0].dtype] for layout in layouts if isinstance(layout.format, Dense)}
    if plan.backend not in ON_TRITON or not dense:
        return torch.bfloat16
    return dense.pop() if len(dense) == 1 else torch.float32


def outputs(layer: MoELayer, plan: LayerPlan, x_TD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `layer` comes to in `dtype`, and by `eager` in float32; ``(T, D)`` in float64 on the CPU."""
    reference = rounding if plan.backend in ON_TRITON else eager
    found = torch.stack([layer(x_TD.to(dtype)).float(), by_kernel(layer, reference)(x_TD.float())])
    actual_TD, expected_TD = found.cpu().double()
    return actual_TD, expected_TD


def rounding(x_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """`eager`, but what goes into a product of FP8 blocks is rounded to E4M3 before, as our Triton kernels do it.

    Without that, the roundings alone would be up to 30 % of an output, and hide a kernel that is wrong.
    """
    if weights.layout.name != "fp8_block":
        return eager(x_TD, topk_weights_TK, topk_ids_TK, weights)
    assert isinstance(weights, Experts)
    twin, config = shallow(weights), weights.config
    twin.config = _Rounding(**{field.name: getattr(config, field.name) for field in fields(config)})
    return eager(e4m3(x_TD), topk_weights_TK, topk_ids_TK, twin)


class _Rounding(ExpertConfig):
    def gated(self, gate_PF: Tensor, up_PF: Tensor) -> Tensor:
        return e4m3(ExpertConfig.gated(self, gate_PF, up_PF).bfloat16().float())


def e4m3(rows: Tensor) -> Tensor:
    """Rows ``(..., C)`` in float32, rounded to E4M3 with a scale to each 128 columns (arXiv 2412.19437, 3.3)."""
    columns = rows.shape[-1]
    blocks = F.pad(rows, (0, -columns % 128)).unflatten(-1, (-1, 128))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10) / torch.finfo(torch.float8_e4m3fn).max
    rounded: Tensor = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)[..., :columns]
