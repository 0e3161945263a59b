"""Verification notices what strict loading can't: right tensors, wrong numbers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gatekeeper import read_facts
from loader import (
    LayerPlan,
    MoELayer,
    Plan,
    RouterConfig,
    VerificationError,
    Verified,
    Verifier,
    agreement,
    build,
    verify,
)
from loader.backends import compute_dtype, e4m3, rounding
from loader.checkpoint import Checkpoint
from loader.gathered import moved
from loader.kernels.base import Kernel
from loader.kernels.eager import eager
from loader.planner import runner_layers
from loader.rank import plan_of_rank
from loader.raw import Reader
from loader.spots import compare_rows, spots_of
from loader.verify import relative_error, tolerance
from tests.loader import fake_device
from tests.loader.fakes import shipped
from tests.loader.test_build import planned

CASES = {
    "kimi_k25-int4": {"family": "kimi_k25", "format_name": "int4_g32", "experts": 16},
    "kimi_k25-mxfp4": {"family": "kimi_k25", "format_name": "mxfp4", "experts": 16},
    "deepseek_v3-bf16": {"family": "deepseek_v3", "format_name": "bf16", "experts": 16},
    "deepseek_v3-fp8": {"family": "deepseek_v3", "format_name": "fp8_block", "experts": 16},
    "deepseek_v2-bf16": {"family": "deepseek_v2", "format_name": "bf16", "experts": 16},
    "glm4_moe-fp16": {"family": "glm4_moe", "format_name": "fp16", "experts": 8},
}
WIDE = {
    "kimi_k25-int4": {"family": "kimi_k25", "format_name": "int4_g32", "shared_format": "int4_g32"},
    "kimi_k25-mxfp4": {"family": "kimi_k25", "format_name": "mxfp4"},
    "deepseek_v3-fp8": {"family": "deepseek_v3", "format_name": "fp8_block"},
    "deepseek_v2-bf16": {"family": "deepseek_v2", "format_name": "bf16"},
}
FUSIBLE = {name: case for name, case in CASES.items() if name != "kimi_k25-int4"}


def checked(folder: Path, layers: tuple[MoELayer, ...], plan: Plan, **options: object) -> tuple[Verified, ...]:
    facts = read_facts(folder)
    family = shipped().families[str(facts.values["model.family"])]
    _, index = planned(folder)
    options = {"tokens": 16, **options}
    return verify(layers, plan, index, runner_layers(index, family, facts), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_what_the_checkpoint_says(
    made: Callable[..., Path], case: str, dtype: torch.dtype, backend: str
) -> None:
    folder = made(**CASES[case])
    slots = 2 if case.startswith("deepseek_v2") else 1
    for on in (False, True) if case in FUSIBLE else (False,):
        plan, index = planned(folder, on, slots, backend)
        found = checked(folder, build(plan, index), plan, dtype=dtype)
        assert [one.index for one in found] == [1, 2]
        # A comparison that could not fail would be worth nothing: the figures are no zeros, and near their bound.
        assert all(0 < one.figure <= one.tolerance and one.tokens > 8 for one in found)


@pytest.mark.parametrize("case", FUSIBLE)
def test_a_fused_and_an_unfused_load_agree(made: Callable[..., Path], case: str) -> None:
    folder = made(**CASES[case])
    plans = [planned(folder, on, 2 if case.startswith("deepseek_v2") else 1) for on in (False, True)]
    separate, fused = (build(plan, index) for plan, index in plans)
    assert [layer.shared is None for layer in (*separate, *fused)] == [False, False, True, True]
    figures = agreement(separate, fused, hidden_size=64)
    allowed = tolerance([plans[0][0].layers[0].format], torch.float32, 64)
    assert set(figures) == {1, 2} and max(figures.values()) <= allowed


@pytest.mark.parametrize("harm", ["shared", "slot", "router", "bias", "scale", "nan"])
def test_a_wrong_number_is_an_error_with_layer_and_figure(made: Callable[..., Path], harm: str) -> None:
    folder = made(family="kimi_k25", format_name="mxfp4", experts=16)
    plan, index = planned(folder, on=harm == "slot")
    layers = build(plan, index)
    layer = layers[1]
    with torch.no_grad():
        if harm == "shared":
            layer.shared.experts.w2_weight_scale += 1  # type: ignore[union-attr]
        elif harm == "slot":
            # What an uninitialised slot looks like at its most harmless.
            layer.experts.w13_weight_scale[-1] = 0
        elif harm == "router":
            layer.router.weight.copy_(layer.router.weight.flip(0).clone())
        elif harm == "bias":
            layer.router.e_score_correction_bias.zero_()
        elif harm == "scale":
            layer.experts.w2_weight_scale += 1
        else:
            layer.experts.w13_weight_scale.fill_(255)
    with pytest.raises(VerificationError, match="layer 2 ") as caught:
        checked(folder, layers, plan)
    assert caught.value.layer == 2 and not caught.value.figure <= caught.value.tolerance
    assert f"{caught.value.figure:.3g}" in str(caught.value)


# -- the backend --------------------------------------------------------------------------------------------------


def wrong_by(factor: float) -> Kernel:
    return lambda x_TD, weights_TK, ids_TK, weights: eager(x_TD, weights_TK, ids_TK, weights) * factor


def with_kernel(layers: tuple[MoELayer, ...], kernel: Kernel) -> tuple[MoELayer, ...]:
    for layer in layers:
        layer.experts.kernel = kernel
        if layer.shared is not None:
            layer.shared.experts.kernel = kernel
    return layers


@pytest.mark.parametrize("on", [False, True], ids=["separate", "slot"])
def test_a_backend_that_computes_wrongly_is_named(made: Callable[..., Path], on: bool) -> None:
    plan, index = planned(folder := made(**CASES["kimi_k25-mxfp4"]), on, backend="grouped_mm")
    says = "layer 1 .*backend `grouped_mm` is off by 0.2.* is at fault: .*moe_runner_backend=eager"
    with pytest.raises(VerificationError, match=says) as caught:
        checked(folder, with_kernel(build(plan, index), wrong_by(1.25)), plan)
    assert caught.value.tolerance < caught.value.figure
    with pytest.raises(VerificationError, match="backend"):
        checked(folder, with_kernel(build(plan, index), wrong_by(float("nan"))), plan)
    # What was loaded wrongly is no fault of the backend.
    layers = build(plan, index)
    layers[0].experts.w2_weight_scale += 1
    with pytest.raises(VerificationError, match=r"loaded wrongly$"):
        checked(folder, layers, plan)


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_kernel_of_triton_may_round_but_not_be_wrong(made: Callable[..., Path], name: str) -> None:
    """FP8 is compared with what is rounded to E4M3 as kernels do it, so that a tenth too much is found there too."""
    plan, index = planned(folder := made(**CASES[name]))
    plan = dataclasses.replace(plan, layers=tuple(dataclasses.replace(one, backend="triton") for one in plan.layers))
    built = dataclasses.replace(plan, layers=tuple(dataclasses.replace(one, backend="eager") for one in plan.layers))
    checked(folder, with_kernel(build(built, index), rounding), plan)
    wrong = with_kernel(build(built, index), lambda *arguments: rounding(*arguments) * 1.1)
    with pytest.raises(VerificationError, match=r"backend `triton` is off by 0\.(09|1)"):
        checked(folder, wrong, plan)


def test_rounding_to_e4m3_is_by_blocks_of_128() -> None:
    rows = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 0.0])[:, None]
    rounded = e4m3(rows)
    assert ((rounded - rows).abs() <= rows.abs() * 2**-4 + rows.abs().amax() * 2**-17).all()
    assert not torch.equal(rounded, rows)
    # A block's scale is its own: what is small beside another block keeps its digits.
    apart = torch.cat([torch.full((1, 128), 1000.0), rows[:1, :72] * 1e-3], 1)
    torch.testing.assert_close(e4m3(apart)[:, 128:], e4m3(rows[:1, :72] * 1e-3), rtol=0, atol=0)


def test_a_router_of_triton_kernels_may_be_at_fault_itself(made: Callable[..., Path]) -> None:
    plan, index = planned(folder := made(**CASES["kimi_k25-mxfp4"]))
    layers = build(plan, index)
    layers[0].router.weight.copy_(layers[0].router.weight.flip(0).clone())
    with pytest.raises(VerificationError, match=r"its router is off by .*; the layer was loaded wrongly$"):
        checked(folder, layers, plan)
    plan = dataclasses.replace(plan, layers=tuple(dataclasses.replace(one, backend="triton") for one in plan.layers))
    with pytest.raises(VerificationError, match=r"wrongly or the router of its backend `triton` is at fault: try"):
        checked(folder, layers, plan)


def test_a_backend_runs_once_for_each_kind_of_layer_and_in_no_float32(made: Callable[..., Path]) -> None:
    plan, index = planned(folder := made(**WIDE["kimi_k25-mxfp4"], width=512, experts=16), True, backend="grouped_mm")
    called: list[torch.dtype] = []

    def kernel(x_TD: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert x_TD.dtype != torch.float32
        called.append(x_TD.dtype)
        return eager(x_TD, *rest)

    first, second = checked(folder, with_kernel(build(plan, index), kernel), plan)
    assert first.backend and first.backend.backend == "grouped_mm" and not first.backend.whole
    assert 0 < first.backend.figure <= first.backend.tolerance
    assert second.backend is None and called == [torch.bfloat16]
    # Another kind of layer is another kernel, maybe.
    other = dataclasses.replace(plan.layers[1], dense_shared_from=5)
    plan = dataclasses.replace(plan, layers=(plan.layers[0], other))
    assert all(one.backend for one in checked(folder, with_kernel(build(plan, index), kernel), plan))
    assert len(called) == 3
    plan = dataclasses.replace(plan, layers=tuple(dataclasses.replace(one, backend="eager") for one in plan.layers))
    assert not any(one.backend for one in checked(folder, build(plan, index), plan))


@pytest.mark.parametrize("layout", [None, (1, 2, 2)], ids=str)
@pytest.mark.parametrize("case", WIDE)
@pytest.mark.parametrize("on", [False, True], ids=["separate", "slot"])
def test_a_device_is_waited_for_three_times_a_layer(
    made: Callable[..., Path], case: str, on: bool, layout: tuple[int, int, int] | None
) -> None:
    folder = made(**WIDE[case], width=512, layers=3, experts=16)
    plan, index = planned(folder, on, 2 if case.startswith("deepseek_v2") else 1, backend="grouped_mm")
    plan = plan if layout is None else plan_of_rank(plan, *layout)
    widths: list[tuple[int, ...]] = []

    def kernel(x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, weights: Any) -> torch.Tensor:
        widths.append(tuple(weights.dequantize(ids_TK[0, :1], x_TD.dtype)[1].shape[1:]))
        return eager(x_TD, weights_TK, ids_TK, weights)

    layers = with_kernel(build(plan, index), kernel)
    facts = read_facts(folder)
    verifier = Verifier(plan, runner_layers(index, shipped().families[str(facts.values["model.family"])], facts))
    waits = []
    with Checkpoint(index) as checkpoint:
        for layer, layer_plan in zip(layers, plan.layers, strict=True):
            fake_device.put(layer)
            with fake_device.counted() as calls:
                verifier(layer, layer_plan, checkpoint)()
            waits.append(fake_device.synchronisations(calls))
    assert all(each == 3 for each in waits[1:]) and waits[0] > 3  # the first one's backend is compared, by eager
    checks = [one.backend for one in verifier.verified]
    assert checks[0] and checks[0].whole and 0 < checks[0].figure <= checks[0].tolerance and not any(checks[1:])
    assert set(widths) == {(64, plan.layers[0].width)} | (set() if on else {(64, plan.layers[0].shared_width)})


def test_what_a_backend_computes_in(made: Callable[..., Path]) -> None:
    plans = {name: planned(made(**case))[0].layers[0] for name, case in CASES.items()}
    on_triton = {name: dataclasses.replace(plan, backend="triton") for name, plan in plans.items()}
    half = {name for name, plan in on_triton.items() if compute_dtype(plan) != torch.bfloat16}
    assert half == {"glm4_moe-fp16"} and all(compute_dtype(plan) == torch.bfloat16 for plan in plans.values())


@pytest.mark.parametrize("there", [torch.device("cpu"), fake_device.DEVICE], ids=str)
def test_tensors_of_all_kinds_move_together(there: torch.device) -> None:
    some = [torch.randn(3, 5), torch.tensor([[7]]), torch.arange(6).view(2, 3).T.to(torch.uint8), torch.randn(0, 4)]
    some += [torch.randn(5).bfloat16(), torch.randn(7, 3).to(torch.float8_e4m3fn)[:, 1]]
    with fake_device.counted() as calls:
        for one, other in zip(some, moved(moved(some, there), torch.device("cpu")), strict=True):
            assert one.dtype == other.dtype and torch.equal(one.float(), other.float())
    assert fake_device.synchronisations(calls) == (0 if there.type == "cpu" else 2)


# -- wide experts, of which only strips are computed --------------------------------------------------------------

LAYOUTS = [None, (1, 2, 1), (3, 4, 2), (1, 4, 4)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("on", [False, True], ids=["separate", "slot"])
@pytest.mark.parametrize("case", WIDE)
def test_strips_of_every_rank_are_what_the_checkpoint_says(
    made: Callable[..., Path], case: str, on: bool, layout: tuple[int, int, int] | None
) -> None:
    folder = made(**WIDE[case], width=512, layers=2, experts=16)
    plan, index = planned(folder, on, 2 if case.startswith("deepseek_v2") else 1)
    if layout is not None:
        plan = plan_of_rank(plan, *layout)
    for seed in range(3):
        (found,) = checked(folder, build(plan, index), plan, tokens=2, seed=seed)
        assert 0 < found.figure <= found.tolerance and found.tokens == 2
        parts = len(plan.layers[0].layout.parts)
        assert found.rows == 3 * parts * (plan.layers[0].n_slots + (not on)) and found.experts > 1


@pytest.fixture(scope="module")
def wide(made: Callable[..., Path]) -> tuple[Path, Plan, tuple[MoELayer, ...]]:
    folder = made(family="kimi_k25", format_name="mxfp4", width=256, layers=2, experts=16)
    plan, index = planned(folder, on=True)
    return folder, plan, build(plan, index)


def swapped_slots(layer: MoELayer) -> None:
    for parameter in layer.experts.parameters():
        parameter[[2, 5]] = parameter[[5, 2]].clone()


def swapped_gate_and_up(layer: MoELayer) -> None:
    for name, parameter in layer.experts.named_parameters():
        if name.startswith("w13"):
            parameter.copy_(torch.cat(parameter.chunk(2, 1)[::-1], 1))


def swapped_gate_and_up_in_one(layer: MoELayer) -> None:
    for name, parameter in layer.experts.named_parameters():
        if name.startswith("w13"):
            parameter[11] = torch.cat(parameter[11].chunk(2)[::-1])


HARMS: dict[str, Callable[[MoELayer], object]] = {
    "two slots swapped": swapped_slots,
    "shared slot never written": lambda layer: [p[-1].fill_(0x33) for p in layer.experts.parameters()],
    "gate and up swapped": swapped_gate_and_up,
    "gate and up swapped in one slot": swapped_gate_and_up_in_one,
    "scales of another expert": lambda layer: layer.experts.w2_weight_scale[9].copy_(layer.experts.w2_weight_scale[3]),
    "all scales off by a factor": lambda layer: layer.experts.w13_weight_scale.add_(1),
    "router's rows swapped": lambda layer: layer.router.router.weight.copy_(layer.router.router.weight.flip(0).clone()),
    "shared weight": lambda layer: setattr(layer.router.router, "config", other_factor(layer.router.router.config)),
    "rows shifted": lambda layer: layer.experts.w13_weight.copy_(layer.experts.w13_weight.roll(1, 1)),
}


def other_factor(config: RouterConfig) -> RouterConfig:
    return dataclasses.replace(config, routed_scaling_factor=1.0)


@pytest.mark.parametrize("harm", HARMS)
def test_harm_that_two_tokens_and_a_row_of_each_slot_find(
    wide: tuple[Path, Plan, tuple[MoELayer, ...]], harm: str
) -> None:
    folder, plan, layers = wide
    spoiled = copy.deepcopy(layers)
    with torch.no_grad():
        HARMS[harm](spoiled[0])
    for seed in range(3):
        with pytest.raises(VerificationError, match="layer 1 "):
            checked(folder, spoiled, plan, tokens=2, seed=seed)


def test_a_slot_that_no_token_chose_is_found_by_its_row(wide: tuple[Path, Plan, tuple[MoELayer, ...]]) -> None:
    folder, plan, layers = wide
    spoiled = copy.deepcopy(layers)
    facts = read_facts(folder)
    family = shipped().families[str(facts.values["model.family"])]
    index = planned(folder)[1]
    tensors = runner_layers(index, family, facts)[0]
    with Checkpoint(index) as checkpoint:
        spots = spots_of(spoiled[0], plan.layers[0], None, tensors, Reader(checkpoint), 0)
    with torch.no_grad():
        for slot in range(17):
            before = spoiled[0].experts.w2_weight[slot].clone()
            spoiled[0].experts.w2_weight[slot] = 0
            says = rf"slot {slot} of w2_weight does not hold `.*down_proj.weight`"
            with pytest.raises(VerificationError, match=says):
                compare_rows(spoiled[0], spots)
            spoiled[0].experts.w2_weight[slot] = before


def test_layers_are_verified_while_loading_and_a_bad_one_leaves_nothing(made: Callable[..., Path]) -> None:
    folder = made(family="kimi_k25", format_name="mxfp4", width=256, layers=3, experts=16)
    plan, index = planned(folder, on=True)
    facts = read_facts(folder)
    family = shipped().families[str(facts.values["model.family"])]
    verifier = Verifier(plan, runner_layers(index, family, facts))
    build(plan, index, check=verifier)
    assert [one.index for one in verifier.verified] == [1, 2]

    seen: list[MoELayer] = []

    def spoiling(layer: MoELayer, layer_plan: LayerPlan, checkpoint: Checkpoint) -> Callable[[], None]:
        compare = verifier(layer, layer_plan, checkpoint)

        def spoil() -> None:
            seen.append(layer)
            if layer.index == 2:
                layer.experts.w13_weight.zero_()
            compare()

        return spoil

    with pytest.raises(VerificationError, match="layer 2 "):
        build(plan, index, check=spoiling)
    assert sum(p.untyped_storage().nbytes() for layer in seen for p in layer.parameters()) == 0


def test_a_router_that_scores_all_alike_can_not_be_compared(
    made: Callable[..., Path], copied: Callable[..., Path]
) -> None:
    from tests.loader.surgery import rewrite

    folder = copied(family="deepseek_v2", experts=16)
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.gate.weight"].zero_())
    plan, index = planned(folder)
    with pytest.raises(VerificationError, match="scores experts alike"):
        checked(folder, build(plan, index), plan)


def test_the_tolerance_grows_with_the_dtype_and_the_formats_roundings() -> None:
    assert tolerance(["bf16"], torch.float32, 64) < 1e-5 < tolerance(["bf16"], torch.bfloat16, 64) < 0.05
    assert tolerance(["bf16", "int4_g32"], torch.bfloat16, 64) > tolerance(["bf16"], torch.bfloat16, 64)


def test_relative_error_keeps_what_is_not_a_number() -> None:
    one = torch.ones(2)
    assert relative_error(one * 1.5, one) == 0.5
    assert not relative_error(one * float("nan"), one) <= 1.0
    assert not relative_error(one[:0], one[:0]) <= 1.0
