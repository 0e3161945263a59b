"""``torch.nn.functional.grouped_mm``: tokens sorted by expert, one GEMM over all experts of a batch of them."""

from __future__ import annotations

from collections.abc import Callable

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
        mlp = _grouped_mlp(weights, experts_U, counts_U, ends_U.to(torch.int32))
        weight_P1 = topk_weights_TK.flatten()[pairs_P, None].float()
        y_TD.index_add_(0, tokens_P, weights.config.weigh(mlp, x_TD[tokens_P], weight_P1))
    return y_TD


def _grouped_mlp(
    weights: ExpertWeights, experts_U: Tensor, counts_U: Tensor, ends_U: Tensor
) -> Callable[[Tensor], Tensor]:
    """All experts at once, on rows that are sorted by expert: `counts_U` for each, ending before `ends_U`."""

    def mlp(x_PD: Tensor) -> Tensor:
        w13_U2FD, w2_UDF = weights.dequantize(experts_U, x_PD.dtype)
        b13_U2F, b2_UD = weights.biases(experts_U, x_PD.dtype)
        gate_PF, up_PF = linear(x_PD, w13_U2FD, b13_U2F).chunk(2, dim=-1)
        return linear(weights.config.gated(gate_PF, up_PF), w2_UDF, b2_UD)

    def linear(x_PI: Tensor, w_UOI: Tensor, b_UO: Tensor | None) -> Tensor:
        y_PO = F.grouped_mm(x_PI, w_UOI.transpose(-2, -1), offs=ends_U)  # its own bias takes none yet (torch 2.13)
        return y_PO if b_UO is None else y_PO + b_UO.repeat_interleave(counts_U, 0)

    return mlp
