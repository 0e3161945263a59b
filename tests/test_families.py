"""Families: which one a model is, which of its layers have experts, and whose tensor is whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gatekeeper.checkpoint import Index, TensorInfo
from gatekeeper.errors import CheckpointError, FactError, RuleError
from gatekeeper.families import Family, overlaps, select_family
from gatekeeper.moe_tensors import MoeTensors, find_moe_layers
from gatekeeper.providers.config import settled
from gatekeeper.source import check_schema, parse_yaml, read_yaml
from gatekeeper.values import ABSENT, Values
from tests.shipped import CORPUS, RULES, catalogue, checked, families, family, read, write_config

V3: Values = {
    "model.num_hidden_layers": 4,
    "model.num_nextn_predict_layers": 1,
    "model.first_k_dense_replace": 1,
    "model.moe_layer_freq": 1,
    "model.n_routed_experts": 2,
}


def index_of(*names: str) -> Index:
    tensors = {n: TensorInfo(name=n, dtype="BF16", shape=(2, 2), shard="x", start=0, end=8) for n in names}
    return Index(folder=Path("x"), tensors=tensors)


def test_the_shipped_families_are_disjoint() -> None:
    assert overlaps(families()) == []


def test_two_families_that_match_alike() -> None:
    twins = [family("deepseek_v3"), Family.parse(document("deepseek_v3", family="copy"))]
    assert "families `deepseek_v3` and `copy` both match model_types `deepseek_v3`" in overlaps(twins)
    with pytest.raises(FactError, match="several families match this model"):
        select_family(twins, None, ["deepseek_v3"], None)


def document(name: str, **change: Any) -> dict[str, Any]:
    return {**read_yaml(RULES / "families" / f"{name}.yaml").data, **change}


@pytest.mark.parametrize(
    ("wrapper", "types", "architecture", "expected"),
    [
        ("KimiK25ForConditionalGeneration", ["deepseek_v3"], "DeepseekV3ForCausalLM", "kimi_k25"),
        # transformers 5 writes no architecture into text_config
        (None, ["deepseek_v3", "kimi_k25"], "Kimi_K25ForConditionalGeneration", "kimi_k25"),
        (None, ["kimi_k2"], "DeepseekV3ForCausalLM", "kimi_k2"),
        (None, [], "DeepseekV3ForCausalLM", "deepseek_v3"),
        ("SomeWrapper", ["something", "kimi_k2"], "DeepseekV3ForCausalLM", "kimi_k2"),
        (None, ["something"], "SomethingElse", None),
        (None, [], None, None),
    ],
)
def test_wrapper_beats_model_type_beats_architecture(
    wrapper: str | None, types: list[str], architecture: str | None, expected: str | None
) -> None:
    found = select_family(families(), wrapper, types, architecture)
    assert (found.name if found else None) == expected


@pytest.mark.parametrize(
    ("model", "main", "mtp"),
    [
        ("deepseek-ai__DeepSeek-V3", list(range(3, 61)), [61]),
        ("moonshotai__Kimi-K2.5", list(range(1, 61)), []),
        ("deepseek-ai__DeepSeek-V4-Flash", list(range(43)), [43]),
        ("meta-llama__Llama-4-Maverick-17B-128E-Instruct", list(range(1, 48, 2)), []),
        ("zai-org__GLM-5.2", list(range(3, 78)), [78]),
        ("poolside__Laguna-S-2.1-FP8", list(range(1, 48)), []),
        ("Qwen__Qwen3.5-35B-A3B", list(range(40)), [40]),
        ("meituan-longcat__LongCat-Flash-Chat", list(range(28)), []),
        ("stepfun-ai__Step-3.7-Flash", list(range(3, 45)), []),
        ("meta-models__Muse-Glimmer-30B", [], []),
    ],
)
def test_layers_with_experts(model: str, main: list[int], mtp: list[int]) -> None:
    found = read(CORPUS / model)
    assert found.family is not None
    numbers = found.family.layer_numbers(settled(catalogue(), found.readings))
    assert numbers is not None
    assert [index for role, index, _ in numbers if role == "main"] == main
    assert [index for role, index, _ in numbers if role == "mtp"] == mtp


def test_hybrid_layers_by_letter_and_by_word() -> None:
    values: dict[str, Any] = {"model.num_hidden_layers": 4, "model.hybrid_override_pattern": "ME*E"}
    assert [family("nemotron_h").is_moe_layer(i, {**values, "model.layers_block_type": ABSENT}) for i in range(4)] == [
        False,
        True,
        False,
        True,
    ]
    values["model.layers_block_type"] = ("moe", "mamba", "moe", "attention")
    assert [family("nemotron_h").is_moe_layer(i, values) for i in range(4)] == [True, False, True, False]


def test_layers_flagged_one_by_one(tmp_path: Path) -> None:
    """MiniMax M3 keeps a list under the key that is a number elsewhere."""
    text = {"architectures": ["MiniMaxM3SparseForCausalLM"], "num_hidden_layers": 3, "num_local_experts": 2}
    text |= {"moe_layer_freq": [0, 1, 1], "n_shared_experts": 1, "intermediate_size": 64, "hidden_size": 32}
    config = {"architectures": ["MiniMaxM3SparseForConditionalGeneration"], "text_config": text}
    found = read(write_config(tmp_path, config))
    assert found.family is not None
    assert found.family.name == "minimax_m3"
    assert found.layers is not None
    assert [layer["layer.index"].value for layer in found.layers] == [1, 2]
    assert found.readings["model.moe_layer_freq"].value is ABSENT


def test_an_unknown_fact_leaves_a_layer_unknown() -> None:
    assert family("deepseek_v3").is_moe_layer(3, {"model.moe_layer_freq": 1}) is None


def test_tensors_by_layer_expert_and_projection() -> None:
    prefix = "language_model.model.layers.3.mlp"
    found = find_moe_layers(
        index_of(
            f"{prefix}.experts.0.gate_proj.weight_packed",
            f"{prefix}.experts.0.gate_proj.weight_scale",
            f"{prefix}.experts.1.down_proj.weight_packed",
            f"{prefix}.shared_experts.up_proj.weight",
            f"{prefix}.gate.weight",
            f"{prefix}.gate.e_score_correction_bias",
            "language_model.model.layers.0.mlp.gate_proj.weight",
            "language_model.model.layers.3.self_attn.o_proj.weight",
            "vision_tower.layers.3.mlp.experts.0.up_proj.weight",
        ),
        family("kimi_k25"),
        {**V3, "model.num_nextn_predict_layers": 0},
    )
    assert [(one.index, one.name, one.role) for one in found] == [(3, prefix, "main")]
    one = found[0]
    assert set(one.routed[0]) == {"gate"}
    assert set(one.routed[0]["gate"]) == {"weight_packed", "weight_scale"}
    assert one.routed[1]["down"]["weight_packed"].name == f"{prefix}.experts.1.down_proj.weight_packed"
    assert one.shared is not None
    assert set(one.shared) == {"up"}
    assert one.router is not None
    assert one.router_bias is not None
    assert one.shared_gate is None


def test_draft_layers_under_the_same_prefix_and_their_own() -> None:
    index = index_of("model.layers.2.mlp.experts.0.up_proj.weight", "model.layers.4.mlp.experts.0.up_proj.weight")
    assert [(one.index, one.role) for one in find_moe_layers(index, family("deepseek_v3"), V3)] == [
        (2, "main"),
        (4, "mtp"),
    ]
    index = index_of("layers.2.ffn.experts.0.w1.weight", "mtp.0.ffn.experts.0.w2.scale")
    assert [(one.index, one.name, one.role) for one in find_moe_layers(index, family("deepseek_v4"), V3)] == [
        (2, "layers.2.ffn", "main"),
        (4, "mtp.0.ffn", "mtp"),
    ]


def test_missing_experts_keep_their_places() -> None:
    index = index_of("model.layers.2.mlp.experts.2.up_proj.weight")
    (one,) = find_moe_layers(index, family("deepseek_v3"), {**V3, "model.n_routed_experts": 5})
    assert [bool(expert) for expert in one.routed] == [False, False, True, False, False]


def test_stacked_experts() -> None:
    prefix = "model.language_model.layers.0.mlp"
    names = ("experts.gate_up_proj", "experts.down_proj", "shared_expert.up_proj.weight", "shared_expert_gate.weight")
    (one,) = find_moe_layers(index_of(*(f"{prefix}.{n}" for n in names)), family("qwen3_5_moe"), V3)
    assert one.routed == ()
    assert set(one.stacked) == {"gate_up", "down"}
    assert set(one.stacked["down"]) == {"weight"}
    assert one.shared_gate is not None


def test_the_shared_gate_is_no_shared_expert() -> None:
    prefix = "model.layers.0.mlp"
    index = index_of(f"{prefix}.experts.0.up_proj.weight", f"{prefix}.shared_expert_gate.weight")
    (one,) = find_moe_layers(index, family("qwen2_moe"), V3)
    assert one.shared is None
    assert one.shared_gate is not None


def test_one_layer_under_two_names() -> None:
    index = index_of(
        "model.layers.2.mlp.experts.0.up_proj.weight", "language_model.model.layers.2.mlp.experts.1.up_proj.weight"
    )
    with pytest.raises(CheckpointError, match="one layer has one name"):
        find_moe_layers(index, family("kimi_k25"), V3)


def test_an_expert_that_can_not_be() -> None:
    index = index_of("model.layers.2.mlp.experts.999999999.up_proj.weight")
    with pytest.raises(CheckpointError, match="expert 999999999"):
        find_moe_layers(index, family("deepseek_v3"), V3)


@pytest.mark.parametrize("path", sorted((RULES / "families").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_family_fits_its_schema_and_the_catalogue(path: Path) -> None:
    assert check_schema(read_yaml(path), "family") == []
    one = family(path.stem)
    assert {n for n in one.moe_layer.names if n != "layer.index"} <= catalogue().keys()
    assert {*one.from_, *one.facts} <= catalogue().keys()
    # Configs leave it out where it is their class's own, and experts with a guessed one compute nonsense.
    assert "model.hidden_act" in one.facts
    for name, value in one.facts.items():
        catalogue().coerce(name, value)
    assert set(one.names.projections) in ({"gate", "up", "down"}, {"up", "down"})
    assert bool(one.names.routed) or bool(one.names.stacked)
    if not one.names.shared:
        assert "shared_experts_fusion" in one.gateless


@pytest.mark.parametrize(
    ("change", "into"),
    [
        ("moe_layer: layer.index", "moe_layer: layer.index +"),
        ("family: deepseek_v3", "famliy: deepseek_v3"),
        ("group_score: top2_sum", "group_score: top3_sum"),
        ("layers: [", "lairs: ["),
    ],
)
def test_a_broken_family_file_is_a_fault(change: str, into: str) -> None:
    text = (RULES / "families" / "deepseek_v3.yaml").read_text("utf-8")
    assert change in text
    with pytest.raises(RuleError):
        Family.parse(checked(parse_yaml(text.replace(change, into, 1), "families/deepseek_v3.yaml"), "family"))


TABLE: dict[str, Any] = read_yaml(RULES.parent / "tests" / "families.yaml").data


def test_every_family_has_its_row() -> None:
    assert set(TABLE) == {one.name for one in families()}


@pytest.mark.parametrize("name", TABLE)
def test_which_layers_have_experts(name: str) -> None:
    values: dict[str, Any] = dict.fromkeys(family(name).moe_layer.names, ABSENT)
    values |= {f"model.{fact}": tuple(v) if isinstance(v, list) else v for fact, v in TABLE[name]["facts"].items()}
    numbers = family(name).layer_numbers(values)
    assert numbers is not None
    assert [index for role, index, _ in numbers if role == "main"] == TABLE[name]["main"]
    assert [index for role, index, _ in numbers if role == "mtp"] == TABLE[name]["mtp"]


@pytest.mark.parametrize("name", TABLE)
def test_what_each_tensor_is(name: str) -> None:
    expected, values = TABLE[name]["tensors"], {"model.num_hidden_layers": TABLE[name]["facts"]["num_hidden_layers"]}
    layers = find_moe_layers(index_of(*expected), family(name), values)
    found = {tensor: what for one in layers for what, tensor in described(one)}
    assert {tensor: found.get(tensor, "nothing") for tensor in expected} == expected


def described(one: MoeTensors) -> list[tuple[str, str]]:
    """Everything in one layer, in the table's words, with the tensor's name."""
    draft = "mtp " if one.role == "mtp" else ""
    found = [
        (f"{draft}routed {expert} {projection}", info.name)
        for expert, projections in enumerate(one.routed)
        for projection, parts in projections.items()
        for info in parts.values()
    ]
    found += [(f"{draft}stacked {kind}", info.name) for kind, parts in one.stacked.items() for info in parts.values()]
    found += [(f"{draft}bias {kind}", info.name) for kind, info in one.stacked_bias.items()]
    found += [
        (f"{draft}bias {expert} {projection}", info.name)
        for expert, biases in enumerate(one.routed_bias)
        for projection, info in biases.items()
    ]
    found += [(f"{draft}shared {p}", info.name) for p, parts in (one.shared or {}).items() for info in parts.values()]
    singles = {"router": one.router, "router_bias": one.router_bias, "shared_gate": one.shared_gate}
    return found + [(f"{draft}{what}", info.name) for what, info in singles.items() if info is not None]
