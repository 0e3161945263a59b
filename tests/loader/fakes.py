"""Small stand-ins, so that plans can be tested without rules, files or tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gatekeeper import Family, Index, RuleSet, TensorInfo, load_rules
from loader.checkpoint import DTYPES
from loader.formats import layout_of

BYTES = {word: dtype.itemsize for word, dtype in DTYPES.items()}
WORDS = {dtype: word for word, dtype in DTYPES.items()}


def decided(
    on: Iterable[int], *, off: Iterable[int] = (), slots: int = 1, backend: str | None = None
) -> dict[str, Any]:
    """Decisions with fusion on in some layers and off in others."""

    def layer(index: int, state: str) -> SimpleNamespace:
        outputs = {"num_fused_shared_experts": slots if state == "on" else 0}
        return SimpleNamespace(index=index, state=state, option=None, outputs=outputs)

    layers = [layer(i, "on") for i in on] + [layer(i, "off") for i in off]
    common = {"runner": "target", "facts_used": {}, "option": None, "outputs": None}
    decisions = {"shared_experts_fusion": SimpleNamespace(**common, state="mixed", layers=layers)}
    if backend is not None:
        decisions["moe_backend"] = SimpleNamespace(**common | {"option": backend}, state="on", layers=None)
    for decision in decisions.values():
        decision.in_force = decision
    return decisions


def facts_of(runner: str = "target", **model: Any) -> SimpleNamespace:
    """Facts of a model, enough to plan with; `parallel__tp_size=8` is `parallel.tp_size`."""
    values = {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "hidden_act": "silu",
        **model,
    }
    named = {k.replace("__", ".") if "__" in k else f"model.{k}": v for k, v in values.items()}
    return SimpleNamespace(values=named, runner=runner)


@cache
def shipped() -> RuleSet:
    """The shipped rules, read once."""
    return load_rules()


def family(name: str = "deepseek_v3") -> Family:
    """A family as shipped."""
    return shipped().families[name]


def tensor(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    size = BYTES[dtype]
    for n in shape:
        size *= n
    return TensorInfo(name=name, dtype=dtype, shape=shape, shard="model.safetensors", start=0, end=size)


def projections(base: str, format_name: str, width: int, hidden: int) -> list[TensorInfo]:
    """All tensors of one MLP."""
    layout = layout_of(shipped().formats[format_name])
    noted = shipped().formats[format_name].signatures[0].suffix_of("shape")
    found = []
    for projection, (rows, columns) in {
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }.items():
        start = f"{base}.{projection}_proj."
        found += [tensor(f"{start}{p.suffix}", p.dtype, p.shapes(rows, columns)[0]) for p in layout.parts]
        if noted is not None:
            found.append(tensor(f"{start}{noted}", "I64", (2,)))
    return found


def layout(
    routed: str = "bf16",
    shared: str | None = "bf16",
    *,
    layers: Iterable[int] = (1, 2),
    experts: int = 4,
    hidden: int = 64,
    width: int = 32,
    n_shared: int = 1,
) -> dict[str, TensorInfo]:
    """The tensors of a DeepSeek-V3 checkpoint's MoE layers."""
    found: list[TensorInfo] = []
    for index in layers:
        base = f"model.layers.{index}.mlp"
        found.append(tensor(f"{base}.gate.weight", "BF16", (experts, hidden)))
        found.append(tensor(f"{base}.gate.e_score_correction_bias", "F32", (experts,)))
        for expert in range(experts):
            found += projections(f"{base}.experts.{expert}", routed, width, hidden)
        if shared is not None:
            found += projections(f"{base}.shared_experts", shared, n_shared * width, hidden)
    return {info.name: info for info in found}


def named_after(which: Family, *, experts: int = 4, hidden: int = 64, width: int = 32) -> dict[str, TensorInfo]:
    """The tensors of MoE layers 1 and 2 as a family names them, with one shared expert where it has one."""
    names, found = which.names, []
    for index in (1, 2):
        block = names.block("main", index, 0)
        found.append(tensor(f"{block}.{names.router}", "BF16", (experts, hidden)))
        if names.router_bias:
            found.append(tensor(f"{block}.{names.router_bias}", "F32", (experts,)))
        if names.shared_gate:
            found.append(tensor(f"{block}.{names.shared_gate}", "BF16", (1, hidden)))
        modules = [*names.routed_modules(block, range(experts)), *names.shared_modules(block)]
        down = (names.projections["down"], names.shared_projections["down"])
        found += [
            tensor(f"{module}.weight", "BF16", (hidden, width) if module.endswith(down) else (width, hidden))
            for module in modules
        ]
        if names.expert_bias:
            found += [
                tensor(f"{module}.{names.expert_bias}", "BF16", (hidden if module.endswith(down) else width,))
                for module in names.routed_modules(block, range(experts))
            ]
    return {info.name: info for info in found}


def index_of(tensors: Mapping[str, TensorInfo]) -> Index:
    return Index(folder=Path("nowhere"), tensors=dict(tensors))
