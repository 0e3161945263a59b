"""MoE blocks as transformers computed them, kept as small files: what `make test` knows of it without installing it."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gatekeeper import Index, MoeTensors, read_facts, read_index
from gatekeeper.expressions import parse_expression
from loader import Plan, build, build_plan, verify
from loader.checkpoint import DTYPES
from loader.planner import runner_layers
from loader.shards import write_shards
from loader.verify import relative_error, tolerance
from tests.loader.fakes import decided, shipped

BLOCKS = {
    path.stem: json.loads(path.read_text("utf-8")) for path in (Path(__file__).parent / "goldens/blocks").glob("*")
}
SHARED_SLOTS = {"DeepSeek-V2": 2, "DeepSeek-V3": 1, "GLM-4.5": 1, "MiniMax-M3": 1, "Qwen3-Next": 1}
CASES = [(name, slots) for name in sorted(BLOCKS) for slots in (0, SHARED_SLOTS.get(name)) if slots is not None]


def from_golden(raw: dict[str, Any]) -> Tensor:
    data = bytearray(base64.b64decode(raw["data"]))
    return torch.frombuffer(data, dtype=DTYPES[raw["dtype"]]).reshape(raw["shape"])


def planned(golden: dict[str, Any], folder: Path, slots: int, backend: str) -> tuple[Plan, Index, list[MoeTensors]]:
    """Of the golden's one block; the layer before it is not in the file, whatever config.json says."""
    (folder / "weights").mkdir()
    (folder / "config.json").write_text(json.dumps(golden["config"]), "utf-8")
    write_shards(folder / "weights", [{name: from_golden(raw) for name, raw in golden["tensors"].items()}], 1)
    facts = read_facts(folder / "config.json", rules=shipped())
    family = shipped().families[str(facts.values["model.family"])]
    family = dataclasses.replace(family, moe_layer=parse_expression("layer.index == 1"))
    index = read_index(folder / "weights")
    assert index is not None
    decisions = decided([1] if slots else [], slots=slots, backend=backend)
    return (
        build_plan(index, family, facts, decisions, shipped().formats),
        index,
        list(runner_layers(index, family, facts)),
    )


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
@pytest.mark.parametrize(("name", "slots"), CASES)
def test_a_block_gives_what_transformers_gave(name: str, slots: int, backend: str, tmp_path: Path) -> None:
    golden = BLOCKS[name]
    plan, index, tensors = planned(golden, tmp_path, slots, backend)
    (layer,) = build(plan, index)
    assert plan.layers[0].n_slots == 8 + slots
    with torch.no_grad():
        y = layer(from_golden(golden["x"]))
    # Both are a float32 computation from the same bf16 weights, each as far from the exact one.
    assert relative_error(y, from_golden(golden["y"])) <= 2 * tolerance(["bf16"], torch.float32, 16, plan.experts)
    for dtype in (torch.float32, torch.bfloat16):
        (found,) = verify((layer,), plan, index, tensors, dtype=dtype)
        assert 0 < found.figure <= found.tolerance


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt-oss", {"limit": 0.01}),
        ("gpt-oss", {"alpha": None}),
        ("gpt-oss", {"up_offset": 0.0}),
        ("Llama-4", {"weighed": "output"}),
        ("Mixtral", {"hidden_act": "gelu_pytorch_tanh"}),
    ],
)
def test_each_word_on_experts_counts(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    """What the family says is heard: another word gives other numbers, here and in the reference alike."""
    plan, index, tensors = planned(BLOCKS[name], tmp_path, 0, "eager")
    other = dataclasses.replace(plan, experts=dataclasses.replace(plan.experts, **change))
    (layer,) = build(other, index)
    with torch.no_grad():
        y = layer(from_golden(BLOCKS[name]["x"]))
    assert relative_error(y, from_golden(BLOCKS[name]["y"])) > 1e-3
    assert verify((layer,), other, index, tensors)[0].figure > 0


def test_a_bias_of_the_logits_is_no_bias_of_the_choice(tmp_path: Path) -> None:
    plan, index, _ = planned(BLOCKS["gpt-oss"], tmp_path, 0, "eager")
    assert plan.router.bias_parameter == "router.bias"
    (layer,) = build(plan, index)
    with torch.no_grad():
        layer.router.bias.zero_()
        y = layer(from_golden(BLOCKS["gpt-oss"]["x"]))
    assert relative_error(y, from_golden(BLOCKS["gpt-oss"]["y"])) > 1e-3
