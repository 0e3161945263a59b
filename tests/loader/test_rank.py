"""Ranks: their shares tile every tensor, and their outputs add up to the layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gatekeeper import read_index
from loader import PlanError, build, verify
from loader.accounts import Ledger
from loader.checkpoint import DTYPES
from loader.costs import rank_bytes
from loader.local_router import LocalRouter
from loader.plan import LayerPlan
from loader.planner import build_plan, runner_layers
from loader.rank import plan_of_rank
from loader.shards import write_shards
from tests.loader.fakes import decided, facts_of, family, index_of, layout
from tests.loader.test_build import planned
from tests.loader.test_load import answer, invoke
from tests.loader.test_stacked import facts, plan, stacked_after

LAYOUTS = [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4), (8, 4)]
CASES: dict[str, dict[str, Any]] = {
    "bf16": {"format_name": "bf16"},
    "int4": {"family": "kimi_k2", "format_name": "int4_g32", "shared_format": "int4_g32"},
    "mxfp4": {"family": "kimi_k25", "format_name": "mxfp4"},
    "two-slots": {"family": "deepseek_v2", "format_name": "bf16"},
    "int4-with-bf16": {"family": "kimi_k25", "format_name": "int4_g32"},
}
WIDE = {"experts": 16, "width": 256, "layers": 2}


def slots_of(case: str) -> int:
    return 2 if case == "two-slots" else 1


def blocks(layer: LayerPlan, shapes: dict[str, tuple[int, ...]]) -> dict[str, set[tuple[Any, ...]]]:
    """What of each expert tensor is read, by key."""
    found: dict[str, set[tuple[Any, ...]]] = {}
    for placement in layer.placements:
        if placement.expert is not None:
            rows, columns = shapes[placement.key]
            found.setdefault(placement.key, set()).add(placement.source or ((0, rows), (0, columns)))
    return found


@pytest.mark.parametrize(("tp_size", "ep_size"), LAYOUTS)
@pytest.mark.parametrize("on", [False, True], ids=["separate", "slot"])
@pytest.mark.parametrize("case", CASES)
def test_the_shares_of_all_ranks_tile_every_tensor(
    made: Callable[..., Path], case: str, on: bool, tp_size: int, ep_size: int
) -> None:
    if on and case == "int4-with-bf16":
        pytest.skip("bf16 does not go into slots of int4")
    plan, index = planned(made(**CASES[case], **WIDE), on, slots_of(case))
    shares = [plan_of_rank(plan, rank, tp_size, ep_size) for rank in range(tp_size)]
    experts = {p.key for p in plan.placements if p.expert is not None}
    shapes = {key: index.tensors[key].shape for key in experts}
    ledger = Ledger({}, shapes)
    seen: set[tuple[str, Any]] = set()
    for share in shares:
        for key, read in blocks(share.layers[0], shapes).items():
            for block in read:
                # A shared expert in a slot is in every group of experts; within a group it is read once.
                if not on or ".shared_expert" not in key or (key, block) not in seen:
                    seen.add((key, block))
                    ledger.write(("any", 0), (0, 0), key, block)
    assert [fault for fault in ledger.faults() if "is in no layer" not in fault] == []
    assert {share.nbytes for share in shares} == {rank_bytes(plan.layers, tp_size, ep_size).nbytes}


@pytest.mark.parametrize(("tp_size", "ep_size"), LAYOUTS)
@pytest.mark.parametrize("on", [False, True], ids=["separate", "slot"])
@pytest.mark.parametrize("case", ["int4", "two-slots", "mxfp4"])
def test_the_outputs_of_all_ranks_add_up(
    made: Callable[..., Path], case: str, on: bool, tp_size: int, ep_size: int
) -> None:
    plan, index = planned(made(**CASES[case], **WIDE), on, slots_of(case))
    x_TD = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    whole = build(plan, index)[0](x_TD)
    layers = [build(plan_of_rank(plan, rank, tp_size, ep_size), index)[0] for rank in range(tp_size)]
    parts = [layer(x_TD) for layer in layers]
    # Sums of 256 products in float32, in another order.
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)
    assert tp_size == 1 or not torch.allclose(parts[0], whole, rtol=1e-2)
    # Only of a part of the experts has a token slots on other ranks; a slice of all of them needs no local numbers.
    assert {isinstance(layer.router, LocalRouter) for layer in layers} == {ep_size > 1}
    assert {layer.experts.is_part for layer in layers} == {ep_size > 1}
    assert not any(layer.shared.experts.is_part for layer in layers if layer.shared is not None)


@pytest.mark.parametrize(("tp_size", "ep_size"), [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)])
def test_biases_of_gate_and_up_are_cut_and_those_of_down_added_once(tmp_path: Path, tp_size: int, ep_size: int) -> None:
    """gpt-oss: gate and up take turns in a stack, and so do their biases."""
    which, generator = family("gpt_oss"), torch.Generator().manual_seed(3)
    tensors = stacked_after(which)
    numbers = {
        name: (torch.randn(info.shape, generator=generator) / 8).to(DTYPES[info.dtype])
        for name, info in tensors.items()
    }
    write_shards(tmp_path, [numbers], 1)
    index = read_index(tmp_path)
    assert index is not None
    whole = plan(which, tensors)
    x_TD = torch.randn(9, 64, generator=generator)
    expected = build(whole, index)[0](x_TD)
    shares = [plan_of_rank(whole, rank, tp_size, ep_size) for rank in range(tp_size)]
    parts = []
    for share in shares:
        layers = build(share, index)
        verified = verify(layers, share, index, runner_layers(index, which, facts(which)))
        assert [one.index for one in verified] == [1, 2]
        parts.append(layers[0](x_TD))
        assert share.rank is not None
        assert (layers[0].experts.w2_bias is not None) is (share.rank.index % (tp_size // ep_size) == 0)
    torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-5)
    assert max(share.nbytes for share in shares) == rank_bytes(whole.layers, tp_size, ep_size).nbytes


def plan_of(width: int, routed: str = "int4_g32", experts: int = 4) -> Any:
    tensors = layout(routed, routed, width=width, experts=experts)
    facts = facts_of(moe_intermediate_size=width, n_routed_experts=experts)
    return build_plan(index_of(tensors), family(), facts, decided([1, 2]))  # type: ignore[arg-type]


def test_a_block_across_a_cut_is_a_fault_with_tensor_and_block() -> None:
    with pytest.raises(PlanError) as caught:
        plan_of_rank(plan_of(width=64), 1, 4)
    assert {fault.layer for fault in caught.value.faults} == {1, 2}
    named = {fault.tensor for fault in caught.value.faults}
    assert "model.layers.1.mlp.experts.3.down_proj.weight_scale" in named
    assert "model.layers.1.mlp.shared_experts.down_proj.weight_scale" in named
    assert not [tensor for tensor in named if "weight_packed" in tensor], "16 columns are whole words of 8"
    assert "a cut at 16:32 runs through a block of 32" in str(caught.value)
    assert plan_of_rank(plan_of(width=64), 1, 2).layers[0].width == 32


@pytest.mark.parametrize(
    ("rank", "tp_size", "ep_size", "words"),
    [
        (8, 8, 1, "there is no rank 8 of 8"),
        (0, 8, 3, "tp 8 is not a multiple of ep 3"),
        (0, 8, 8, "4 experts can't be divided by ep 8"),
        (0, 3, 1, "width 64 can't be divided by 3"),
    ],
)
def test_layouts_that_do_not_work_out(rank: int, tp_size: int, ep_size: int, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_of_rank(plan_of(width=64), rank, tp_size, ep_size)


def test_ranks_are_numbered_by_group_first() -> None:
    shares = [plan_of_rank(plan_of(width=64), rank, 4, 2) for rank in range(4)]
    assert [share.layers[0].held for share in shares] == [(0, 2), (0, 2), (2, 4), (2, 4)]
    gates = [next(p for p in share.layers[0].placements if "gate_proj.weight_packed" in p.key) for share in shares]
    assert [gate.source for gate in gates] == [((0, 32), (0, 8)), ((32, 64), (0, 8))] * 2
    assert [gate.key.split(".")[5] for gate in gates] == ["0", "0", "2", "2"]


def test_the_command_plans_and_loads_one_rank(made: Callable[..., Path]) -> None:
    folder = made(family="kimi_k25", format_name="mxfp4", **WIDE)
    sizes = ("--set", "parallel.tp_size=4", "--set", "parallel.ep_size=2")
    loaded = answer("load", folder, *sizes, "--rank", 3)["runners"][0]["plan"]
    assert loaded["rank"] == {"index": 3, "tp_size": 4, "ep_size": 2}
    assert loaded["bytes"] == loaded["bytes_per_rank"]["bytes"]
    assert isinstance(invoke("plan", folder, *sizes, "--rank", 4).exception, PlanError)
