"""Experts in one tensor: where each lies, that nothing of it is forgotten, and every misfit by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatekeeper import CheckpointError, Facts, Family, TensorInfo, View
from gatekeeper.stacking import Stacking
from loader import Plan, PlanError, build_plan
from loader.accounts import Ledger
from loader.build import assemble
from loader.plan import Placement
from tests.loader.fakes import decided, facts_of, family, index_of, layout, shipped, tensor

sizes = st.integers(1, 4)


@given(sizes, sizes, sizes, st.booleans(), st.booleans(), st.booleans())
def test_a_view_shows_what_was_stacked(e: int, f: int, d: int, transposed: bool, interleaved: bool, bf16: bool) -> None:
    """Stack gates and ups in one of the ways, look at each again, and find every element used once."""
    numbers = torch.arange(e * 2 * f * d).reshape(e, 2, f, d)
    if interleaved:
        stacked = numbers.transpose(1, 2).reshape(e, 2 * f, d)
    else:
        stacked = numbers.reshape(e, 2 * f, d)
    stacked = stacked.transpose(1, 2) if transposed else stacked
    how = Stacking(module="experts", names={"gate_up": "x"}, transposed=transposed, interleaved=interleaved)
    ledger = Ledger({("w13", expert): 2 * f for expert in range(e)}, {"x": tuple(stacked.shape)})
    for expert in range(e):
        for half, projection in enumerate(("gate", "up")):
            view = how.view("gate_up", projection, "weight", tuple(stacked.shape), expert)
            assert view is not None and view.shape(tuple(stacked.shape)) == (f, d)
            rows = (half * f, (half + 1) * f)
            one = Placement(key="x", param="w13", expert=expert, rows=rows, view=view)
            assert torch.equal(one.cut(stacked, 2), numbers[expert, half])
            ledger.write(("w13", expert), rows, "x", view=view)
    assert ledger.faults() == []


def test_blocks_of_bytes_are_one_row() -> None:
    """gpt-oss's ``(E, 2F, D / 32, 16)``, of which only plain weights are transposed."""
    blocks = torch.arange(2 * 4 * 3 * 16).reshape(2, 4, 3, 16)
    how = Stacking(module="x", names={"gate_up": "x"}, transposed=frozenset({"weight"}), interleaved=True)
    view = how.view("gate_up", "up", "blocks", tuple(blocks.shape), 1)
    assert view == View(item=1, rows=range(1, 4, 2), transposed=False)
    assert torch.equal(
        Placement(key="x", param="y", expert=0, rows=(0, 2), view=view).cut(blocks, 2), blocks[1, 1::2].flatten(1)
    )
    plain = how.view("gate_up", "up", "weight", (2, 48, 4), 1)
    assert plain is not None and plain.transposed and plain.shape((2, 48, 4)) == (2, 48)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 4)])
def test_what_can_not_be_cut(shape: tuple[int, ...]) -> None:
    """No axis of experts, no axis of rows, or an odd number of rows for two."""
    assert Stacking(module="x", names={"gate_up": "x"}).view("gate_up", "up", "weight", shape, 0) is None


@pytest.mark.parametrize("d", [8, 16, 32])
def test_which_way_round_is_told_by_the_shapes(d: int) -> None:
    """Square ones too: of gate_up (F = 8) or of down one is not."""
    how = Stacking(module="x", names={"gate_up": "x", "down": "y"}, transposed=None)
    assert how.settled({"gate_up": (2, 16, d), "down": (2, d, 8)}).transposed is False
    assert how.settled({"gate_up": (2, d, 16), "down": (2, 8, d)}).transposed is True


def test_the_ledger_sees_into_a_stack() -> None:
    gate, up = (View(item=0, rows=range(n, 4, 2), transposed=False) for n in (0, 1))
    first = View(item=0, rows=range(2), transposed=False)

    def faults(*views: View, shape: tuple[int, ...] = (1, 4, 3)) -> list[str]:
        ledger = Ledger({}, {"x": shape})
        for view in views:
            ledger.write(("w", 0), (0, 2), "x", view=view)
        return [line for line in ledger.faults() if "`x`" in line]

    assert faults(gate, up) == []
    assert faults(gate, first) == ["`x` has a block that is used twice, at row 0 of expert 0"]
    assert faults(gate) == ["`x` of shape [1, 4, 3] is used in part: 6 elements"]
    assert faults(gate, up, shape=(2, 4, 3)) == ["`x` of shape [2, 4, 3] is used in part: 12 elements"]


