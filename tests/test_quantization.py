"""quantization_config: its three places, its lists, and the storage that it announces layer by layer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gatekeeper.errors import FactError
from gatekeeper.names import excluded, matcher
from gatekeeper.providers.config import settled
from gatekeeper.values import ABSENT, Reading
from tests.shipped import CORPUS, catalogue, read, values, write_config

ROWS = yaml.safe_load((CORPUS / "rows.yaml").read_text("utf-8"))["rows"]
MODEL = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "hidden_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 1,
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
Layer = Mapping[str, Reading]


def layers_of(folder: Path, quantization: Any, hf_quant: Any = None, **more: Any) -> list[dict[str, Reading]]:
    config = {**MODEL, **more} | ({"quantization_config": quantization} if quantization is not None else {})
    layers = read(write_config(folder, config, hf_quant)).layers
    assert layers is not None
    return layers


def storage(layer: Layer, kind: str, field: str = "format") -> Any:
    record = layer[f"layer.{kind}_storage"].value
    return record.get(field, "unknown") if isinstance(record, Mapping) else record


def pair(layer: Layer) -> tuple[Any, Any]:
    return storage(layer, "routed"), storage(layer, "shared")


def first_reading(layer: Layer) -> str:
    """As the corpus's index puts it: formats only, whatever the widths."""
    if layer["layer.shared_storage"].value is ABSENT:
        return "no-shared"
    fields = ("format", "block", "scale_dtype")
    same = all(storage(layer, "routed", field) == storage(layer, "shared", field) for field in fields)
    return "same" if same else "differ"


@pytest.mark.parametrize("row", [r for r in ROWS if "unread" not in r], ids=lambda r: str(r["from"]))
def test_the_corpus_is_read_as_it_was_at_first(row: dict[str, Any]) -> None:
    """Formats and widths of every model against an independent first reading of the same files."""
    found = read(CORPUS / row["from"])
    expected = row["first_reading"]
    assert found.layers is not None
    main = [layer for layer in found.layers if layer["layer.role"].value == "main"]
    # A model without experts has no layers here, and "no shared expert" there.
    assert {first_reading(layer) for layer in main} in ({expected["routed_vs_shared_format"]}, set())
    assert {storage(layer, "routed", "width") for layer in main} in ({expected["routed_width"]}, set())
    if expected["shared_width"] is not None:
        slots = settled(catalogue(), found.readings)["model.n_shared_experts"]
        assert isinstance(slots, int)
        assert {storage(layer, "shared", "width") for layer in main} == {expected["shared_width"] // slots}


def test_rows_say_what_their_source_lacks() -> None:
    unread = {row["from"] for row in ROWS if "unread" in row}
    assert unread == {row["from"] for row in ROWS if row["first_reading"]["routed_vs_shared_format"] == "unknown"}
    assert "moonshotai__Kimi-K2-Thinking" in unread


@pytest.mark.parametrize(
    ("model", "role", "expected"),
    [
        ("moonshotai__Kimi-K2.5", "main", ("int4_g32", "bf16", "false", "true")),
        ("amd__Kimi-K2.5-MXFP4", "main", ("mxfp4", "mxfp4", "false", "false")),
        ("amd__Kimi-K2.5-MXFP4@b071bc6f", "main", ("mxfp4", "bf16", "false", "true")),
        ("deepseek-ai__DeepSeek-V4-Flash", "main", ("mxfp4", "fp8_block", "false", "false")),
        ("nvidia__DeepSeek-V4-Pro-NVFP4", "main", ("nvfp4", "fp8_block", "false", "true")),
        ("nvidia__DeepSeek-V3-0324-NVFP4", "main", ("nvfp4", "nvfp4", "false", "false")),
        ("nvidia__DeepSeek-V3-0324-NVFP4", "mtp", ("bf16", "bf16", "true", "true")),
        ("nvidia__Qwen3.6-35B-A3B-NVFP4", "main", ("nvfp4", "nvfp4", "false", "false")),
        ("nvidia__Qwen3.6-35B-A3B-NVFP4", "mtp", ("bf16", "bf16", "true", "true")),
        ("nvidia__Qwen3.5-397B-A17B-NVFP4", "main", ("nvfp4", "bf16", "false", "true")),
        ("zai-org__GLM-5-FP8", "mtp", ("fp8_block", "fp8_block", "false", "false")),
        ("poolside__Laguna-S-2.1-FP8", "main", ("fp8_block", "bf16", "false", "true")),
        ("RedHatAI__DeepSeek-V4-Flash-NVFP4-FP8", "main", ("nvfp4_ct", "nvfp4_ct", "false", "false")),
        ("openai__gpt-oss-120b", "main", ("mxfp4", ABSENT, "false", ABSENT)),
    ],
)
def test_layers_of_real_models(model: str, role: str, expected: tuple[Any, ...]) -> None:
    layers = read(CORPUS / model).layers
    assert layers is not None
    mine = [layer for layer in layers if layer["layer.role"].value == role]
    assert mine
    found = {(*pair(one), one["layer.routed_excluded"].value, one["layer.shared_excluded"].value) for one in mine}
    assert found == {expected}


def test_three_places_in_order(tmp_path: Path) -> None:
    hf_quant = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    top = {"quant_method": "quark", "exclude": []}
    config: dict[str, Any] = {
        "architectures": ["X"],
        "text_config": {**MODEL, "quantization_config": FP8},
        "quantization_config": top,
    }
    facts = read(write_config(tmp_path / "a", config, hf_quant)).readings
    assert (facts["quant.method"].value, facts["quant.method"].witness) == (
        "fp8",
        "config.json: text_config.quantization_config.quant_method",
    )
    config["text_config"] = MODEL
    facts = read(write_config(tmp_path / "b", config, hf_quant)).readings
    assert facts["quant.method"].value == "quark"
    del config["quantization_config"]
    facts = read(write_config(tmp_path / "c", config, hf_quant)).readings
    assert values({n: facts[n] for n in ("quant.method", "quant.algo", "quant.ignored_modules")}) == {
        "quant.method": "modelopt",
        "quant.algo": "NVFP4",
        "quant.ignored_modules": ("lm_head",),
    }
    assert facts["quant.algo"].witness == "hf_quant_config.json: quantization.quant_algo"


def test_no_quantization_is_the_models_dtype(tmp_path: Path) -> None:
    for dtype, expected in (("float16", "fp16"), ("bfloat16", "bf16")):
        layer = layers_of(tmp_path / dtype, None, dtype=dtype)[0]
        assert pair(layer) == (expected, expected)
        assert storage(layer, "routed", "block") is ABSENT
    facts = read(tmp_path / "float16").readings
    assert facts["quant.method"].value is ABSENT
    assert settled(catalogue(), facts)["quant.method"] == "none"


def test_a_method_is_spelt_one_way(tmp_path: Path) -> None:
    config = {**MODEL, "quantization_config": {"quant_method": "Compressed_Tensors"}}
    assert read(write_config(tmp_path, config)).readings["quant.method"].value == "compressed-tensors"


def ct(**weights: Any) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    form = weights.pop("format", "pack-quantized")
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": base | weights}},
    }


