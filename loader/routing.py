"""What a model computes: how tokens choose experts, and what an expert is; from config.json and the family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatekeeper import ABSENT, CheckpointError, Family
from loader.activation import ACTIVATIONS, ExpertConfig
from loader.router_config import RouterConfig

TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
"""`topk_method` of DeepSeek's config.json; the first one ignores groups."""


def router_config(family: Family, values: Mapping[str, Any]) -> RouterConfig:
    """The router of a model with the facts `values`; raises `CheckpointError` for what this loader can't compute."""
    s = _Settings(family.router, values)
    problems: list[str] = []
    scoring = s.get("scoring_func", "softmax")
    if scoring not in ("softmax", "sigmoid"):
        problems.append(f"`scoring_func` is `{scoring}`; this loader has softmax and sigmoid")
    method = s.get("topk_method", "greedy")
    if method not in TOPK_METHODS:
        problems.append(f"`topk_method` is `{method}`; this loader has {', '.join(TOPK_METHODS)}")
    experts, top_k = values.get("model.n_routed_experts"), s.get("num_experts_per_tok", 0)
    n_group, topk_group = s.get("n_group", 1), s.get("topk_group", 1)
    score = "max" if s.get("group_score", "top2_sum") == "max" else "top2_sum"
    if method == "greedy":
        n_group = topk_group = 1
    if isinstance(experts, int):
        if n_group < 1 or experts % n_group or (n_group > 1 and score == "top2_sum" and experts // n_group < 2):
            problems.append(f"{experts} experts can't be in {n_group} groups")
        elif not 1 <= topk_group <= n_group or not 1 <= top_k <= experts // n_group * topk_group:
            problems.append(f"top {top_k} of {topk_group} groups out of {n_group} is impossible with {experts} experts")
    if problems:
        raise CheckpointError(f"family `{family.name}`: {'; '.join(problems)}")
    return RouterConfig(
        scoring_func=scoring,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        group_score="max" if score == "max" else "top2_sum",
        scales_normalised=bool(s.get("scales_normalised", True)),
        norm_topk_prob=bool(s.get("norm_topk_prob", False)),
        routed_scaling_factor=float(s.get("routed_scaling_factor", 1.0)),
        bias="logits" if s.get("bias", "choice") == "logits" else "choice",
    )


def expert_config(family: Family, values: Mapping[str, Any]) -> ExpertConfig:
    """What the experts of a model compute; raises `CheckpointError` for what this loader can't compute."""
    s = _Settings(family.experts, values)
    problems: list[str] = []
    hidden_act, limit, alpha = (s.get(name, None) for name in ("hidden_act", "swiglu_limit", "swiglu_alpha"))
    if hidden_act not in ACTIVATIONS:
        said = "said neither by the config nor by the family" if hidden_act is None else f"`{hidden_act}`"
        problems.append(f"`hidden_act` is {said}; this loader has {', '.join(ACTIVATIONS)}")
    if alpha is not None and hidden_act != "silu":
        problems.append(f"`swiglu_alpha` goes with silu, not with `{hidden_act}`")
    if s.get("swiglu_limits", None) is not None:
        problems.append("`swiglu_limits` is set; this loader has one limit for all layers")
    if s.get("moe_latent_size", None) is not None:
        problems.append("`moe_latent_size` is set; this loader has experts of hidden_size only")
    if problems:
        raise CheckpointError(f"family `{family.name}`: {'; '.join(problems)}")
    return ExpertConfig(
        hidden_act=hidden_act,
        limit=None if limit is None else float(limit),
        alpha=None if alpha is None else float(alpha),
        up_offset=float(s.get("up_offset", 0.0)),
        weighed="input" if s.get("weighed", "output") == "input" else "output",
    )


class _Settings:
    """What config.json says, else what a section of the family says, else what holds for all."""

    def __init__(self, section: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self.section, self.values = section, values

    def get(self, name: str, default: Any) -> Any:
        for value in (self.values.get(f"model.{name}"), self.section.get(name)):
            if value is not None and value is not ABSENT:
                return value
        return default
