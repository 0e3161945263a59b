"""The oracle: one expert after the other, each on the tokens that chose it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loader.kernels.base import ExpertWeights


def expert_mlp(x_TD: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    """SwiGLU of one expert, ``(T, D)``, before the router weight; `w13_2FD` is gate rows, then up rows."""
    gate_TF, up_TF = F.linear(x_TD, w13_2FD).chunk(2, dim=-1)
    return F.linear(F.silu(gate_TF) * up_TF, w2_DF)


def eager(x_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """See `Kernel`; only the experts that some token chose are dequantized, one at a time."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in topk_ids_TK.unique():
        tokens, slots = (topk_ids_TK == expert).nonzero(as_tuple=True)
        w13_12FD, w2_1DF = weights.dequantize(expert.view(1), x_TD.dtype)
        out = expert_mlp(x_TD[tokens], w13_12FD[0], w2_1DF[0]).float()
        y_TD.index_add_(0, tokens, out * topk_weights_TK[tokens, slots, None].float())
    return y_TD