def quark(**weight: Any) -> dict[str, Any]:
    base = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    return {"quant_method": "quark", "global_quant_config": {"weight": base | weight}, "exclude": []}


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (FP8, "fp8_block"),
        ({"quant_method": "fp8"}, "fp8_tensor"),
        ({"quant_method": "fp8", "weight_block_size": [1, 32]}, "mxfp8"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "unknown"),
        (ct(), "int4_g32"),
        (ct(group_size=128), "unknown"),
        (ct(symmetric=False), "unknown"),
        (ct(actorder="group"), "unknown"),
        (ct(num_bits=8, format="int-quantized"), "unknown"),
        (ct(type="float", group_size=16, format="nvfp4-pack-quantized"), "nvfp4_ct"),
        (ct(type="float", group_size=32, format="mxfp4-pack-quantized"), "mxfp4"),
        (ct(type="float", num_bits=8, strategy="channel", format="float-quantized"), "fp8_channel"),
        (ct(type="float", num_bits=8, strategy="tensor", format="float-quantized"), "fp8_tensor"),
        (
            ct(type="float", num_bits=8, strategy="block", block_structure=[128, 128], format="float-quantized"),
            "fp8_block",
        ),
        (quark(), "mxfp4"),
        (quark(dtype="int4"), "unknown"),
        (quark(dtype="fp8_e4m3", qscheme="per_tensor"), "fp8_tensor"),
        (quark(dtype="fp8_e4m3", qscheme="per_channel"), "fp8_channel"),
        ({"quant_method": "quark"}, "unknown"),
        ({"quant_method": "quark", "global_quant_config": {"weight": [{}, {}]}}, "unknown"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8_tensor"),
        ({"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}, "unknown"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "unknown"),
        ({"quant_method": "modelopt"}, "unknown"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "awq", "bits": 4}, "unknown"),
        ({"quant_method": "w4afp8"}, "unknown"),
    ],
)
def test_schemes(tmp_path: Path, quantization: Any, expected: str) -> None:
    """What isn't understood is unknown with a note, and never bf16; widths are known all the same."""
    layer = layers_of(tmp_path, quantization)[0]
    assert pair(layer) == (expected, expected)
    assert storage(layer, "routed", "width") == 256
    assert bool(layer["layer.routed_storage"].note) is (expected == "unknown")


