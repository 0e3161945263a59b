"""Verification notices what strict loading can't: right tensors, wrong numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gatekeeper import read_facts
from loader import MoELayer, Plan, VerificationError, Verified, agreement, build, verify
from loader.planner import runner_layers
from loader.verify import relative_error, tolerance
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
FUSIBLE = {name: case for name, case in CASES.items() if name != "kimi_k25-int4"}


def checked(folder: Path, layers: tuple[MoELayer, ...], plan: Plan, **options: object) -> tuple[Verified, ...]:
    facts = read_facts(folder)
    family = shipped().families[str(facts.values["model.family"])]
    _, index = planned(folder)
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
