"""Every format from checkpoint to verified layers, by every signature, in a slot and on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loader import BuildError, MoELayer, Plan, PlanError, agreement, build, build_plan
from loader.checkpoint import DTYPES
from loader.formats import FORMATS, layout_of
from loader.verify import tolerance
from tests.loader.fakes import facts_of, family, index_of, layout, shipped
from tests.loader.surgery import rewrite
from tests.loader.test_build import planned
from tests.loader.test_formats import SIGNATURES
from tests.loader.test_verify import checked

EXPERT = "model.layers.1.mlp.experts.3.up_proj."
SHARED = "model.layers.1.mlp.shared_experts.up_proj."


def recipe(name: str, **options: object) -> dict[str, object]:
    return {"family": "glm4_moe", "format_name": name, "shared_format": name, "experts": 8, **options}


def verified(folder: Path, *, on: bool, slots: int = 1) -> tuple[Plan, tuple[MoELayer, ...]]:
    plan, index = planned(folder, on, slots)
    layers = build(plan, index)
    assert all(0 < one.figure <= one.tolerance for one in checked(folder, layers, plan, dtype=torch.float32))
    return plan, layers


@pytest.mark.parametrize("name", FORMATS)
def test_routed_and_shared_alike_fused_and_not(made: Callable[..., Path], name: str) -> None:
    folder = made(**recipe(name))
    (_, separate), (plan, fused) = (verified(folder, on=on) for on in (False, True))
    assert {layer.shared for layer in plan.layers} == {"slot"}
    figures = agreement(separate, fused, hidden_size=64)
    assert max(figures.values()) <= tolerance([name], torch.float32, 64)


@pytest.mark.parametrize("name", FORMATS)
def test_routed_experts_beside_a_bf16_shared_one(made: Callable[..., Path], name: str) -> None:
    plan, _ = verified(made(**recipe(name, shared_format="bf16")), on=False)
    assert {(layer.format, layer.shared_format) for layer in plan.layers} == {(name, "bf16")}


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8_block"])
def test_two_slots_of_one_shared_mlp(made: Callable[..., Path], name: str) -> None:
    """A scale of the whole matrix, or of a row that both halves have, goes to both slots."""
    plan, layers = verified(made(**recipe(name, family="deepseek_v2", experts=16)), on=True, slots=2)
    again = {p.param.rpartition(".")[2] for p in plan.placements if p.again}
    whole = {part.name: part for part in plan.layers[0].layout.parts}
    assert again == {f"w2_{n}" for n, part in whole.items() if part.columns_per_item is None} | {
        f"w13_{n}" for n, part in whole.items() if part.rows_per_item is None
    }
    for attribute in again:
        stacked = getattr(layers[0].experts, attribute)
        assert torch.equal(stacked[16], stacked[17])


# -- other signatures -----------------------------------------------------------------------------------------------


def converted(tensors: dict[str, Tensor], name: str, number: int, scale: str) -> None:
    """Rewrite what was packed by the first signature of a format by another one, in another dtype of the scale."""
    first, other = (shipped().formats[name].signatures[n] for n in (0, number))
    for key in [key for key in tensors if "experts." in key]:
        base, _, suffix = key.rpartition(".")
        role = next(part.role for part in first.parts if part.suffix == suffix)
        stored = tensors.pop(key)
        target = next((part for part in other.parts if part.role == role), None)
        if target is None:
            continue
        dtype = DTYPES[scale if role == "scale" else target.dtypes[0]]
        if dtype is torch.float8_e8m0fnu and stored.dtype is torch.float32:
            stored = 2.0 ** stored.log2().round()
        same_bits = stored.dtype.itemsize == dtype.itemsize == 1
        stored = stored.view(dtype) if same_bits else stored.to(dtype)
        # The last of the shapes that it may have: a column as a vector, a scalar as a vector of one.
        fewer = len(target.shapes[-1])
        tensors[f"{base}.{target.suffix}"] = stored if stored.dim() == fewer else stored.reshape((-1,) * fewer)


@pytest.mark.parametrize(("name", "number", "scale"), SIGNATURES)
def test_every_signature_loads(copied: Callable[..., Path], name: str, number: int, scale: str) -> None:
    folder = copied(**recipe(name))
    usual = {f"w13_{p.name}" for p in layout_of(shipped().formats[name]).parts}
    rewrite(folder, lambda tensors: converted(tensors, name, number, scale))
    plan, _ = verified(folder, on=True)
    assert plan.layers[0].format == name
    assert {p.name.rpartition(".")[2] for p in plan.layers[0].params} >= usual


def test_an_expert_by_another_signature_is_refused(copied: Callable[..., Path]) -> None:
    folder = copied(**recipe("mxfp4"))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{EXPERT}weight_packed"] = tensors.pop(f"{EXPERT}weight")

    rewrite(folder, change)
    with pytest.raises(PlanError) as caught:
        planned(folder)
    assert {(f.tensor, f.code) for f in caught.value.faults} == {
        (f"{EXPERT}weight", "missing"),
        (f"{EXPERT}weight_packed", "unexpected"),
    }


def test_a_scale_of_another_dtype_in_one_expert_is_refused(copied: Callable[..., Path]) -> None:
    folder = copied(**recipe("int4_g32"))
    key = f"{EXPERT}weight_scale"
    rewrite(folder, lambda tensors: tensors.update({key: tensors[key].float()}))
    with pytest.raises(PlanError, match="w13_weight_scale is bfloat16, the tensor float32; a copy would cast"):
        planned(folder)


# -- scales that are wrong ------------------------------------------------------------------------------------------

SCALED = [
    (name, part.suffix)
    for name in FORMATS
    for part in layout_of(shipped().formats[name]).parts
    if part.role != "weight"
]


@pytest.mark.parametrize("everywhere", [False, True], ids=["one", "all"])
@pytest.mark.parametrize("harm", ["shape", "dtype", "missing"])
@pytest.mark.parametrize(("name", "suffix"), SCALED)
def test_a_scale_that_is_wrong(name: str, suffix: str, harm: str, everywhere: bool) -> None:
    tensors, key = layout(name, name), f"{EXPERT}{suffix}"
    for each in [k for k in tensors if "experts." in k and k.endswith(f".{suffix}")] if everywhere else [key]:
        info = tensors.pop(each)
        if harm == "shape":
            tensors[each] = dataclasses.replace(info, shape=(*info.shape, 3))
        elif harm == "dtype":
            tensors[each] = dataclasses.replace(info, dtype="I16")
    with pytest.raises(PlanError) as caught:
        build_plan(index_of(tensors), family(), facts_of(), {}, shipped().formats)
    found = {fault.tensor: fault for fault in caught.value.faults}
    if not everywhere:
        assert found.keys() == {key} and found[key].code == harm
    elif "format" in caught.value.codes:
        # Without its scales an E4M3 weight may be any of several formats: said with all that is there.
        assert "routed experts are stored as" in str(caught.value) and "weight F8_E4M3 [" in str(caught.value)
    else:
        assert found[key].code == harm


def test_a_missing_factor_says_what_is_never_written(copied: Callable[..., Path]) -> None:
    folder = copied(**recipe("nvfp4"))
    rewrite(folder, lambda tensors: [tensors.pop(k) for k in list(tensors) if k.endswith("up_proj.weight_scale_2")])
    with pytest.raises(PlanError, match="slot 3 of w13_weight_scale_2 is never written: no tensor") as caught:
        planned(folder, on=True)
    assert f"{SHARED}weight_scale_2" in {fault.tensor for fault in caught.value.faults}


def test_a_scale_of_the_wrong_shape_says_which_it_takes(copied: Callable[..., Path]) -> None:
    folder = copied(**recipe("fp8_channel"))
    key = f"{EXPERT}weight_scale"
    rewrite(folder, lambda tensors: tensors.update({key: tensors[key].T.contiguous()}))
    with pytest.raises(PlanError) as caught:
        planned(folder)
    assert "w13_weight_scale takes [32, 1] or [32] bfloat16, the tensor is [1, 32] bfloat16" in str(caught.value)


# -- what is read and not used --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvfp4", "fp8_tensor"])
def test_scales_of_activations_are_accounted_for(copied: Callable[..., Path], name: str) -> None:
    folder = copied(**recipe(name))
    plan, index = planned(folder, on=True)
    named = {key for key in index.tensors if key.endswith(".input_scale") and (".1.mlp." in key or ".2.mlp." in key)}
    assert {key for layer in plan.layers for key in layer.unused} == named and len(named) == 2 * 9 * 3
    assert "54 tensors of quantized activations not used" in "\n".join(plan.lines())
    answer = plan.as_json(tensors=True)["layers"][0]
    assert answer["unused"] == 27 == len(answer["unused_tensors"])

    forgetful = dataclasses.replace(plan.layers[1], unused=plan.layers[1].unused[1:])
    with pytest.raises(BuildError, match="input_scale` is never used"):
        build(dataclasses.replace(plan, layers=(forgetful,)), index)
    twice = dataclasses.replace(plan.layers[1], unused=(*plan.layers[1].unused, plan.layers[1].unused[0]))
    with pytest.raises(BuildError, match="is used 2 times"):
        build(dataclasses.replace(plan, layers=(twice,)), index)

    rewrite(folder, lambda tensors: [tensors.pop(k) for k in list(tensors) if k.endswith("input_scale")])
    assert not any(layer.unused for layer in verified(folder, on=True)[0].layers)


def test_a_scale_of_activations_that_is_none(copied: Callable[..., Path]) -> None:
    folder = copied(**recipe("nvfp4"))
    key = f"{EXPERT}input_scale"
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(7)}))
    with pytest.raises(PlanError, match=r"input_scale takes \[\] or \[1\] float32, the tensor is \[7\] float32"):
        planned(folder)
