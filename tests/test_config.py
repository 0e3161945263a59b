"""config.json to facts: nesting, wrappers, spelling, families; and what is no config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gatekeeper.errors import CheckpointError, FactError
from gatekeeper.providers.config import load_config, settled
from gatekeeper.values import ABSENT
from tests.shipped import CORPUS, catalogue, read, values, write_config

ROWS = yaml.safe_load((CORPUS / "rows.yaml").read_text("utf-8"))["rows"]
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
}


def identity(target: Path) -> tuple[Any, ...]:
    facts = values(read(target).readings)
    return tuple(facts[f"model.{n}"] for n in ("architecture", "wrapper_architecture", "model_type", "family"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("moonshotai__Kimi-K2.5", ("DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration", "kimi_k2", "kimi_k25")),
        (
            "nvidia__Kimi-K2.5-NVFP4",
            ("DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration", "deepseek_v3", "kimi_k25"),
        ),
        ("moonshotai__Kimi-K2-Instruct", ("DeepseekV3ForCausalLM", ABSENT, "kimi_k2", "kimi_k2")),
        ("deepseek-ai__DeepSeek-V3", ("DeepseekV3ForCausalLM", ABSENT, "deepseek_v3", "deepseek_v3")),
        ("sgl-project__DeepSeek-V4-Flash-FP8", ("DeepseekV4ForCausalLM", ABSENT, "deepseek_ref", "deepseek_v4")),
        ("Qwen__Qwen3.5-35B-A3B", ("Qwen3_5MoeForConditionalGeneration", ABSENT, "qwen3_5_moe_text", "qwen3_5_moe")),
        ("zai-org__GLM-4.5V", ("Glm4vMoeForConditionalGeneration", ABSENT, "glm4v_moe", "glm4v_moe")),
    ],
)
def test_who_the_model_is(name: str, expected: tuple[Any, ...]) -> None:
    assert identity(CORPUS / name) == expected


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["from"]))
def test_every_model_of_the_corpus_has_a_family(row: dict[str, Any]) -> None:
    assert read(CORPUS / row["from"]).family is not None


def test_the_corpus_is_whole_and_its_own() -> None:
    folders = {path.name for path in CORPUS.iterdir() if path.is_dir()}
    assert folders == {row["from"] for row in ROWS}
    assert len(folders) == 71
    for path in CORPUS.glob("*/*.json"):
        assert not [key for key in json.loads(path.read_text("utf-8")) if key.startswith("_")], path


def test_nothing_is_mixed_from_two_levels(tmp_path: Path) -> None:
    config = {**V3, "hidden_size": 7, "text_config": {"num_hidden_layers": 1, "model_type": "deepseek_v3"}}
    facts = values(read(write_config(tmp_path, config)).readings)
    assert facts["model.hidden_size"] is ABSENT
    assert facts["model.n_routed_experts"] is ABSENT
    assert facts["model.num_hidden_layers"] == 1
    assert facts["model.architecture"] == "DeepseekV3ForCausalLM"


@pytest.mark.parametrize("nested", [3, [], "deepseek_v3"])
def test_a_nested_config_that_is_none_is_not_passed_over(nested: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**V3, "text_config": nested}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="`text_config` should hold the language model's config, a mapping"):
        load_config(path)


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config"])
def test_the_language_models_part(tmp_path: Path, key: str) -> None:
    reading = read(write_config(tmp_path, {"architectures": ["Wrapper"], key: V3})).readings
    assert reading["model.n_routed_experts"].value == 4
    assert reading["model.n_routed_experts"].witness == f"config.json: {key}.n_routed_experts"
    assert reading["model.wrapper_architecture"].value == "Wrapper"


def test_the_first_nested_config_counts(tmp_path: Path) -> None:
    config = {"llm_config": {"hidden_size": 1}, "text_config": {"hidden_size": 2}, "hidden_size": 3}
    assert read(write_config(tmp_path, config)).readings["model.hidden_size"].value == 2


def test_a_file_alone_is_a_target(tmp_path: Path) -> None:
    write_config(tmp_path, V3)
    assert identity(tmp_path / "config.json") == identity(tmp_path)


def test_null_and_remarks_are_absent(tmp_path: Path) -> None:
    facts = values(
        read(write_config(tmp_path, {**V3, "n_group": None, "_hidden_size": 3, "hidden_size": None})).readings
    )
    assert facts["model.n_group"] is ABSENT
    assert facts["model.hidden_size"] is ABSENT


def test_null_is_not_what_a_class_has_where_nothing_is_said(tmp_path: Path) -> None:
    silent = {key: value for key, value in V3.items() if key != "n_group"}
    for config, expected in ((silent, 8), ({**silent, "n_group": None}, ABSENT), ({**silent, "n_group": 4}, 4)):
        found = read(write_config(tmp_path, config)).readings["model.n_group"]
        assert found.value == expected if expected is not ABSENT else found.value is ABSENT, config
    assert read(write_config(tmp_path, silent)).readings["model.n_group"].witness.endswith("families/deepseek_v3.yaml")


def test_a_key_that_the_catalogue_names_second(tmp_path: Path) -> None:
    config = {"num_experts": 8, "num_local_experts": 9, "torch_dtype": "torch.float16"}
    reading = read(write_config(tmp_path, config)).readings
    assert reading["model.n_routed_experts"].value == 8
    assert reading["model.n_routed_experts"].witness == "config.json: num_experts"
    assert reading["model.dtype"].value == "float16"


def test_keys_of_a_family_of_its_own() -> None:
    reading = read(CORPUS / "mistralai__Mixtral-8x22B-v0.1").readings
    assert reading["model.moe_intermediate_size"].witness == "config.json: intermediate_size"
    reading = read(CORPUS / "meta-llama__Llama-4-Maverick-17B-128E-Instruct").readings
    assert reading["model.n_shared_experts"].value == 1
    assert reading["model.n_shared_experts"].witness == "families/llama4.yaml"
    dense = read(CORPUS / "meta-models__Muse-Glimmer-30B").readings
    assert dense["model.moe_intermediate_size"].value is ABSENT


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("Qwen__Qwen3.5-35B-A3B", 1),
        ("MiniMaxAI__MiniMax-M2", 0),
        ("deepseek-ai__DeepSeek-V2-Lite", 2),
        ("inclusionAI__Ling-lite", 2),
        ("mistralai__Mixtral-8x22B-v0.1", ABSENT),
    ],
)
def test_how_many_shared_experts(name: str, shared: Any) -> None:
    assert settled(catalogue(), read(CORPUS / name).readings)["model.n_shared_experts"] == shared


def test_layers_counted_by_their_kinds() -> None:
    facts = settled(catalogue(), read(CORPUS / "nvidia__NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16").readings)
    assert facts["model.num_hidden_layers"] == 108


def test_a_wrong_type_names_fact_and_place(tmp_path: Path) -> None:
    with pytest.raises(FactError, match=r"`model.n_routed_experts`.*text `256`.*config.json: n_routed_experts"):
        read(write_config(tmp_path, {**V3, "n_routed_experts": "256"}))


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_nextn_predict_layers", "n_routed_experts"])
def test_numbers_that_can_not_be_true_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(FactError, match="more than"):
        read(write_config(tmp_path, {**V3, key: 10**12}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ('{"architectures": ["Deep', "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("null", "is not a JSON object"),
        ('{"a": 1, "a": 2}', "`a` is there twice"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        load_config(tmp_path)


def test_a_config_of_other_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        load_config(tmp_path)


def test_a_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is missing; .*name a checkpoint folder"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="is missing"):
        load_config(tmp_path / "nowhere.json")


def test_infinity_is_what_transformers_writes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "hidden_size": 3}')
    assert read(tmp_path).readings["model.hidden_size"].value == 3


@pytest.mark.parametrize("config", [{"architectures": 3}, {"architectures": [3]}, {"model_type": {"a": 1}}])
def test_names_that_are_none(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(FactError, match="is not a name"):
        read(write_config(tmp_path, config))


def test_without_experts_and_family_there_are_no_layers(tmp_path: Path) -> None:
    found = read(write_config(tmp_path, {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3}))
    assert (found.layers, found.layers_note) == ([], "the model has no routed experts")


def test_experts_without_a_family_leave_the_layers_unknown(tmp_path: Path) -> None:
    found = read(write_config(tmp_path, {"architectures": ["NewMoe"], "num_hidden_layers": 3, "num_experts": 4}))
    assert (found.layers, found.layers_note) == (None, "no family knows this architecture")


def test_a_config_that_does_not_say_its_layers(tmp_path: Path) -> None:
    found = read(write_config(tmp_path, {"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 4}))
    assert found.layers is None
    assert "does not say which layers" in found.layers_note


@pytest.mark.parametrize(
    ("model", "rewritten", "family"),
    [
        ("zai-org__GLM-5.2", "GlmMoeDsaForCausalLMNextN", "glm_moe_dsa"),
        ("deepseek-ai__DeepSeek-V3", "DeepseekV3ForCausalLMNextN", "deepseek_v3"),
        ("Qwen__Qwen3.5-397B-A17B", "Qwen3_5ForCausalLMMTP", "qwen3_5_moe"),
    ],
)
def test_an_architecture_that_an_engine_rewrote_is_no_other_family(
    tmp_path: Path, model: str, rewritten: str, family: str
) -> None:
    """Engines call a draft's class otherwise; a gate that compared names never let the draft fuse."""
    config = json.loads((CORPUS / model / "config.json").read_text("utf-8"))
    config["architectures"] = [rewritten]
    found = read(write_config(tmp_path, config))
    assert found.family is not None
    assert found.family.name == family
    assert [layer["layer.role"].value for layer in found.layers or ()].count("mtp") == 1