# -- plans ----------------------------------------------------------------------------------------------------------

GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
STACKABLE = [
    name
    for name, one in sorted(shipped().families.items())
    if one.names.stacked and "gate_up" in one.names.stacked.names and one.names.routed and one.names.router
]


def stacked_after(which: Family, *, experts: int = 4, hidden: int = 64, width: int = 32) -> dict[str, TensorInfo]:
    """MoE layers 1 and 2 of a family as it stacks its experts, with one shared expert where it has one."""
    names, found = which.names, []
    assert names.stacked is not None
    down = (names.shared_projections["down"],)
    for index in (1, 2):
        block = names.block("main", index, 0)
        found.append(tensor(f"{block}.{names.router}", "BF16", (experts, hidden)))
        if names.router_bias:
            found.append(tensor(f"{block}.{names.router_bias}", "F32", (experts,)))
        if names.shared_gate:
            found.append(tensor(f"{block}.{names.shared_gate}", "BF16", (1, hidden)))
        for module in names.shared_modules(block):
            shape = (hidden, width) if module.endswith(down) else (width, hidden)
            found.append(tensor(f"{module}.weight", "BF16", shape))
        shapes = {"gate_up": (2 * width, hidden), "down": (hidden, width)}
        for kind, (rows, columns) in shapes.items():
            name = f"{block}.{names.stacked.names[kind]}"
            swapped = names.stacked.transposed
            swapped = "weight" in swapped if isinstance(swapped, frozenset) else swapped
            found.append(tensor(name, "BF16", (experts, columns, rows) if swapped else (experts, rows, columns)))
            if names.expert_bias:
                found.append(tensor(f"{name}_{names.expert_bias}", "BF16", (experts, rows)))
    return {info.name: info for info in found}


def facts(which: Family, **model: Any) -> Facts:
    """Of a model with layers `stacked_after` this family."""
    facts = facts_of(n_shared_experts=int(bool(which.names.shared)), first_k_dense_replace=1, **model)
    values = {"model.mlp_only_layers": (0,), "model.decoder_sparse_step": 1, "model.moe_layers": (1, 2)}
    facts.values |= values if which.name not in ALL_LAYERS else {"model.num_hidden_layers": None}
    return facts


def plan(which: Family, tensors: dict[str, TensorInfo], on: bool = False, **model: Any) -> Plan:
    decisions = decided([1, 2] if on else [])
    return build_plan(index_of(tensors), which, facts(which, **model), decisions, shipped().formats)


ALL_LAYERS = ("gpt_oss", "mixtral", "minimax_m2")
"""Every layer of theirs has experts, so that these plans leave open how many there are."""


def faults(tensors: dict[str, TensorInfo], **model: Any) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan(family("deepseek_v3"), tensors, **model)
    return caught.value


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("name", STACKABLE)
def test_a_family_may_stack_its_experts(name: str, fused: bool) -> None:
    which = family(name)
    tensors = stacked_after(which)
    found = plan(which, tensors, fused and bool(which.names.shared) and not which.names.expert_bias)
    assert {p.key for p in found.placements} == set(tensors)
    for layer in found.layers:
        assert assemble(layer, found.router, found.experts).layer.index == layer.index


def test_shared_expert_behind_a_stack() -> None:
    layer = plan(family("deepseek_v3"), stacked_after(family("deepseek_v3")), on=True).layers[0]
    w13 = sorted((p.expert, p.rows, p.key) for p in layer.placements if p.param.endswith("experts.w13_weight"))
    assert [(expert, rows) for expert, rows, _ in w13] == [(e, r) for e in range(5) for r in ((0, 32), (32, 64))]
    assert {key for expert, _, key in w13 if expert < 4} == {GATE_UP}


