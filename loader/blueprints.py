"""What tiny checkpoints copy from the real ones: config keys, tensor prefixes, where the quantization config stands.

Values are those of the models' published config.json; sizes are replaced when a checkpoint is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """One family's shape."""

    source: str
    """The model it is copied from: ``moonshotai/Kimi-K2.5``."""
    config: Mapping[str, Any]
    """The language model's config."""
    wrapper: Mapping[str, Any] = field(default_factory=dict)
    """The config around ``text_config``; empty where there is none."""
    prefix: str = ""
    """Before ``model.layers`` and ``lm_head``: ``language_model.``."""
    router_bias: bool = True
    """Whether routers have ``e_score_correction_bias``."""
    quantization_inside: frozenset[str] = frozenset()
    """Methods whose quantization_config stands in text_config, not at the top: ``compressed-tensors``."""

    @property
    def has_draft(self) -> bool:
        """Whether a draft (MTP) layer follows the decoder's layers."""
        return bool(self.config.get("num_nextn_predict_layers"))


_DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
}
_KIMI_K2: dict[str, Any] = _DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 163840,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "num_nextn_predict_layers": 0,
}
_DEEPSEEK_V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "torch_dtype": "bfloat16",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 102400,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 3,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "hidden_act": "silu",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
}

BLUEPRINTS: Mapping[str, Blueprint] = MappingProxyType(
    {
        "deepseek_v2": Blueprint(source="deepseek-ai/DeepSeek-V2", config=_DEEPSEEK_V2, router_bias=False),
        "deepseek_v3": Blueprint(source="deepseek-ai/DeepSeek-V3", config=_DEEPSEEK_V3),
        "deepseek_v32": Blueprint(
            source="deepseek-ai/DeepSeek-V3.2",
            config=_DEEPSEEK_V3 | {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"},
        ),
        "kimi_k2": Blueprint(source="moonshotai/Kimi-K2-Instruct", config=_KIMI_K2),
        "kimi_k25": Blueprint(
            source="moonshotai/Kimi-K2.5",
            config=_KIMI_K2,
            wrapper={
                "architectures": ["KimiK25ForConditionalGeneration"],
                "model_type": "kimi_k25",
                "dtype": "bfloat16",
                "tie_word_embeddings": False,
                "vision_config": {"mm_hidden_size": 1152, "patch_size": 14, "vt_num_hidden_layers": 27},
            },
            prefix="language_model.",
            quantization_inside=frozenset({"compressed-tensors"}),
        ),
        "glm4_moe": Blueprint(
            source="zai-org/GLM-4.5-Air",
            config={
                "architectures": ["Glm4MoeForCausalLM"],
                "model_type": "glm4_moe",
                "torch_dtype": "bfloat16",
                "hidden_size": 4096,
                "intermediate_size": 10944,
                "num_hidden_layers": 46,
                "num_attention_heads": 96,
                "num_key_value_heads": 8,
                "vocab_size": 151552,
                "moe_intermediate_size": 1408,
                "n_routed_experts": 128,
                "n_shared_experts": 1,
                "num_experts_per_tok": 8,
                "first_k_dense_replace": 1,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.0,
                "num_nextn_predict_layers": 1,
                "hidden_act": "silu",
                "tie_word_embeddings": False,
            },
        ),
    }
)
"""Family to what a checkpoint of it looks like."""


def quantization_config(
    format_name: str, shared_format: str, blueprint: Blueprint, layers: range, moe: range
) -> dict[str, Any] | None:
    """What the quantizer that writes `format_name` puts into config.json; None where nothing is quantized.

    `layers` are all decoder layers and `moe` those with experts, for exclude lists that name modules one by one.
    """
    base = f"{blueprint.prefix}model.layers"
    if format_name in _CT_WEIGHTS:
        return _compressed_tensors(format_name, shared_excluded=shared_format != format_name)
    if format_name in _MODELOPT_ALGOS:
        ignored = [f"{blueprint.prefix}lm_head", *(f"{base}.{layer}.self_attn*" for layer in layers)]
        ignored += [f"{base}.{layer}.mlp.gate" for layer in moe]
        if shared_format != format_name:
            dense = (layer for layer in layers if layer not in moe)
            ignored += [*(f"{base}.{n}.mlp*" for n in dense), *(f"{base}.{n}.mlp.shared_experts*" for n in moe)]
        return _modelopt(format_name, ignored)
    if format_name == "mxfp4":
        if shared_format != format_name:
            exclude = list(_SHARED_AND_DENSE_EXCLUDED)
        else:
            names = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
            exclude = [f"{blueprint.prefix}lm_head"]
            for layer in layers:
                exclude += [f"{base}.{layer}.self_attn.{name}" for name in names]
                exclude += [f"{base}.{layer}.mlp.gate"] if layer in moe else []
        return _quark(exclude)
    if "fp8_block" in (format_name, shared_format):
        config = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
        if format_name == shared_format:
            return config
        kept = "shared_experts" if format_name == "fp8_block" else "experts"
        return config | {"modules_to_not_convert": [f"{base}.{layer}.mlp.{kept}" for layer in moe]}
    return None


_SHARED_AND_DENSE_EXCLUDED = (
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
)


_CT_WEIGHTS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        "int4_g32": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
        "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "nvfp4_ct": (
            "nvfp4-pack-quantized",
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "scale_dtype": "torch.float8_e4m3fn",
            },
        ),
    }
)
"""Formats that compressed-tensors writes, to its name for the packing and what it says of the weights."""


def _compressed_tensors(format_name: str, *, shared_excluded: bool) -> dict[str, Any]:
    packing, own = _CT_WEIGHTS[format_name]
    weights: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "symmetric": True,
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights | own}
    return {
        "config_groups": {"group_0": group},
        "format": packing,
        "ignore": [e for e in _SHARED_AND_DENSE_EXCLUDED if shared_excluded or "shared" not in e],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


_MODELOPT_ALGOS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        "nvfp4": ("NVFP4", {"num_bits": 4, "type": "float", "group_size": 16}),
        "mxfp8": ("MXFP8", {"num_bits": 8, "type": "float", "group_size": 32}),
        "fp8_tensor": ("FP8", {"num_bits": 8, "type": "float"}),
    }
)
"""Formats that ModelOpt writes, to its name for the algorithm and what it says of the weights."""


def _modelopt(format_name: str, ignored: list[str]) -> dict[str, Any]:
    algo, numbers = _MODELOPT_ALGOS[format_name]
    tensors = {"dynamic": False} | numbers
    return {
        "config_groups": {"group_0": {"input_activations": tensors, "weights": tensors, "targets": ["Linear"]}},
        "ignore": ignored,
        "quant_algo": algo,
        "producer": {"name": "modelopt", "version": "0.41.0"},
        "quant_method": "modelopt",
    }


def _quark(exclude: list[str]) -> dict[str, Any]:
    spec = {
        "dtype": "fp4",
        "qscheme": "per_group",
        "group_size": 32,
        "ch_axis": -1,
        "is_dynamic": False,
        "scale_format": "e8m0",
        "scale_type": "float",
        "scale_calculation_mode": "even",
        "round_method": "half_even",
        "observer_cls": "PerBlockMXObserver",
    }
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": spec, "input_tensors": spec | {"is_dynamic": True}},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": exclude,
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
    }