def test_an_expert_dtype_is_of_the_routed_experts(tmp_path: Path) -> None:
    assert pair(layers_of(tmp_path / "a", FP8, expert_dtype="fp4")[0]) == ("mxfp4", "fp8_block")
    assert pair(layers_of(tmp_path / "b", FP8, expert_dtype="fp8")[0]) == ("fp8_block", "fp8_block")
    assert pair(layers_of(tmp_path / "c", FP8, expert_dtype="int3")[0]) == ("unknown", "fp8_block")


def test_one_layers_shared_expert_excluded(tmp_path: Path) -> None:
    quantization = {**FP8, "modules_to_not_convert": ["model.layers.2.mlp.shared_experts"]}
    main, mtp = layers_of(tmp_path, quantization)
    assert pair(main) == ("fp8_block", "fp8_block")
    assert pair(mtp) == ("fp8_block", "bf16")
    assert (mtp["layer.role"].value, mtp["layer.shared_excluded"].value) == ("mtp", "true")
    assert mtp["layer.shared_excluded"].witness == "config.json: quantization_config.modules_to_not_convert"


def test_part_of_an_expert_excluded_is_no_storage(tmp_path: Path) -> None:
    quantization = {**FP8, "modules_to_not_convert": ["model.layers.1.mlp.shared_experts.down_proj"]}
    main, _ = layers_of(tmp_path, quantization)
    assert main["layer.shared_excluded"].value == "partly"
    assert main["layer.shared_storage"].value is ABSENT
    assert "differ: bf16, fp8_block" in main["layer.shared_storage"].note


@pytest.mark.parametrize(
    "entry",
    [
        "model.layers.1.mlp.experts.2",
        "re:.*experts\\.2\\..*",
        "model.layers.*.mlp.experts.[2-3]",
        "re:.*\\.2\\.down_proj",
        # These name no expert, and tell those of one digit from those of more.
        "model.layers.*.mlp.experts.?",
        "re:.*experts\\.\\w\\..*",
        "re:.*experts\\...\\.down_proj",
        "re:.*experts\\.[^.]\\..*",
    ],
)
def test_one_expert_excluded_is_found_wherever_it_is(tmp_path: Path, entry: str) -> None:
    main, _ = layers_of(tmp_path, {**FP8, "modules_to_not_convert": [entry]}, n_routed_experts=300)
    assert main["layer.routed_excluded"].value == "partly"
    assert main["layer.routed_storage"].value is ABSENT


pieces = st.sampled_from(
    [
        "model",
        "layers",
        "mlp",
        "experts",
        "gate_proj",
        "down_proj",
        ".",
        r"\.",
        "*",
        ".*",
        "?",
        "[0-9]",
        r"\w",
        "1",
        "7",
    ]
)
entries = st.tuples(st.sampled_from(["", "*", "re:", "re:.*"]), st.lists(pieces, max_size=6)).map(
    lambda entry: entry[0] + "mlp.experts" + "".join(entry[1])
)


@given(st.sampled_from(["fp8", "quark", "modelopt"]), st.lists(entries, min_size=1, max_size=2))
def test_the_experts_that_are_looked_up_stand_for_all(
    tmp_path_factory: pytest.TempPathFactory, method: str, listed: list[str]
) -> None:
    names = [f"model.layers.1.mlp.experts.{e}.{p}_proj" for e in range(101) for p in ("gate", "up", "down")]
    try:
        expected = excluded(matcher(method, tuple(listed)), names)
    except FactError:  # no expression, or a costly one
        return
    folder = tmp_path_factory.mktemp("config")
    config = {"quant_method": method, "quant_algo": "FP8", "modules_to_not_convert": listed}
    main, _ = layers_of(folder, config, n_routed_experts=101)
    assert main["layer.routed_excluded"].value == str(expected).lower()


def test_quark_by_layer(tmp_path: Path) -> None:
    quantization = quark()
    quantization["layer_quant_config"] = {
        "*shared_experts*": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}
    }
    assert pair(layers_of(tmp_path, quantization)[0]) == ("mxfp4", "fp8_tensor")


FP8_WEIGHT = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}


