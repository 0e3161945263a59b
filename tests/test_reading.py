"""All sources of one load joined: flags at their defaults, the platform only where asked for, the engine as our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gatekeeper import ABSENT, UNKNOWN, CheckpointError, FactError, open_target, read_facts, runners_of
from gatekeeper.load import shipped_rules
from tests.shipped import CORPUS, write_config

KIMI, DEEPSEEK = CORPUS / "moonshotai__Kimi-K2.5", CORPUS / "deepseek-ai__DeepSeek-V3"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.n_routed_experts", 384),
        ("model.family", "kimi_k25"),
        ("server.enable_eplb", False),
        ("server.moe_runner_backend", "auto"),
        ("engine.moe_runner_backend", UNKNOWN),
        ("engine.moe_a2a_backend", "none"),
        ("engine.name", "moe-loader"),
        ("parallel.ep_size", 1),
        ("parallel.tp_size", UNKNOWN),
        ("moe.shard_width", UNKNOWN),
        ("platform.arch", UNKNOWN),
        ("library.torch", UNKNOWN),
    ],
)
def test_what_is_known_of_a_config_alone(name: str, value: Any) -> None:
    assert read_facts(KIMI).reading(name).value == value


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"parallel.tp_size": 8}, "moe.shard_width", 256),
        ({"parallel.tp_size": "8"}, "moe.shard_width", 256),
        ({"parallel.tp_size": 3}, "moe.shard_width", ABSENT),
        ({"parallel.tp_size": "null"}, "parallel.tp_size", UNKNOWN),
        ({"server.enable_eplb": "true"}, "server.enable_eplb", True),
        ({"server.moe_runner_backend": "eager"}, "engine.moe_runner_backend", "eager"),
        ({"engine.moe_runner_backend": "triton"}, "engine.moe_runner_backend", "triton"),
        ({"engine.name": "sglang"}, "engine.loads_fused_shared", UNKNOWN),
    ],
)
def test_settings_replace_what_was_not_set(settings: dict[str, Any], name: str, value: Any) -> None:
    found = read_facts(KIMI, set=settings).reading(name).value
    assert found == value
    assert isinstance(found, bool) == isinstance(value, bool)


def test_a_preset_tells_the_platform_and_settings_beat_it() -> None:
    assert str(read_facts(KIMI, platform="mi355x").reading("platform.arch").value) == "gfx950"
    over = read_facts(KIMI, platform="mi355x", set={"platform.arch": "gfx942"})
    assert str(over.reading("platform.arch").value) == "gfx942"
    assert over.reading("platform.vendor").witness == "platforms.yaml: mi355x"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.n_routed_experts": 256}, "is read from the checkpoint and can't be set"),
        ({"layer.index": 3}, "is read from the checkpoint"),
        (
            {"parallel.moe_tp_size": 3},
            "is derived and can't be set; set what it is derived from: `parallel.ep_size`, `parallel.tp_size`",
        ),
        ({"moe.shard_width": 3}, "can't be set; set what it is derived from"),
        ({"parallel.tp": 3}, "unknown fact `parallel.tp`"),
        ({"parallel.tp_size": 0}, "expected 1 or more, not `0` (from --set parallel.tp_size)"),
        ({"parallel.tp_size": "eight"}, "expected an integer, not the text `eight`"),
        ({"parallel.tp_size": "[8"}, "is no value"),
        ({"parallel.tp_size": "\udc80"}, "is no value"),
        ({"server.moe_runner_backend": "\udc80"}, "expected Unicode text"),
        ({"server.enable_eplb": "yes"}, "expected a boolean, not the text `yes`"),
        ({"platform.vendor": "amd"}, "expected one of cuda, hip, musa, npu, cpu, not `amd`"),
    ],
)
def test_a_setting_that_can_not_be_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FactError) as caught:
        read_facts(KIMI, set=settings)
    assert message in str(caught.value)


def test_an_unknown_platform_offers_the_nearest() -> None:
    with pytest.raises(FactError, match="unknown platform `mi355`, did you mean `mi355x`"):
        read_facts(KIMI, platform="mi355")


@pytest.mark.parametrize("name", ["missing", "missing/config.json", "x" * 300])
def test_a_target_that_is_not_there_is_an_error_that_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such file or folder|File name too long"):
        read_facts(tmp_path / name)


def test_a_checkpoint_with_draft_layers_has_two_runners() -> None:
    rules = shipped_rules()
    assert runners_of(open_target(DEEPSEEK, rules)) == ("target", "draft")
    assert runners_of(open_target(KIMI, rules)) == ("target",)


def test_a_config_file_is_read_like_its_folder() -> None:
    assert read_facts(KIMI / "config.json").values == read_facts(KIMI).values


def test_a_config_without_experts_has_no_moe_layers(tmp_path: Path) -> None:
    dense = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8}
    facts = read_facts(write_config(tmp_path, dense))
    assert facts.reading("model.n_routed_experts").value is ABSENT
    assert not facts.layers
