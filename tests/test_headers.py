"""Headers to storage: equal to what the config announces, or an error that names both; and the other readers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gatekeeper import load_rules, read_facts
from gatekeeper.errors import CheckpointError, FactError
from gatekeeper.providers.flags import read_flags
from gatekeeper.providers.platform import _of_devices, read_platform
from gatekeeper.source import read_yaml
from gatekeeper.values import ABSENT, UNKNOWN, Reading
from tests.shipped import CORPUS, RULES, catalogue, families, read, write_config
from tests.test_formats import linear
from tests.tiny import write_shards

Tensors = dict[str, tuple[str, tuple[int, ...]]]
SHARD = "model.safetensors"
E, F, D = 4, 256, 512


def small(model: str) -> dict[str, Any]:
    """A model of the corpus with few layers and experts, narrow; names, lists and schemes as they are."""
    import json

    top: dict[str, Any] = json.loads((CORPUS / model / "config.json").read_text("utf-8"))
    own = top.get("text_config", top)
    for key in ("n_routed_experts", "num_experts", "num_local_experts"):
        if key in own:
            own[key] = E
    own |= {"hidden_size": D, "moe_intermediate_size": F, "num_hidden_layers": 5}
    for key in ("shared_expert_intermediate_size", "share_expert_dim"):
        if key in own:
            own[key] = F
    return top


def named(prefix: str, tensors: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for suffix, info in tensors.items():
        yield f"{prefix}.{suffix}", (info.dtype, info.shape)


def experts(
    block: str, routed: str, shared: str | None, *, slots: int = 1, spelt: Mapping[str, str] | None = None
) -> Tensors:
    """The tensors of one MoE layer in DeepSeek's names, or with other projections."""
    names = spelt or {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    result: Tensors = {f"{block}.gate.weight": ("BF16", (E, D))}
    for place, form, width in [(f"experts.{e}", routed, F) for e in range(E)] + [("shared_experts", shared, F * slots)]:
        for projection, name in names.items():
            if form is not None:
                sizes = (D, width) if projection == "down" else (width, D)
                result |= dict(named(f"{block}.{place}.{name}", linear(form, *sizes)))
    return result


def folder_of(tmp_path: Path, model: str, tensors: Tensors) -> Path:
    write_config(tmp_path, small(model))
    hf_quant = CORPUS / model / "hf_quant_config.json"
    if hf_quant.exists():
        (tmp_path / "hf_quant_config.json").write_bytes(hf_quant.read_bytes())
    return write_shards(tmp_path, {SHARD: tensors}, index=False)


def formats_of(layer: Mapping[str, Reading]) -> tuple[Any, Any]:
    return tuple(
        r.value["format"] if isinstance(r.value, Mapping) else r.value
        for r in (layer["layer.routed_storage"], layer["layer.shared_storage"])
    )  # type: ignore[return-value]


REAL = [
    ("moonshotai__Kimi-K2.5", "language_model.model.layers.{}.mlp", range(1, 5), "int4_g32", "bf16"),
    ("amd__Kimi-K2.5-MXFP4", "language_model.model.layers.{}.mlp", range(1, 5), "mxfp4", "mxfp4"),
    ("amd__Kimi-K2.5-MXFP4@b071bc6f", "language_model.model.layers.{}.mlp", range(1, 5), "mxfp4", "bf16"),
    ("nvidia__Kimi-K2.5-NVFP4", "language_model.model.layers.{}.mlp", range(1, 5), "nvfp4", "nvfp4"),
    ("nvidia__Kimi-K2.7-Code-NVFP4", "language_model.model.layers.{}.mlp", range(1, 5), "nvfp4", "bf16"),
    ("deepseek-ai__DeepSeek-V3", "model.layers.{}.mlp", range(3, 6), "fp8_block", "fp8_block"),
    ("zai-org__GLM-5-FP8", "model.layers.{}.mlp", range(3, 6), "fp8_block", "fp8_block"),
    ("zai-org__GLM-4.5", "model.layers.{}.mlp", range(1, 6), "bf16", "bf16"),
]


@pytest.mark.parametrize(("model", "block", "layers", "routed", "shared"), REAL, ids=[row[0] for row in REAL])
def test_headers_and_config_come_to_the_same(
    tmp_path: Path, model: str, block: str, layers: range, routed: str, shared: str
) -> None:
    """Of one real model, the storage by its headers equals the storage that its config announces, field by field."""
    tensors: Tensors = {}
    for index in layers:
        tensors |= experts(block.format(index), routed, shared)
    stored = read(folder_of(tmp_path, model, tensors)).layers
    announced = read(tmp_path / "config.json").layers
    assert stored is not None
    assert announced is not None
    assert len(stored) == len(announced) == len(layers)
    for one, other in zip(stored, announced, strict=True):
        assert formats_of(one) == (routed, shared)
        for fact in other:
            assert one[fact].value == other[fact].value, fact
        first = f"{SHARD}: {block.format(one['layer.index'].value)}.experts.0.gate_proj.weight"
        assert one["layer.routed_storage"].witness.startswith(first)
        assert other["layer.routed_storage"].witness.startswith("config.json: ")


def test_several_shared_experts_are_one_mlp(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for index in range(1, 5):
        tensors |= experts(f"model.layers.{index}.mlp", "bf16", "bf16", slots=2)
    stored = read(folder_of(tmp_path, "deepseek-ai__DeepSeek-V2-Lite", tensors)).layers
    assert stored is not None
    for layer in stored:
        assert layer["layer.shared_storage"].value == layer["layer.routed_storage"].value


def test_v4_in_its_authors_names(tmp_path: Path) -> None:
    """FP4 experts beside FP8 shared ones, both under `quant_method: fp8`; `scale` and w1, w2, w3."""
    spelt = {"gate": "w1", "up": "w3", "down": "w2"}
    tensors: Tensors = {}
    for block in [f"layers.{i}.ffn" for i in range(5)] + ["mtp.0.ffn"]:
        for name, (dtype, shape) in experts(block, "mxfp4", "fp8_block", spelt=spelt).items():
            renamed = name.replace("weight_scale_inv", "scale").replace("weight_scale", "scale")
            is_scale = renamed.endswith(".scale")
            tensors[renamed] = ("F8_E8M0" if is_scale else dtype.replace("U8", "I8"), shape)
    layers = read(folder_of(tmp_path, "deepseek-ai__DeepSeek-V4-Flash", tensors)).layers
    announced = read(tmp_path / "config.json").layers
    assert layers is not None
    assert announced is not None
    assert {formats_of(layer) for layer in layers} == {("mxfp4", "fp8_block")}
    assert [layer["layer.role"].value for layer in layers] == ["main"] * 5 + ["mtp"]
    for one, other in zip(layers, announced, strict=True):
        assert {fact: reading.value for fact, reading in one.items()} == {f: r.value for f, r in other.items()}


def test_stacked_experts_are_read_as_one_each(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for block in [f"model.language_model.layers.{i}.mlp" for i in range(5)] + ["mtp.layers.0.mlp"]:
        tensors |= {
            f"{block}.experts.gate_up_proj": ("BF16", (E, 2 * F, D)),
            f"{block}.experts.down_proj": ("BF16", (E, D, F)),
            **{f"{block}.shared_expert.{p}_proj.weight": ("BF16", (F, D)) for p in ("gate", "up")},
            f"{block}.shared_expert.down_proj.weight": ("BF16", (D, F)),
            f"{block}.shared_expert_gate.weight": ("BF16", (1, D)),
        }
    layers = read(folder_of(tmp_path, "Qwen__Qwen3.5-35B-A3B", tensors)).layers
    assert layers is not None
    assert len(layers) == 6
    for layer in layers:
        assert layer["layer.routed_storage"].value == layer["layer.shared_storage"].value
        assert formats_of(layer) == ("bf16", "bf16")


V3 = "deepseek-ai__DeepSeek-V3"


def v3(tmp_path: Path, change: Tensors | None = None, *, without: str = "^$") -> Any:
    tensors: Tensors = {}
    for index in range(3, 6):
        tensors |= experts(f"model.layers.{index}.mlp", "fp8_block", "fp8_block")
    kept = {name: info for name, info in (tensors | (change or {})).items() if not re.search(without, name)}
    return read(folder_of(tmp_path, V3, kept))


def test_experts_that_differ_have_no_one_storage(tmp_path: Path) -> None:
    prefix = "model.layers.4.mlp.experts.3"
    other = {
        f"{prefix}.{p}_proj.weight_scale_inv": ("BF16", shape)
        for p, shape in (("gate", (2, 4)), ("up", (2, 4)), ("down", (4, 2)))
    }
    layers = v3(tmp_path, other).layers
    reading = layers[1]["layer.routed_storage"]
    assert reading.value is ABSENT
    assert "3 are fp8_block, from expert 0 on; 1 are fp8_block, from expert 3 on" in reading.note
    assert formats_of(layers[0]) == ("fp8_block", "fp8_block")


def test_a_storage_that_no_format_has_is_unknown(tmp_path: Path) -> None:
    layers = v3(tmp_path, {"model.layers.4.mlp.shared_experts.up_proj.bias": ("BF16", (F,))}).layers
    assert layers[1]["layer.shared_storage"].value is UNKNOWN
    assert "no format has up_proj with bias BF16 [256]" in layers[1]["layer.shared_storage"].note


def test_a_missing_tensor_is_unknown_with_its_name(tmp_path: Path) -> None:
    layers = v3(tmp_path, without="layers.4.mlp.experts.2.down_proj").layers
    reading = layers[1]["layer.routed_storage"]
    assert (reading.value, reading.note) == (UNKNOWN, "routed expert 2: down_proj has no tensors")
    layers = v3(tmp_path, without="layers.4.mlp.experts.3.").layers
    assert layers[1]["layer.routed_storage"].note == "routed expert 3: no tensors at all"


def test_a_shared_expert_that_is_not_there_is_absent(tmp_path: Path) -> None:
    layers = v3(tmp_path, without="layers.4.mlp.shared_experts").layers
    assert layers[1]["layer.shared_storage"].value is ABSENT
    assert layers[1]["layer.shared_excluded"].value is ABSENT
    assert layers[0]["layer.shared_excluded"].value == "false"


def test_a_quantized_tensor_that_the_list_excludes(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for index in range(1, 5):
        tensors |= experts(f"language_model.model.layers.{index}.mlp", "int4_g32", "int4_g32")
    with pytest.raises(FactError) as error:
        read(folder_of(tmp_path, "moonshotai__Kimi-K2.5", tensors))
    for part in (
        "model.safetensors: language_model.model.layers.1.mlp.shared_experts.gate_proj.weight_packed is int4_g32",
        "config.json: text_config.quantization_config.ignore excludes it from quantization (bf16)",
    ):
        assert part in str(error.value)


def test_a_plain_tensor_that_the_list_does_not_exclude(tmp_path: Path) -> None:
    plain = {f"model.layers.4.mlp.shared_experts.{p}_proj.weight": ("BF16", (F, D)) for p in ("gate", "up")}
    plain["model.layers.4.mlp.shared_experts.down_proj.weight"] = ("BF16", (D, F))
    with pytest.raises(
        FactError,
        match=r"gate_proj.weight is bf16, but config.json: quantization_config does not exclude it \(fp8_block\)",
    ):
        v3(tmp_path, plain, without=r"layers\.4\.mlp\.shared_experts.*weight_scale_inv")


def test_another_format_than_the_config_announces(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for index in range(1, 5):
        tensors |= experts(f"language_model.model.layers.{index}.mlp", "nvfp4", "bf16")
    with pytest.raises(FactError) as error:
        read(folder_of(tmp_path, "moonshotai__Kimi-K2.5", tensors))
    for part in (
        "layer 1, routed experts: model.safetensors: language_model.model.layers.1.mlp.experts.0.gate_proj.weight has",
        "has format nvfp4, but config.json: text_config.quantization_config announces int4_g32",
    ):
        assert part in str(error.value)


def test_another_width_than_the_config_announces(tmp_path: Path) -> None:
    narrow: Tensors = {}
    for e in range(E):
        for projection, sizes in (("gate", (F // 2, D)), ("up", (F // 2, D)), ("down", (D, F // 2))):
            narrow |= dict(named(f"model.layers.4.mlp.experts.{e}.{projection}_proj", linear("fp8_block", *sizes)))
    with pytest.raises(FactError, match=r"layer 4, .* has width 128, but config.json: .* announces 256"):
        v3(tmp_path, narrow)


def test_more_experts_than_the_config_announces(tmp_path: Path) -> None:
    prefix = f"model.layers.4.mlp.experts.{E}"
    more = {f"{prefix}.{p}_proj.weight": ("F8_E4M3", (F, D)) for p in ("gate", "up")}
    with pytest.raises(
        FactError, match=rf"layer 4: .*experts\.{E}\.gate_proj.weight makes 5 experts, but config.json announces 4"
    ):
        v3(tmp_path, more)


MTP = [  # a model, its draft layers' block as stored, and as tensors of what; see tests/names.yaml for their lists
    ("deepseek-ai__DeepSeek-V3", "model.layers.5.mlp", range(3, 5), "model.layers.{}.mlp"),
    ("zai-org__GLM-5-FP8", "model.layers.5.mlp", range(3, 5), "model.layers.{}.mlp"),
]


@pytest.mark.parametrize(("model", "draft", "main", "block"), MTP, ids=[row[0] for row in MTP])
def test_a_draft_layer_counts_on_after_the_last(
    tmp_path: Path, model: str, draft: str, main: range, block: str
) -> None:
    """`model.layers.N` past num_hidden_layers is of the draft, and has a storage of its own."""
    config = small(model)
    key = "modules_to_not_convert"
    listed = [f"{draft}.shared_experts.{p}_proj" for p in ("gate", "up", "down")]
    config["quantization_config"][key] = [*config["quantization_config"].get(key, ()), *listed]
    tensors = experts(draft, "fp8_block", "bf16")
    for index in main:
        tensors |= experts(block.format(index), "fp8_block", "fp8_block")
    write_config(tmp_path, config)
    write_shards(tmp_path, {SHARD: tensors}, index=False)
    for target in (tmp_path, tmp_path / "config.json"):
        layers = read(target).layers
        assert layers is not None
        assert [(one["layer.index"].value, one["layer.role"].value) for one in layers] == [
            *((index, "main") for index in main),
            (5, "mtp"),
        ]
        assert [formats_of(one) for one in layers] == [("fp8_block", "fp8_block")] * 2 + [("fp8_block", "bf16")]
        assert [one["layer.shared_excluded"].value for one in layers] == ["false", "false", "true"]


def test_a_draft_layer_by_a_name_of_its_own(tmp_path: Path) -> None:
    """`mtp.0.ffn` is layer 5, of which lists that name `layers.5` say nothing (vllm-project/vllm#51695)."""
    config = small("deepseek-ai__DeepSeek-V4-Flash")
    config["quantization_config"]["modules_to_not_convert"] = ["layers.5.ffn.shared_experts"]
    assert read(write_config(tmp_path / "a", config)).layers is not None
    named_so = read(tmp_path / "a").layers or []
    config["quantization_config"]["modules_to_not_convert"] = ["mtp.0.ffn.shared_experts"]
    named_right = read(write_config(tmp_path / "b", config)).layers or []
    for layers, expected in ((named_so, "fp8_block"), (named_right, "bf16")):
        draft = [one for one in layers if one["layer.role"].value == "mtp"]
        assert [(one["layer.index"].value, one["layer.name"].value) for one in draft] == [(5, "mtp.0.ffn")]
        assert [formats_of(one) for one in draft] == [("mxfp4", expected)]
        assert {formats_of(one) for one in layers if one not in draft} == {("mxfp4", "fp8_block")}


def test_a_layer_of_experts_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FactError, match=r"layer 4 should have experts by config\.json"):
        v3(tmp_path, without="layers.4.")


def test_experts_in_a_dense_layer(tmp_path: Path) -> None:
    with pytest.raises(FactError, match=r"layer 1 has experts \(model.safetensors: model.layers.1.mlp"):
        v3(tmp_path, experts("model.layers.1.mlp", "fp8_block", "fp8_block"))


def test_draft_layers_may_be_left_out_of_a_checkpoint(tmp_path: Path) -> None:
    layers = v3(tmp_path, without="layers.5.").layers
    assert [layer["layer.role"].value for layer in layers] == ["main", "main"]


def test_names_of_another_family(tmp_path: Path) -> None:
    found = read(folder_of(tmp_path, V3, {"transformer.h.0.experts": ("BF16", (2, 2))}))
    assert found.layers is None
    assert "no tensor has a name of an expert" in found.layers_note


def test_a_torn_shard_is_not_read_further(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, V3, experts("model.layers.3.mlp", "bf16", "bf16"))
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is truncated"):
        read(folder)


def platforms() -> Mapping[str, Any]:
    document = read_yaml(RULES / "platforms.yaml")
    return {name: preset["sets"] for name, preset in document.data["platforms"].items()}


def test_presets_are_of_the_right_type() -> None:
    for name in platforms():
        for fact, reading in read_platform(name, platforms(), catalogue()).items():
            if reading.value is not ABSENT:
                catalogue().coerce(fact, reading.value)
    layouts = read_yaml(RULES / "layouts.yaml").data["layouts"]
    for layout in layouts.values():
        for fact, value in layout["sets"].items():
            catalogue().coerce(fact, value)


def test_a_preset_and_where_it_is_from() -> None:
    found = read_platform("mi355x", platforms(), catalogue())
    assert (found["platform.vendor"].value, found["platform.arch"].value) == ("hip", "gfx950")
    assert found["platform.vendor"].witness == "platforms.yaml: mi355x"
    assert read_platform("cpu", platforms(), catalogue())["platform.arch"].value is ABSENT


def test_what_a_preset_leaves_out_is_not_known_to_be_nothing() -> None:
    """A device has a name and an architecture, also where nobody wrote it down."""
    some = {"new": {"platform.vendor": "cuda"}}
    assert read_platform("new", some, catalogue()).keys() == {"platform.vendor"}
    assert "platform.device_name" not in read_platform("mi355x", platforms(), catalogue())
    facts = read_facts(CORPUS / "deepseek-ai__DeepSeek-V3", platform="rtx-pro-6000", rules=load_rules())
    assert facts.values.get("platform.device_name", UNKNOWN) is UNKNOWN
    of_cpu = read_facts(CORPUS / "deepseek-ai__DeepSeek-V3", platform="cpu", rules=load_rules()).values
    assert of_cpu["platform.device_name"] is of_cpu["platform.arch"] is ABSENT


def test_memory_of_a_device() -> None:
    found = read_platform("h200", platforms(), catalogue())["platform.memory_bytes"]
    assert (found.value, found.witness) == (141 * 10**9, "platforms.yaml: h200")
    assert read_platform("cpu", platforms(), catalogue())["platform.memory_bytes"].value is ABSENT
    here = read_platform("here", platforms(), catalogue())["platform.memory_bytes"]
    assert isinstance(here.value, int) or here.value in (ABSENT, UNKNOWN)


def test_the_smallest_of_several_devices_counts() -> None:
    device = SimpleNamespace(name="X", major=9, minor=0, total_memory=80 * 2**30)
    smaller, silent = SimpleNamespace(**vars(device) | {"total_memory": 2**30}), SimpleNamespace(name="X")
    assert _of_devices("cuda", [device, smaller])["platform.memory_bytes"].value == 2**30
    assert _of_devices("cuda", [device, silent])["platform.memory_bytes"].value is UNKNOWN


def test_an_unknown_preset() -> None:
    with pytest.raises(FactError, match="unknown platform `h20o`, did you mean `h20`"):
        read_platform("h20o", platforms(), catalogue())
    with pytest.raises(FactError, match="the presets are"):
        read_platform("qqqqqq", platforms(), catalogue())


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_AITER", "1")
    found = read_platform("here", platforms(), catalogue())
    assert found["platform.vendor"].value in {"cuda", "hip", "musa", "npu", "cpu", UNKNOWN}
    assert found["env.SGLANG_USE_AITER"].value == "1"
    assert "library.torch" in found


@pytest.mark.parametrize("tool", [None, "nvidia-smi"])
def test_a_machine_without_torch(monkeypatch: pytest.MonkeyPatch, tool: str | None) -> None:
    import shutil
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/x" if name == tool else None)
    found = read_platform("here", platforms(), catalogue())
    if tool is None:
        assert found["platform.vendor"].value == "cpu"
    else:
        assert found["platform.vendor"].value is UNKNOWN
        assert "torch is not installed" in found["platform.vendor"].note


def test_settings_are_read_as_yaml() -> None:
    settings = {
        "parallel.tp_size": "8",
        "server.enable_eplb": "true",
        "server.moe_a2a_backend": "null",
        "library.torch": "2.10",
        "platform.arch": "sm90",
        "env.SGLANG_USE_AITER": "1",
        "parallel.ep_size": 4,
    }
    assert {name: reading.value for name, reading in read_flags(settings, catalogue()).items()} == {
        "parallel.tp_size": 8,
        "server.enable_eplb": True,
        "server.moe_a2a_backend": ABSENT,
        "library.torch": "2.10",
        "platform.arch": "sm90",
        "env.SGLANG_USE_AITER": "1",
        "parallel.ep_size": 4,
    }
    assert read_flags({"parallel.tp_size": "8"}, catalogue())["parallel.tp_size"].witness == "--set parallel.tp_size"
    assert read_flags(None, catalogue()) == {}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.n_routed_experts", "read from the checkpoint and can't be set"),
        ("quant.method", "read from the checkpoint and can't be set"),
        ("layer.index", "read from the checkpoint and can't be set"),
        ("moe.shard_width", "set what it is derived from"),
        ("paralel.tp_size", "did you mean `parallel.tp_size`"),
        ("qqq", "unknown fact `qqq`"),
    ],
)
def test_what_can_not_be_set(name: str, says: str) -> None:
    with pytest.raises(FactError, match=says):
        read_flags({name: "1"}, catalogue())


def test_a_setting_that_is_no_yaml() -> None:
    with pytest.raises(FactError, match="is no value"):
        read_flags({"parallel.tp_size": "[1"}, catalogue())


def test_families_say_what_the_loader_can_fuse() -> None:
    fusable = {one.name for one in families() if one.loads_fused_shared}
    assert {"deepseek_v3", "kimi_k2", "kimi_k25"} <= fusable
    assert not any(one.loads_fused_shared for one in families() if one.gateless)
