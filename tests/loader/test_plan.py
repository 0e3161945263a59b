"""Plans: every slot from one tensor, every tensor to one slot, and each kind of misfit an error that names it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatekeeper import CheckpointError, TensorInfo
from loader import Plan, PlanError, build_plan
from loader.accounts import Ledger
from loader.build import assemble
from loader.formats import FORMATS
from tests.loader.fakes import decided, facts_of, family, index_of, layout, named_after, shipped, tensor

SHARED = "model.layers.{}.mlp.shared_experts.{}_proj.{}"


def plan(tensors: dict[str, TensorInfo], decisions: object = None, name: str = "deepseek_v3", **model: object) -> Plan:
    return build_plan(index_of(tensors), family(name), facts_of(**model), decisions or {}, shipped().formats)


def faults(tensors: dict[str, TensorInfo], decisions: object = None, **model: object) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan(tensors, decisions, **model)
    return caught.value


def test_fused_shared_expert_is_the_slot_behind_the_routed_ones() -> None:
    layer = plan(layout("int4_g32", "int4_g32"), decided([1, 2])).layers[0]
    shapes = {p.name.rpartition(".")[2]: p.shape for p in layer.params if ".experts." in p.name}
    assert shapes == {
        "w13_weight_packed": (5, 64, 8),
        "w13_weight_scale": (5, 64, 2),
        "w2_weight_packed": (5, 64, 4),
        "w2_weight_scale": (5, 64, 1),
    }
    placed = {p.key: p for p in layer.placements}
    gate, up, down = (placed[SHARED.format(1, p, "weight_packed")] for p in ("gate", "up", "down"))
    assert [(p.param, p.expert, p.rows, p.source) for p in (gate, up, down)] == [
        ("layers.1.experts.w13_weight_packed", 4, (0, 32), None),
        ("layers.1.experts.w13_weight_packed", 4, (32, 64), None),
        ("layers.1.experts.w2_weight_packed", 4, (0, 64), None),
    ]
    assert (layer.shared, layer.n_slots, layer.shared_format) == ("slot", 5, None)


def test_each_layer_obeys_its_own_decision() -> None:
    found = plan(layout(), decided([2], off=[1]))
    assert {layer.index: layer.shared for layer in found.layers} == {1: "separate", 2: "slot"}
    assert (found.fusion.layers_fused, found.fusion.layers_separate, found.fusion.gemms_saved) == (1, 1, 2)


@pytest.mark.parametrize("state", ["pending", "off", "error", "mixed"])
def test_whatever_is_not_on_is_off(state: str) -> None:
    decisions = decided([1, 2])
    for layer in decisions["shared_experts_fusion"].layers:
        layer.state = state
    assert {layer.shared for layer in plan(layout(), decisions).layers} == {"separate"}


def test_separate_shared_expert_keeps_its_own_format() -> None:
    layer = plan(layout("int4_g32", "bf16")).layers[0]
    assert (layer.shared, layer.format, layer.shared_format) == ("separate", "int4_g32", "bf16")
    assert ("layers.1.shared.w13_weight", (1, 64, 64)) in [(p.name, p.shape) for p in layer.params]


def test_two_shared_experts_are_two_slots_of_one_mlp() -> None:
    found = plan(layout(n_shared=2), decided([1, 2], slots=2), n_shared_experts=2)
    placed = [p for p in found.layers[0].placements if "shared_experts" in p.key]
    sources = {(p.key.split(".")[-2], p.expert): p.source for p in placed}
    assert sources == {
        ("gate_proj", 4): ((0, 32), (0, 64)),
        ("gate_proj", 5): ((32, 64), (0, 64)),
        ("up_proj", 4): ((0, 32), (0, 64)),
        ("up_proj", 5): ((32, 64), (0, 64)),
        ("down_proj", 4): ((0, 64), (0, 32)),
        ("down_proj", 5): ((0, 64), (32, 64)),
    }


def test_a_cut_through_a_block_is_refused() -> None:
    # 2 x 48 columns are three blocks of 32: the second slot would begin in the middle of one.
    tensors = layout("mxfp4", "mxfp4", n_shared=2, width=64)
    narrow = layout("fp8_block", "fp8_block", n_shared=2, width=64)
    assert (
        plan(tensors, decided([1, 2], slots=2), n_shared_experts=2, moe_intermediate_size=64).fusion.layers_fused == 2
    )
    error = faults(narrow, decided([1, 2], slots=2), n_shared_experts=2, moe_intermediate_size=64)
    assert "block of 128" in str(error)


# -- issue: a decision that should never have been on ---------------------------------------------------------------


def test_bf16_shared_expert_in_an_int4_slot_is_never_written() -> None:
    error = faults(layout("int4_g32", "bf16"), decided([1, 2]))
    assert error.codes == {"missing", "unexpected"}
    line = "missing: layers 1-2, slot 4 of w13_weight_packed is never written: no tensor"
    assert f"{line}: `model.layers.{{N}}.mlp.shared_experts.gate_proj.weight_packed`" in str(error)
    assert SHARED.format(1, "gate", "weight") in [f.tensor for f in error.faults if f.code == "unexpected"]


def test_bf16_shared_expert_in_an_mxfp4_slot_does_not_fit() -> None:
    error = faults(layout("mxfp4", "bf16"), decided([1, 2]))
    shape = [f for f in error.faults if f.code == "shape"]
    assert {f.tensor for f in shape} == {SHARED.format(n, p, "weight") for n in (1, 2) for p in ("gate", "up", "down")}
    assert "slot 4 of w13_weight takes [32, 32] uint8, the tensor is [32, 64] bfloat16" in str(error)


@pytest.mark.parametrize(
    ("routed", "shared", "ours", "theirs"),
    [("fp8_block", "bf16", "float8_e4m3fn", "bfloat16"), ("bf16", "fp8_block", "bfloat16", "float8_e4m3fn")],
)
def test_a_copy_that_would_cast_in_silence_is_refused(routed: str, shared: str, ours: str, theirs: str) -> None:
    error = faults(layout(routed, shared), decided([1, 2]))
    assert "dtype" in error.codes and "shape" not in error.codes
    assert f"slot 4 of w13_weight is {ours}, the tensor {theirs}; a copy would cast in silence" in str(error)


def test_a_shared_expert_wider_than_its_slots() -> None:
    error = faults(layout(n_shared=2), decided([1, 2]))
    assert error.codes == {"shape"} and "takes [32, 64] bfloat16, the tensor is [64, 64] bfloat16" in str(error)


# -- each kind of fault ---------------------------------------------------------------------------------------------


def test_all_faults_at_once_sorted_by_layer_and_tensor() -> None:
    tensors = layout()
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    del tensors["model.layers.1.mlp.gate.weight"]
    odd = "model.layers.1.mlp.experts.0.gate_proj.bias"
    tensors[odd] = tensor(odd, "BF16", (32,))
    error = faults(tensors)
    assert [(f.layer, f.tensor, f.code) for f in error.faults] == [
        (1, odd, "unexpected"),
        (1, "model.layers.1.mlp.gate.weight", "missing"),
        (2, "model.layers.2.mlp.experts.3.up_proj.weight", "missing"),
    ]


def test_a_whole_expert_is_missing() -> None:
    tensors = {name: info for name, info in layout().items() if ".1.mlp.experts.2." not in name}
    assert {f.tensor for f in faults(tensors).faults} == {
        f"model.layers.1.mlp.experts.2.{p}_proj.weight" for p in ("gate", "up", "down")
    }


def test_a_slot_written_twice() -> None:
    tensors = layout(experts=5)  # expert 4 of five, where config.json has four and the fifth slot is the shared one
    tensors["model.layers.1.mlp.gate.weight"] = tensor("model.layers.1.mlp.gate.weight", "BF16", (4, 64))
    error = faults({n: i for n, i in tensors.items() if ".1." in n or ".2." in n}, decided([1, 2]))
    doubled = {f.tensor for f in error.faults if f.code == "doubled"}
    assert SHARED.format(1, "gate", "weight") in doubled
    assert "already written by `model.layers.{N}.mlp.experts.4.gate_proj.weight`" not in str(error)
    assert "already written by `model.layers.1.mlp.experts.4.gate_proj.weight`" in str(error)


def test_experts_that_nobody_asked_for() -> None:
    error = faults(layout(experts=5) | {n: i for n, i in layout().items() if "gate." in n})
    assert error.codes == {"unexpected"}
    assert {f.tensor.split(".")[5] for f in error.faults} == {"4"}


def test_a_shared_expert_that_config_has_not() -> None:
    error = faults(layout(), n_shared_experts=0)
    assert error.codes == {"unexpected"} and len(error.faults) == 6


@pytest.mark.parametrize("on", [[], [1, 2]], ids=["separate", "fused"])
def test_no_shared_expert_where_config_has_one(on: list[int]) -> None:
    error = faults(layout(shared=None), decided(on))
    assert error.codes == {"missing"} and SHARED.format(1, "gate", "weight") in {f.tensor for f in error.faults}


def test_wrong_shape_and_dtype_of_one_expert() -> None:
    tensors = layout("mxfp4", "mxfp4")
    shape, dtype = (
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "model.layers.2.mlp.experts.1.down_proj.weight_scale",
    )
    tensors[shape] = tensor(shape, "U8", (32, 64))
    tensors[dtype] = tensor(dtype, "I8", (64, 1))
    assert [(f.tensor, f.code) for f in faults(tensors).faults] == [(shape, "shape"), (dtype, "dtype")]


def test_a_quantized_router_is_refused() -> None:
    tensors = layout()
    name = "model.layers.1.mlp.gate.weight"
    tensors[name] = tensor(name, "F8_E4M3", (4, 64))
    assert [(f.tensor, f.code) for f in faults(tensors).faults] == [(name, "dtype")]


def test_a_format_the_loader_has_not() -> None:
    tensors = {n: dataclasses.replace(i, dtype="F64") if "experts." in n else i for n, i in layout().items()}
    error = faults(tensors)
    assert error.codes == {"format"} and "stored as weight F64" in str(error) and "int4_g32" in str(error)


def test_layers_that_config_and_tensors_disagree_about() -> None:
    error = faults(layout(layers=(0, 1)))
    assert [(f.layer, f.code) for f in error.faults] == [(0, "unexpected"), (2, "missing")]


def test_the_router_needs_its_bias() -> None:
    tensors = {n: i for n, i in layout().items() if not n.endswith("1.mlp.gate.e_score_correction_bias")}
    assert "router.e_score_correction_bias is never written" in str(faults(tensors))


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_a_shared_expert_needs_the_gate_that_its_family_has(fused: bool) -> None:
    which = dataclasses.replace(family("qwen2_moe"), moe_layer=family("deepseek_v3").moe_layer)
    tensors = {n: i for n, i in named_after(which).items() if not n.endswith("1.mlp.shared_expert_gate.weight")}
    with pytest.raises(PlanError, match=r"shared_gate\.weight is never written: no tensor"):
        build_plan(index_of(tensors), which, facts_of(), decided([1, 2] if fused else []), shipped().formats)


def test_what_the_loader_cannot_compute_is_refused_before_planning() -> None:
    for model, word in (
        ({"scoring_func": "sqrtsoftplus"}, "sqrtsoftplus"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"hidden_act": None}, "`hidden_act` is said neither by the config nor by the family"),
        ({"swiglu_limits": (7.0, 0.0)}, "swiglu_limits"),
        ({"hidden_act": "gelu_pytorch_tanh", "swiglu_alpha": 1.7}, "swiglu_alpha"),
        ({"moe_latent_size": 32}, "moe_latent_size"),
        ({"n_group": 3, "topk_group": 1}, "4 experts can't be in 3 groups"),
        ({"num_experts_per_tok": 5}, "top 5"),
    ):
        with pytest.raises(CheckpointError, match=word):
            plan(layout(), **model)
    with pytest.raises(CheckpointError, match="does not give `hidden_size`"):
        plan(layout(), hidden_size=None)
    with pytest.raises(CheckpointError, match="a kind that this loader does not compute"):
        plan(layout(), name="nemotron_h")


# -- bytes and printing ---------------------------------------------------------------------------------------------


def test_bytes_of_ranks() -> None:
    whole = plan(layout())
    one_expert, router = 3 * 32 * 64 * 2, 4 * 64 * 2 + 4 * 4
    assert whole.nbytes == 2 * (5 * one_expert + router) == whole.per_rank.nbytes
    tp = plan(layout(), parallel__tp_size=2)
    assert tp.per_rank.nbytes == 2 * (5 * one_expert // 2 + router)
    # Expert parallelism keeps the shared slot on every rank; an expert on its own is cut instead.
    ep = plan(layout(), decided([1, 2]), parallel__tp_size=2, parallel__ep_size=2)
    assert ep.per_rank.nbytes == 2 * (3 * one_expert + router)
    assert ep.fusion.extra_bytes_per_rank == 2 * one_expert // 2
    odd = plan(layout("int4_g32", "int4_g32"), parallel__tp_size=2)
    assert odd.per_rank.nbytes is None and "width 32 in 2 parts" in odd.per_rank.note


def test_prints_and_serialises() -> None:
    found = plan(layout(), decided([1, 2]))
    text = "\n".join(found.lines())
    assert "layers 1-2: 4 routed experts in bf16, shared expert in slot 4, backend eager" in text
    assert "saves 4 GEMMs and 8 launches" in text
    answer = json.loads(json.dumps(found.as_json(tensors=True)))
    assert answer["bytes"] == found.nbytes and answer["layers"][0]["n_slots"] == 5
    assert len(answer["layers"][0]["tensors"]) == 2 + 5 * 3
    assert "tensors" not in found.as_json()["layers"][0]


def test_the_backend_is_the_decision() -> None:
    assert {layer.backend for layer in plan(layout(), decided([], backend="grouped_mm")).layers} == {"grouped_mm"}
    assert {layer.backend for layer in plan(layout()).layers} == {"eager"}


# -- the ledger -----------------------------------------------------------------------------------------------------


def test_the_ledger_finds_what_does_not_add_up() -> None:
    ledger = Ledger({("a", 0): 4, ("b", None): 2}, {"x": (4, 2), "y": (2,), "z": (3,)})
    ledger.write(("a", 0), (0, 2), "x", ((0, 2), (0, 2)))
    ledger.write(("a", 0), (1, 3), "x", ((1, 3), (0, 2)))
    ledger.write(("b", None), (0, 2), "y")
    ledger.write(("c", 1), (0, 1), "w")
    ledger.read("y")
    assert ledger.faults() == [
        "`w` is not of these layers",
        "`x` has a block that is used twice, at row 1",
        "`y` is used 2 times",
        "`z` is never used",
        "slot 0 of a row 1 is written twice, the second time from `x`",
        "slot 0 of a rows 3:4 are never written",
        "slot 1 of c is in no layer",
    ]


def test_the_ledger_balances() -> None:
    ledger = Ledger({("a", 0): 4}, {"x": (4, 2)})
    for rows in ((2, 4), (0, 2)):
        ledger.write(("a", 0), rows, "x", (rows, (0, 2)))
    assert ledger.faults() == []


# -- families ---------------------------------------------------------------------------------------------------

READABLE = [
    name
    for name, one in sorted(shipped().families.items())
    if one.names.routed and set(one.names.projections) == {"gate", "up", "down"} and one.names.router
]


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("name", READABLE)
def test_a_family_needs_no_python(name: str, fused: bool) -> None:
    which = family(name)
    has_shared = bool(which.names.shared)
    tensors = named_after(which)
    facts = facts_of(n_shared_experts=int(has_shared))
    # Whatever this family says of its layers in config.json, the two that are there are the ones it has.
    which = dataclasses.replace(which, moe_layer=family("deepseek_v3").moe_layer)
    found = build_plan(
        index_of(tensors), which, facts, decided([1, 2] if fused and has_shared else []), shipped().formats
    )
    assert {p.key for p in found.placements} == set(tensors)
    assert {layer.shared for layer in found.layers} == {"none" if not has_shared else "slot" if fused else "separate"}
    for layer in found.layers:
        assert assemble(layer, found.router, found.experts).layer.index == layer.index, (
            "its modules have the plan's parameters"
        )


def test_hostile_counts_are_refused_before_anything_is_done_that_often() -> None:
    for count in ({"n_routed_experts": 2**40}, {"n_shared_experts": 2**40}):
        with pytest.raises(CheckpointError, match="the checkpoint only 34 tensors"):
            plan(layout(), decided([1, 2], slots=2**40), **count)


# -- random layouts -------------------------------------------------------------------------------------------------

layouts = st.fixed_dictionaries(
    {
        "routed": st.sampled_from(sorted(FORMATS)),
        "experts": st.integers(2, 5),
        "width": st.sampled_from([32, 64]),
        "hidden": st.sampled_from([32, 64, 96]),
        "n_shared": st.integers(1, 2),
    }
)


@given(layouts, st.booleans(), st.data())
def test_any_one_tensor_deleted_doubled_or_renamed_is_named(
    kind: dict[str, object], fused: bool, data: st.DataObject
) -> None:
    slots = int(kind["n_shared"])  # type: ignore[call-overload]
    if kind["routed"] == "fp8_block" and fused:
        slots = kind["n_shared"] = 1  # two slots would cut through its blocks of 128
    tensors = layout(shared=str(kind["routed"]), **kind)  # type: ignore[arg-type]
    model = {
        "hidden_size": kind["hidden"],
        "moe_intermediate_size": kind["width"],
        "n_routed_experts": kind["experts"],
        "n_shared_experts": slots,
    }
    decisions = decided([1, 2] if fused else [], slots=slots)
    whole = plan(tensors, decisions, **model)
    keys = [p.key for p in whole.placements] + [n.key for layer in whole.layers for n in layer.notes]
    assert set(keys) == set(tensors), "every tensor is used"

    name = data.draw(st.sampled_from(sorted(tensors)), label="tensor")
    action = data.draw(st.sampled_from(["delete", "double", "rename", "reshape", "retype"]), label="action")
    changed = dict(tensors)
    info = changed[name]
    named = name
    if action == "delete":
        del changed[name]
    elif action == "double":
        named = f"{name}_copy"
        changed[named] = dataclasses.replace(info, name=named)
    elif action == "rename":
        del changed[name]
        changed[f"{name}_x"] = dataclasses.replace(info, name=f"{name}_x")
    elif action == "reshape":
        changed[name] = dataclasses.replace(info, shape=(*info.shape[:-1], info.shape[-1] + 1) if info.shape else (2,))
    else:
        changed[name] = dataclasses.replace(info, dtype="C64")
    error = faults(changed, decisions, **model)
    assert named in {fault.tensor for fault in error.faults}
    if action == "rename":
        assert f"{name}_x" in {fault.tensor for fault in error.faults}
