"""``torch.nn.functional.grouped_mm``: tokens sorted by expert, one GEMM over all experts of a batch of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loader.kernels.base import ExpertWeights

EXPERTS_AT_ONCE = 32
"""Experts dequantized together: bounds the memory for dequantized weights, 2.6 GiB at Kimi K2's widths."""


def grouped(x_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """See `Kernel`; rows of x and of the intermediate must be multiples of 16 bytes, as `grouped_mm` demands."""
    k = topk_ids_TK.shape[1]
    if not len(x_TD):
        return torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    order = topk_ids_TK.flatten().argsort(stable=True)  # pairs of token and slot, by expert
    experts, counts = topk_ids_TK.flatten().unique(return_counts=True)
    start = 0
    for experts_U, counts_U in zip(experts.split(EXPERTS_AT_ONCE), counts.split(EXPERTS_AT_ONCE), strict=True):
        ends_U = counts_U.cumsum(0)
        pairs_P = order[start : start + int(ends_U[-1])]
        start += len(pairs_P)
        tokens_P = pairs_P // k
        w13_U2FD, w2_UDF = weights.dequantize(experts_U, x_TD.dtype)
        out_PD = _grouped_mlp(x_TD[tokens_P], w13_U2FD, w2_UDF, ends_U.to(torch.int32))
        y_TD.index_add_(0, tokens_P, out_PD.float() * topk_weights_TK.flatten()[pairs_P, None].float())
    return y_TD


def _grouped_mlp(x_PD: Tensor, w13_U2FD: Tensor, w2_UDF: Tensor, ends_U: Tensor) -> Tensor:
    gate_PF, up_PF = F.grouped_mm(x_PD, w13_U2FD.transpose(-2, -1), offs=ends_U).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_PF) * up_PF, w2_UDF.transpose(-2, -1), offs=ends_U)
