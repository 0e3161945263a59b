"""One MoE layer: router, routed experts, and the shared expert in a slot of theirs or on its own.

Shapes: T tokens, D hidden size, F moe_intermediate_size, E routed experts, S shared experts, K top_k, G groups,
U experts asked for at once. Everything is built on the meta device; weights arrive through a plan, and are
put in order for the kernels here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loader.activation import ExpertConfig
from loader.checkpoint import DTYPES
from loader.formats import Layout, dequantize_stacked
from loader.kernels.base import Kernel
from loader.kernels.tuned import Table
from loader.router_config import RouterConfig
from loader.runs import by_rows, lay_out, parts_in_runs


class Router(nn.Module):
    """Scores in float32 whatever the dtype of `x`; of two biases, one is of the logits, the other only chooses.

    Source: ``MoEGate`` in the modeling files of DeepSeek-V2 and DeepSeek-V3; arXiv 2412.19437, section 2.1.2. A softmax
    over the chosen logits alone (gpt-oss) is the softmax over all of them, divided by the sum of the chosen.
    """

    bias: nn.Parameter | None
    e_score_correction_bias: nn.Parameter | None

    def __init__(self, config: RouterConfig, weight_ED: nn.Parameter, bias_E: nn.Parameter | None) -> None:
        super().__init__()
        self.config = config
        self.weight = weight_ED
        of_logits = config.bias == "logits"
        self.register_parameter("bias", bias_E if of_logits else None)
        self.register_parameter("e_score_correction_bias", None if of_logits else bias_E)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """``topk_weights_TK`` in float32 and ``topk_ids_TK`` in int64."""
        logits_TE = F.linear(x_TD.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        scores_TE = logits_TE.sigmoid() if self.config.scoring_func == "sigmoid" else logits_TE.softmax(dim=-1)
        bias_E = self.e_score_correction_bias
        choice_TE = scores_TE if bias_E is None else scores_TE + bias_E.float()
        ids_TK = self._limit_to_groups(choice_TE).topk(self.config.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
            if not self.config.scales_normalised:
                return weights_TK, ids_TK
        return weights_TK * self.config.routed_scaling_factor, ids_TK

    def _limit_to_groups(self, choice_TE: Tensor) -> Tensor:
        c = self.config
        if c.n_group == 1:
            return choice_TE
        grouped_TGE: Tensor = choice_TE.unflatten(-1, (c.n_group, -1))
        if c.group_score == "top2_sum":
            group_TG = grouped_TGE.topk(2, dim=-1).values.sum(dim=-1)
        else:
            group_TG = grouped_TGE.amax(dim=-1)
        best = group_TG.topk(c.topk_group, dim=-1).indices
        closed_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, best, False)
        # A biased score may be below 0.0, so that V3's mask has to be -inf; V2's scores are positive.
        closed_score = float("-inf") if c.group_score == "top2_sum" else 0.0
        return grouped_TGE.masked_fill(closed_TG.unsqueeze(-1), closed_score).flatten(1)


class SharedSlotRouter(nn.Module):
    """A router whose tokens also go to the `n_shared` slots behind the routed ones, outside all normalisation.

    The routed weights carry routed_scaling_factor already, so the shared weight is 1, or sigmoid(gate(x)) with a gate.
    """

    def __init__(self, router: Router, n_shared: int, gate: SharedGate | None) -> None:
        super().__init__()
        self.router, self.n_shared, self.gate = router, n_shared, gate

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """``topk_weights`` and ``topk_ids``, both ``(T, K + S)``."""
        weights_TK, ids_TK = self.router(x_TD)
        first = self.router.weight.shape[0]
        slots_S = torch.arange(first, first + self.n_shared, device=x_TD.device)
        one_T1 = torch.ones_like(weights_TK[:, :1]) if self.gate is None else self.gate(x_TD)
        size = (x_TD.shape[0], self.n_shared)
        return torch.cat([weights_TK, one_T1.expand(size)], 1), torch.cat([ids_TK, slots_S.expand(size)], 1)


class SharedGate(nn.Module):
    """Qwen2-MoE's weight of the shared expert for each token: ``sigmoid(x @ w)``, ``(T, 1)`` in float32."""

    def __init__(self, weight_1D: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_1D

    def forward(self, x_TD: Tensor) -> Tensor:
        """The weight of each token."""
        return F.linear(x_TD.float(), self.weight.float()).sigmoid()


class Experts(nn.Module):
    """Stacked experts of one format: ``w13_<part>`` has gate rows, then up rows; ``w2_<part>`` is down.

    `biases` says which of ``w13_bias`` ``(E, 2F)`` and ``w2_bias`` ``(E, D)`` they have, and in which dtype.
    """

    w13_bias: nn.Parameter | None
    w2_bias: nn.Parameter | None

    def __init__(
        self,
        layout: Layout,
        *,
        n_experts: int,
        hidden_size: int,
        width: int,
        kernel: Kernel,
        config: ExpertConfig | None = None,
        biases: Mapping[str, torch.dtype] = MappingProxyType({}),
        n_shared: int = 0,
        dense_shared_from: int = 0,
    ) -> None:
        """The last `n_shared` of `n_experts` are shared experts' slots: see `ExpertWeights`."""
        super().__init__()
        self.layout, self.kernel = layout, kernel
        self.n_shared, self.dense_shared_from = n_shared, dense_shared_from
        self.table: Table | None = None
        self.is_part = False
        self.config = config or ExpertConfig()
        for name, size in (("w13_bias", 2 * width), ("w2_bias", hidden_size)):
            self.register_parameter(name, empty_parameter((n_experts, size), biases[name]) if name in biases else None)
        for part in layout.parts:
            rows, columns = part.shape(width, hidden_size)
            self._declare(f"w13_{part.name}", (n_experts, 2 * rows, columns), DTYPES[part.dtype])
            self._declare(f"w2_{part.name}", (n_experts, *part.shape(hidden_size, width)), DTYPES[part.dtype])

    def _declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_parameter(name, empty_parameter(shape, dtype))

    def lay_out(self) -> None:
        """Put scales of groups, as a checkpoint has them, into runs (`loader.runs`), in the same memory."""
        for part in parts_in_runs(self.layout):
            for name in (f"w13_{part.name}", f"w2_{part.name}"):
                scales = lay_out(getattr(self, name).detach())
                setattr(self, name, nn.Parameter(scales, requires_grad=False))

    def stacked(self, prefix: Literal["w13", "w2"]) -> dict[str, Tensor]:
        """The stored parts by role, packed as they are, ``(E, rows, columns)``; see `ExpertWeights`."""
        return {part.role: getattr(self, f"{prefix}_{part.name}") for part in self.layout.parts}

    def dequantize(self, experts_U: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``w13_U2FD`` and ``w2_UDF``; memory holds packed numbers only, apart from what this returns."""
        w13 = {role: by_rows(stored[experts_U]) for role, stored in self.stacked("w13").items()}
        w2 = {role: by_rows(stored[experts_U]) for role, stored in self.stacked("w2").items()}
        return (
            dequantize_stacked(self.layout, w13, dtype, stacked=2),
            dequantize_stacked(self.layout, w2, dtype, stacked=1),
        )

    def biases(self, experts_U: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """``b13_U2F`` and ``b2_UD``; None where the experts have none."""
        b13, b2 = (None if b is None else b[experts_U].to(dtype) for b in (self.w13_bias, self.w2_bias))
        return b13, b2

    def forward(self, x_TD: Tensor, topk_weights_TK: Tensor, topk_ids_TK: Tensor) -> Tensor:
        """Weighted sum over the chosen experts, ``(T, D)`` in float32 or the dtype of x."""
        return self.kernel(x_TD, topk_weights_TK, topk_ids_TK, self)


class SharedExpert(nn.Module):
    """A shared expert on its own: one MLP of width ``S * F`` in a stack of one, with its gate where there is one."""

    def __init__(self, experts: Experts, gate: SharedGate | None) -> None:
        super().__init__()
        self.experts, self.gate = experts, gate

    def forward(self, x_TD: Tensor) -> Tensor:
        """``(T, D)`` in float32 or the dtype of x."""
        weights_T1 = x_TD.new_ones(len(x_TD), 1, dtype=torch.float32) if self.gate is None else self.gate(x_TD)
        y_TD: Tensor = self.experts(x_TD, weights_T1, torch.zeros_like(weights_T1, dtype=torch.int64))
        return y_TD


class MoELayer(nn.Module):
    """Router and experts; `shared` is None where there is no shared expert or where it fills a slot of the stack."""

    def __init__(
        self, *, index: int, name: str, router: nn.Module, experts: Experts, shared: SharedExpert | None
    ) -> None:
        super().__init__()
        self.index, self.name = index, name
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to the same shape and dtype; the sum over experts is in float32."""
        x_TD = x.reshape(-1, x.shape[-1])
        weights_TK, ids_TK = self.router(x_TD)
        y_TD = self.experts(x_TD, weights_TK, ids_TK)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        y: Tensor = y_TD.to(x.dtype).reshape(x.shape)
        return y


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter on the meta device: it has a shape and no memory."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
