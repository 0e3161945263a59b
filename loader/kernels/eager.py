"""The oracle: one expert after the other, each on the tokens that chose it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from loader.kernels.base import ExpertWeights


def expert_mlp(
    x_TD: Tensor,
    w13_2FD: Tensor,
    w2_DF: Tensor,
    gated: Callable[[Tensor, Tensor], Tensor],
    b13_2F: Tensor | None = None,
    b2_D: Tensor | None = None,
) -> Tensor:
    """One expert, ``(T, D)``, before the router weight; `w13_2FD` is gate rows, then up rows."""
    gate_TF, up_TF = F.linear(x_TD, w13_2FD, b13_2F).chunk(2, dim=-1)
    return F.linear(gated(gate_TF, up_TF), w2_DF, b2_D)


def eager(x_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor, weights: ExpertWeights) -> Tensor:
    """See `Kernel`; only the experts that some token chose are dequantized, one at a time."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in topk_ids_TK.unique():
        tokens, slots = (topk_ids_TK == expert).nonzero(as_tuple=True)
        w13_12FD, w2_1DF = weights.dequantize(expert.view(1), x_TD.dtype)
        b13_12F, b2_1D = weights.biases(expert.view(1), x_TD.dtype)
        mlp = partial(
            expert_mlp,
            w13_2FD=w13_12FD[0],
            w2_DF=w2_1DF[0],
            gated=weights.config.gated,
            b13_2F=None if b13_12F is None else b13_12F[0],
            b2_D=None if b2_1D is None else b2_1D[0],
        )
        weight_P1 = topk_weights_TK[tokens, slots, None].float()
        y_TD.index_add_(0, tokens, weights.config.weigh(mlp, x_TD[tokens], weight_P1))
    return y_TD
