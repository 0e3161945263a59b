"""The slow, obvious MoE: one token and one expert at a time, in float64, from plain weight matrices.

It shares nothing with `loader`: no packing, no stacking, no slots, no sorting of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How tokens choose experts."""

    scoring: str  # "softmax" or "sigmoid"
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"  # or "max"
    renormalise: bool = False
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """gate (F, D), up (F, D), down (D, F)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def __call__(self, x_D: Tensor) -> Tensor:
        gated = self.gate.double() @ x_D
        return self.down.double() @ (gated * torch.sigmoid(gated) * (self.up.double() @ x_D))


def moe(
    x_TD: Tensor,
    router_ED: Tensor,
    bias_E: Tensor | None,
    experts: Sequence[Mlp],
    shared: Mlp | None,
    routing: Routing,
    shared_gate_D: Tensor | None = None,
) -> Tensor:
    """Output of the layer, ``(T, D)`` in float64; the shared expert is added once, unscaled."""
    outputs = []
    for x_D in x_TD.double():
        y_D = torch.zeros_like(x_D)
        for expert, weight in choose(x_D, router_ED, bias_E, routing).items():
            y_D += weight * experts[expert](x_D)
        if shared is not None:
            factor = 1.0 if shared_gate_D is None else 1 / (1 + math.exp(-float(shared_gate_D.double() @ x_D)))
            y_D += factor * shared(x_D)
        outputs.append(y_D)
    return torch.stack(outputs)


def choose(x_D: Tensor, router_ED: Tensor, bias_E: Tensor | None, routing: Routing) -> dict[int, float]:
    """Expert to weight for one token."""
    logits = [float(row @ x_D) for row in router_ED.double()]
    if routing.scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        scores = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
    biased = [score + (0.0 if bias_E is None else float(bias_E[e])) for e, score in enumerate(scores)]
    allowed = set(range(len(scores)))
    if routing.n_group > 1:
        size = len(scores) // routing.n_group
        members = [list(range(g * size, (g + 1) * size)) for g in range(routing.n_group)]
        count = 2 if routing.group_score == "top2_sum" else 1
        worth = [sum(sorted((biased[e] for e in group), reverse=True)[:count]) for group in members]
        best = sorted(range(routing.n_group), key=lambda g: -worth[g])[: routing.topk_group]
        allowed = {e for g in best for e in members[g]}
    # V2's closed groups compete with 0.0, V3's don't compete at all; with positive scores that comes to the same.
    chosen = sorted(allowed, key=lambda e: -biased[e])[: routing.top_k]
    total = sum(scores[e] for e in chosen) if routing.renormalise else 1.0
    return {e: scores[e] / total * routing.scale for e in chosen}