def test_quark_by_expert(tmp_path: Path) -> None:
    """288 experts of a draft layer, listed leaf by leaf and never as one module (sgl-project/sglang#39779)."""
    leaves = [f"model.layers.2.mlp.experts.{e}.{p}_proj" for e in range(288) for p in ("gate", "up", "down")]
    quantization = quark() | {"layer_quant_config": dict.fromkeys(leaves, FP8_WEIGHT)}
    start = time.monotonic()
    main, mtp = layers_of(tmp_path / "a", quantization, n_routed_experts=288)
    assert time.monotonic() - start < 5
    assert pair(main) == ("mxfp4", "mxfp4")
    assert pair(mtp) == ("fp8_tensor", "mxfp4")
    quantization["layer_quant_config"] = dict.fromkeys(leaves[:-3], FP8_WEIGHT)
    main, mtp = layers_of(tmp_path / "b", quantization, n_routed_experts=288)
    assert pair(main) == ("mxfp4", "mxfp4")
    assert mtp["layer.routed_storage"].value is ABSENT
    assert "differ: fp8_tensor, mxfp4" in mtp["layer.routed_storage"].note


def test_a_name_of_its_own_counts_before_a_pattern(tmp_path: Path) -> None:
    quantization = quark() | {
        "layer_quant_config": {"*shared_experts*": FP8_WEIGHT, "*": {"weight": None}}
        | {
            f"model.layers.1.mlp.shared_experts.{p}_proj": quark()["global_quant_config"]
            for p in ("gate", "up", "down")
        }
    }
    main, mtp = layers_of(tmp_path, quantization)
    assert (pair(main), pair(mtp)) == (("bf16", "mxfp4"), ("bf16", "fp8_tensor"))


@pytest.mark.parametrize("listed", ["experts.17.down_proj", "language_model.model.layers.1.mlp.experts.17.down_proj"])
def test_one_leaf_of_one_expert(tmp_path: Path, listed: str) -> None:
    """By a run of segments or by the wrapper's name: one of 64 experts is another one, so the layer has no storage."""
    main, _ = layers_of(tmp_path, {**FP8, "modules_to_not_convert": [listed]}, n_routed_experts=64)
    assert main["layer.routed_excluded"].value == "partly"
    assert main["layer.routed_storage"].value is ABSENT


def test_compressed_tensors_by_group(tmp_path: Path) -> None:
    quantization = ct()
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    quantization["config_groups"]["group_1"] = {
        "targets": ["re:.*shared_experts.*"],
        "format": "float-quantized",
        "weights": fp8,
    }
    assert pair(layers_of(tmp_path / "a", quantization)[0]) == ("int4_g32", "fp8_channel")
    quantization["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    assert pair(layers_of(tmp_path / "b", quantization)[0]) == ("bf16", "fp8_channel")


def test_modelopt_by_layer(tmp_path: Path) -> None:
    listed = {"model.layers.1.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}}
    quantization = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": listed}
    main, mtp = layers_of(tmp_path, quantization)
    assert pair(main) == ("nvfp4", "bf16")
    assert pair(mtp) == ("bf16", "bf16")


def test_latent_experts_read_another_width(tmp_path: Path) -> None:
    layer = layers_of(tmp_path, None, moe_latent_size=128)[0]
    assert (storage(layer, "routed", "input_width"), storage(layer, "shared", "input_width")) == (128, 512)


def test_a_shared_width_that_can_not_be_cut(tmp_path: Path) -> None:
    layer = layers_of(tmp_path, None, n_shared_experts=2, shared_expert_intermediate_size=301)[0]
    assert layer["layer.shared_storage"].value is ABSENT
    assert "not divisible" in layer["layer.shared_storage"].note


def test_a_layer_without_shared_expert(tmp_path: Path) -> None:
    layer = layers_of(tmp_path, FP8, n_shared_experts=0)[0]
    assert layer["layer.shared_storage"].value is ABSENT
    assert layer["layer.shared_excluded"].value is ABSENT


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ([], "is not a mapping"),
        ({}, "`quant_method` is missing"),
        ({"quant_method": 3}, "`quant_method` is missing or no text"),
        ({**FP8, "modules_to_not_convert": "lm_head"}, "is not a list of module names"),
        ({**FP8, "modules_to_not_convert": [1]}, "is not a list of module names"),
        ({"quant_method": "quark", "exclude": ["re:("]}, "no regular expression"),
        ({"quant_method": "quark", "exclude": ["re:(a+)+"]}, "could take for ever"),
        ({"quant_method": "quark", "layer_quant_config": []}, None),
        ({"quant_method": "quark", "layer_quant_config": ["x"]}, "is not a mapping"),
        ({"quant_method": "modelopt", "quantized_layers": ["x"]}, "is not a mapping"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": 1}}, "is not a mapping of groups"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": [None], "weights": {}}}},
            "`targets` of `config_groups` is not a list of names",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": "Linear", "weights": {}}}},
            "`targets` of `config_groups` is not a list of names",
        ),
    ],
)
def test_broken_configs_say_so(tmp_path: Path, quantization: Any, says: str | None) -> None:
    if says is None:
        layers_of(tmp_path, quantization)
        return
    with pytest.raises(FactError, match=says):
        layers_of(tmp_path, quantization)
