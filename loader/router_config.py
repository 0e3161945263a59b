"""How tokens choose experts: data, the same for the router in torch and for its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How a family chooses experts and weighs them."""

    scoring_func: Literal["softmax", "sigmoid"]
    """Logits to scores: ``sigmoid``."""
    top_k: int
    """Routed experts of a token: 8."""
    n_group: int = 1
    """Groups that the experts are in: 8; 1 means no groups."""
    topk_group: int = 1
    """Groups that a token may choose from: 4."""
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """What a group is worth: ``top2_sum`` with mask -inf (DeepSeek V3), or ``max`` with mask 0.0 (V2)."""
    norm_topk_prob: bool = True
    """Whether the chosen weights are divided by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed weights, never on the shared expert: 2.827."""
    scales_normalised: bool = True
    """Whether the factor also applies to weights divided by their sum; in DeepSeek V2 it is one or the other."""
    bias: Literal["choice", "logits"] = "choice"
    """What a bias is added to: the scores that choose experts, never those that weigh them; or the logits (gpt-oss)."""

    @property
    def bias_parameter(self) -> str:
        """What the bias is called in a plan: ``router.e_score_correction_bias``."""
        return "router.bias" if self.bias == "logits" else "router.e_score_correction_bias"
