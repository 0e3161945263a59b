"""Tiny models of each family, made and saved by transformers itself; imports it only when asked for one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
}
_V3 = _BASE | _LATENT | {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
_V3 |= {"routed_scaling_factor": 2.5, "first_k_dense_replace": 1}
_V2 = _V3 | {"n_shared_experts": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}
_GLM = _BASE | {"n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
_GLM |= {"first_k_dense_replace": 1}
_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_LATENT_GLM = {k: v for k, v in _GLM.items() if k != "first_k_dense_replace"} | _LATENT | _SPARSE
_QWEN = _BASE | {"num_experts": 8, "norm_topk_prob": True}
_GATED = _QWEN | _LINEAR | {"shared_expert_intermediate_size": 32}
_LOCAL = {k: v for k, v in _BASE.items() if k != "moe_intermediate_size"} | {"num_local_experts": 8}
_M3 = _LOCAL | {"n_shared_experts": 1, "shared_intermediate_size": 96, "moe_layer_freq": [0, 1, 1]}
_LLAMA = _LOCAL | {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 128, "num_experts_per_tok": 2}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
_KIMI_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_LLAMA_VISION = _KIMI_VISION | {"intermediate_size": 128, "vision_output_dim": 32}
_LLAMA_VISION |= {"projector_input_dim": 32, "projector_output_dim": 32}
_DEEP = {"deepstack_visual_indexes": [0]}
_LONG_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """One model."""

    family: str
    """Ours: ``kimi_k25``."""
    model_type: str
    """transformers' config class: ``deepseek_v3``."""
    config: Mapping[str, Any]
    moe_layers: tuple[int, ...] = (1, 2)
    fuses: bool = False
    """Whether its shared expert can fill slots: it has one, as wide as they are and computed as they are."""
    layouts: tuple[str, ...] = ("published", "stacked")
    """Experts as their authors name them, or as transformers has them in memory."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """What the authors' config.json says otherwise than transformers' class."""
    renamed: tuple[str, str] | None = None
    """A part of tensor names that the authors spell otherwise: ``(".blocks.", ".layers.")``."""


def _wrapped(text_type: str, text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    return {"text_config": {**text, "model_type": text_type}, "vision_config": dict(vision)}


ALL = (0, 1, 2)
MODELS: Mapping[str, Tiny] = {
    "DeepSeek-V2": Tiny(family="deepseek_v2", model_type="deepseek_v2", config=_V2, fuses=True),
    "DeepSeek-V3": Tiny(family="deepseek_v3", model_type="deepseek_v3", config=_V3, fuses=True),
    "DeepSeek-V3.2": Tiny(family="deepseek_v32", model_type="deepseek_v32", config=_V3, fuses=True),
    "Kimi-K2": Tiny(
        family="kimi_k2",
        model_type="deepseek_v3",
        config=_V3 | {"n_group": 1, "topk_group": 1},
        fuses=True,
        layouts=("published",),
        published={"model_type": "kimi_k2"},
    ),
    "Kimi-K2.5": Tiny(
        family="kimi_k25",
        model_type="kimi_k25",
        config=_wrapped("deepseek_v3", _V3, _KIMI_VISION),
        fuses=True,
        published={"architectures": ["KimiK25ForConditionalGeneration"]},
        renamed=(".blocks.", ".layers."),
    ),
    "Kimi-K2.5 resaved": Tiny(
        family="kimi_k25", model_type="kimi_k25", config=_wrapped("deepseek_v3", _V3, _KIMI_VISION), fuses=True
    ),
    "GLM-4.5": Tiny(family="glm4_moe", model_type="glm4_moe", config=_GLM, fuses=True),
    "GLM-4.5V": Tiny(
        family="glm4v_moe",
        model_type="glm4v_moe",
        config=_wrapped("glm4v_moe_text", _GLM | {"rope_parameters": _SECTIONS}, _VISION),
        fuses=True,
    ),
    "GLM-4.7-Flash": Tiny(family="glm4_moe_lite", model_type="glm4_moe_lite", config=_LATENT_GLM, fuses=True),
    "GLM-5": Tiny(
        family="glm_moe_dsa",
        model_type="glm_moe_dsa",
        config=_LATENT_GLM | {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8},
        fuses=True,
    ),
    "Qwen2-MoE": Tiny(
        family="qwen2_moe",
        model_type="qwen2_moe",
        config=_QWEN | {"shared_expert_intermediate_size": 128, "norm_topk_prob": False},
        moe_layers=ALL,
    ),
    "Qwen3-MoE": Tiny(family="qwen3_moe", model_type="qwen3_moe", config=_QWEN, moe_layers=ALL),
    "Qwen3-Next": Tiny(family="qwen3_next", model_type="qwen3_next", config=_GATED, moe_layers=ALL, fuses=True),
    "Qwen3.5-MoE": Tiny(
        family="qwen3_5_moe",
        model_type="qwen3_5_moe",
        config=_wrapped("qwen3_5_moe_text", _GATED, _VISION),
        moe_layers=ALL,
        fuses=True,
    ),
    "Qwen3-VL-MoE": Tiny(
        family="qwen3_vl_moe",
        model_type="qwen3_vl_moe",
        config=_wrapped("qwen3_vl_moe_text", _QWEN | {"rope_parameters": _LONG_SECTIONS}, _VISION | _DEEP),
        moe_layers=ALL,
    ),
    "Mixtral": Tiny(family="mixtral", model_type="mixtral", config=_LOCAL, moe_layers=ALL),
    "MiniMax-M2": Tiny(family="minimax_m2", model_type="minimax_m2", config=_LOCAL, moe_layers=ALL),
    "MiniMax-M3": Tiny(
        family="minimax_m3",
        model_type="minimax_m3_vl",
        config=_wrapped("minimax_m3_vl_text", _M3, _KIMI_VISION),
        fuses=True,
        layouts=("published",),  # in memory gate and up of the shared expert are one too
    ),
    "gpt-oss": Tiny(
        family="gpt_oss",
        model_type="gpt_oss",
        config=_LOCAL | {"layer_types": ["full_attention"] * 3},
        moe_layers=ALL,
    ),
    "Llama-4": Tiny(family="llama4", model_type="llama4_text", config=_LLAMA, moe_layers=ALL),
    "Llama-4 wrapped": Tiny(
        family="llama4", model_type="llama4", config=_wrapped("llama4_text", _LLAMA, _LLAMA_VISION), moe_layers=ALL
    ),
}
TOKENS = torch.arange(48).view(2, 24)


def make(tiny: Tiny, seed: int = 0) -> Any:
    """A model with random weights that bf16 has, of a size at which every layer matters to the logits."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(tiny.model_type, **tiny.config)
    wrapped = "text_config" in tiny.config
    auto = transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    draw = torch.Generator().manual_seed(seed)
    drawn = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction_bias" in n)]
    for name, tensor in drawn:
        if "norm" not in name:  # norms are born as ones
            size = 0.15 if tensor.dim() > 1 else 0.1
            tensor.data.copy_(size * torch.randn(tensor.shape, generator=draw))
    return model.to(torch.bfloat16).eval()


def read(folder: Path, **options: Any) -> Any:
    """The saved model, as transformers reads it, computing in float32."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    wrapped = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, **options).eval()


def blocks(model: nn.Module) -> dict[int, str]:
    """Layer number to the name of its MoE block: the child of a decoder layer that has experts."""
    named = ((re.search(r"layers\.(\d+)\.[^.]+$", name), name, module) for name, module in model.named_modules())
    return {int(match[1]): name for match, name, module in named if match and hasattr(module, "experts")}


class Replaced(nn.Module):
    """One of our layers in the place of a block, which some models expect to give a pair or flat tokens."""

    def __init__(self, layer: nn.Module, like: object) -> None:
        super().__init__()
        self.layer, self.like = layer, like

    def forward(self, x: Tensor, *_: object, **__: object) -> object:
        """What the block would give, without the router's scores, which only training reads."""
        y = self.layer(x)
        if isinstance(self.like, tuple):
            return y.reshape(self.like[0].shape), None
        return y