def test_biases_are_cut_and_accounted_for() -> None:
    which = family("gpt_oss")
    layer = plan(which, stacked_after(which)).layers[0]
    shapes = {p.name.rpartition(".")[2]: p.shape for p in layer.params if "bias" in p.name}
    assert shapes == {"bias": (4,), "w13_bias": (4, 64), "w2_bias": (4, 64)}
    up = [p for p in layer.placements if p.param.endswith("w13_bias") and p.rows == (32, 64)]
    assert [(p.expert, p.view and p.view.rows) for p in up] == [(e, range(1, 64, 2)) for e in range(4)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop(DOWN),
            "slot 0 of w2_weight is never written: no tensor: `model.layers.1.mlp.experts.down_proj",
        ),
        (lambda t: put(t, GATE_UP, (5, 64, 64)), "holds 5 experts, config.json has 4"),
        (lambda t: put(t, GATE_UP, (3, 64, 64)), "slot 3 of w13_weight is never written: no tensor"),
        (lambda t: put(t, DOWN, (4, 32, 64)), "slot 0 of w2_weight takes [64, 32] bfloat16, the tensor is [32, 64]"),
        (lambda t: put(t, GATE_UP, (4, 63, 64)), "slot 0 of w13_weight is never written"),
        (lambda t: put(t, DOWN, (4, 64, 32), "F16"), "slot 0 of w2_weight is bfloat16, the tensor float16"),
        (lambda t: put(t, f"{DOWN}_bias", (4, 64)), "no slot takes this tensor, [4, 64] bfloat16"),
    ],
    ids=["gone", "many", "few", "swapped", "odd", "cast", "bias"],
)
def test_a_misfit_is_named(change: Callable[[dict[str, TensorInfo]], Any], words: str) -> None:
    tensors = stacked_after(family("deepseek_v3"))
    change(tensors)
    assert words in str(faults(tensors))


def put(tensors: dict[str, TensorInfo], name: str, shape: tuple[int, ...], dtype: str = "BF16") -> None:
    tensors[name] = tensor(name, dtype, shape)


def test_one_by_one_and_in_a_stack_at_once() -> None:
    error = faults(layout() | stacked_after(family("deepseek_v3")))
    assert error.codes == {"unexpected"} and {GATE_UP, DOWN} <= {fault.tensor for fault in error.faults}


def test_a_bias_that_one_expert_lacks() -> None:
    which = family("gpt_oss")
    tensors = stacked_after(which)
    put(tensors, "model.layers.1.mlp.experts.down_proj_bias", (3, 64))
    with pytest.raises(PlanError, match="slot 3 of w2_bias"):
        plan(which, tensors)


def test_biases_that_are_not_there() -> None:
    """Without them the layer would run all the same."""
    which = family("gpt_oss")
    tensors = {name: info for name, info in stacked_after(which).items() if not name.endswith("_proj_bias")}
    with pytest.raises(PlanError, match="slot 0 of w13_bias: no tensor"):
        plan(which, tensors)


def test_rows_that_take_turns_inside_of_a_block() -> None:
    which = family("gpt_oss")
    tensors = {n: i for n, i in stacked_after(which, hidden=128, width=128).items() if not n.endswith("_proj")}
    for index in (1, 2):
        base = f"model.layers.{index}.mlp.experts"
        for name, rows in (("gate_up_proj", 256), ("down_proj", 128)):
            put(tensors, f"{base}.{name}", (4, 128, rows), "F8_E4M3")
            put(tensors, f"{base}.{name}_weight_scale_inv", (4, rows // 128, 1), "F32")
    with pytest.raises(PlanError, match="gate and up take turns inside of one block"):
        plan(which, tensors, hidden_size=128, moe_intermediate_size=128)


def test_a_stack_of_more_experts_than_can_be() -> None:
    tensors = stacked_after(family("deepseek_v3"))
    put(tensors, GATE_UP, (2**40, 64, 0))
    with pytest.raises(CheckpointError, match="holds 1099511627776 experts"):
        plan(family("deepseek_v3"), tensors)


def test_cut_shares_memory() -> None:
    stacked: Tensor = torch.zeros(2, 4, 6)
    view = View(item=1, rows=range(0, 6, 2), transposed=True)
    Placement(key="x", param="y", expert=0, rows=(0, 3), source=((1, 3), (0, 2)), view=view).cut(stacked, 2).fill_(1)
    assert stacked.sum() == 4 and stacked[1, 0, 2] == 1
