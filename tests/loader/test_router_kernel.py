"""The router's kernels on the CPU, by Triton's interpreter, against `loader.moe.Router`."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loader.moe import Router, SharedGate, SharedSlotRouter
from loader.router_config import RouterConfig

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="session")
def kernels() -> Any:
    """`loader.kernels.triton_router`, which can only be imported where Triton is installed."""
    from loader.kernels import triton_router

    return triton_router


def router(config: RouterConfig, experts: int, hidden: int, seed: int, *, biased: bool, dtype: torch.dtype) -> Router:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, hidden, generator=generator) * hidden**-0.5
    bias = torch.randn(experts, generator=generator) * 0.1 if biased else None
    frozen = [None if t is None else nn.Parameter(t, requires_grad=False) for t in (weight.to(dtype), bias)]
    assert frozen[0] is not None
    return Router(config, frozen[0], frozen[1])


@st.composite
def routers(draw: st.DrawFn) -> dict[str, Any]:
    """All kinds of routing that families have; in groups, each group's size may be any number."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 4, 6, 8]))
    size = draw(st.integers(2, 20))
    open_groups = draw(st.integers(1, groups))
    return {
        "config": RouterConfig(
            scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])),
            top_k=draw(st.integers(1, min(8, size * open_groups))),
            n_group=groups,
            topk_group=open_groups,
            group_score=draw(st.sampled_from(["top2_sum", "max"])),
            norm_topk_prob=draw(st.booleans()),
            routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
            scales_normalised=draw(st.booleans()),
            bias=draw(st.sampled_from(["choice", "logits"])),
        ),
        "experts": groups * size,
        "hidden": draw(st.sampled_from([5, 64, 300])),
        "tokens": draw(st.sampled_from([0, 1, 3, 17, 70])),
        "biased": draw(st.booleans()),
        "shared": draw(st.integers(0, 2)),
        "gated": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16])),
        "seed": draw(st.integers(0, 999)),
    }


def dense(weights: Tensor, ids: Tensor, slots: int) -> Tensor:
    return torch.zeros(len(weights), slots).scatter_add_(1, ids.long(), weights)


@settings(max_examples=80, deadline=None)
@given(case=routers())
def test_tokens_are_routed_as_the_reference_does(kernels: Any, case: dict[str, Any]) -> None:
    config, experts, hidden = case["config"], case["experts"], case["hidden"]
    if case["biased"] and config.group_score == "max":
        case["biased"] = False  # V2 has none: a biased score below 0.0 would come after those that are shut out
    plain = router(config, experts, hidden, case["seed"], biased=case["biased"], dtype=case["dtype"])
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    x = torch.randn(case["tokens"], hidden, generator=generator).to(case["dtype"])
    gate = SharedGate(nn.Parameter(torch.randn(1, hidden, generator=generator))) if case["gated"] else None
    reference: nn.Module = SharedSlotRouter(plain, case["shared"], gate) if case["shared"] else plain
    with torch.no_grad():
        expected_weights, expected_ids = reference(x)
        weights, ids = kernels.TritonRouter(plain, case["shared"], gate)(x)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    slots = experts + case["shared"]
    actual, expected = dense(weights, ids, slots), dense(expected_weights, expected_ids, slots)
    # A score that two sums make equal to another's may fall to either side, in one token out of thousands.
    off = (actual - expected).abs().amax(1) > 1e-4 * expected.abs().amax(1)
    assert int(off.sum()) <= len(off) // 50


def test_an_x_of_another_router_is_refused(kernels: Any) -> None:
    plain = router(RouterConfig(scoring_func="sigmoid", top_k=2), 8, 64, 0, biased=False, dtype=torch.float32)
    route = kernels.TritonRouter(plain)
    for x, says in (
        (torch.zeros(2, 128), r"x is \[2, 128\], the router expects \[tokens, 64\]"),
        (torch.zeros(2, 32), r"x is \[2, 32\]"),
        (torch.zeros(64), r"x is \[64\]"),
        (torch.zeros(2, 64, device="meta"), "x is on meta, the router on cpu"),
    ):
        with pytest.raises(ValueError, match=says):
            route(x)


def test_a_weight_is_read_as_it_lies(kernels: Any) -> None:
    config = RouterConfig(scoring_func="sigmoid", top_k=2)
    plain = router(config, 8, 64, 0, biased=False, dtype=torch.float32)
    turned = Router(config, nn.Parameter(plain.weight.T.contiguous().T, requires_grad=False), None)
    assert not turned.weight.is_contiguous()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for expected, actual in zip(kernels.TritonRouter(plain)(x), kernels.TritonRouter(turned)(x), strict=True):
        assert torch.equal(actual, expected)


def test_equal_scores_go_to_the_lower_number_and_no_expert_twice(kernels: Any) -> None:
    config = RouterConfig(scoring_func="sigmoid", top_k=4, norm_topk_prob=True)
    plain = router(config, 6, 8, 0, biased=False, dtype=torch.float32)
    plain.weight.zero_()
    weights, ids = kernels.TritonRouter(plain)(torch.ones(2, 8))
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(weights, torch.full((2, 4), 0.25))


def test_more_experts_than_a_warp_chooses_from(kernels: Any) -> None:
    plain = router(RouterConfig(scoring_func="sigmoid", top_k=8), 600, 64, 3, biased=True, dtype=torch.float32)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(4))
    expected = dense(*plain(x), 600)
    torch.testing.assert_close(dense(*kernels.TritonRouter(plain)(x), 600), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [1, 4])
def test_experts_that_are_shut_out_by_their_bias_come_last(kernels: Any, scoring: Any, groups: int) -> None:
    """Also where each group has one, so that all groups are worth as little and all are open."""
    config = RouterConfig(scoring_func=scoring, top_k=2, n_group=groups, topk_group=groups)
    plain = router(config, 8, 16, 5, biased=True, dtype=torch.float32)
    bias = plain.e_score_correction_bias
    assert bias is not None
    bias.copy_(torch.tensor([-torch.inf, -torch.inf, -torch.inf, 3, -torch.inf, 2, -torch.inf, 1]))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(6))
    _, ids = kernels.TritonRouter(plain)(x)
    assert ids.sort(-1).values.tolist() == [[3, 5]] * 3


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_logit_that_is_not_a_number_is_loud_and_stays_with_its_token(kernels: Any, scoring: Any) -> None:
    config = RouterConfig(scoring_func=scoring, top_k=3)
    plain = router(config, 9, 16, 1, biased=True, dtype=torch.float32)
    x = torch.randn(4, 16)
    clean = kernels.TritonRouter(plain, 1)(x)
    x[2, 5] = torch.nan
    weights, ids = kernels.TritonRouter(plain, 1)(x)
    assert weights[2].isnan().all()
    assert (ids[2] >= 0).all()
    assert (ids[2] <= 9).all()
    for token in (0, 1, 3):
        assert torch.equal(weights[token], clean[0][token])
        assert torch.equal(ids[token], clean[1][token])


@pytest.mark.parametrize(("answer", "said"), [(0, None), (1, "1"), (OSError("no libcuda.so.1"), "no libcuda.so.1")])
def test_a_hint_that_the_driver_does_not_take_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, answer: int | OSError, said: str | None
) -> None:
    from loader.kernels import triton_device

    asked: list[tuple[int, int]] = []

    def library(name: str) -> SimpleNamespace:
        if isinstance(answer, OSError):
            raise answer

        def ask(_function: Any, *what: int) -> int:
            asked.append(what)
            return answer

        return SimpleNamespace(cuFuncSetAttribute=ask)

    monkeypatch.setattr(triton_device.ctypes, "CDLL", library)
    monkeypatch.setattr(triton_device, "is_nvidia", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    triton_device._prefer_cache.cache_clear()
    gpu = torch.device("cuda", 0)
    triton_device.leave_cache(None, gpu)  # a launch that compiled nothing
    triton_device.leave_cache(SimpleNamespace(function=12345), torch.device("cpu"))
    assert not asked and not caplog.records
    for _ in range(2):
        triton_device.leave_cache(SimpleNamespace(function=12345), gpu)
    triton_device._prefer_cache.cache_clear()
    assert asked == ([] if isinstance(answer, OSError) else [(9, 20)])
    assert [said in record.getMessage() for record in caplog.records if said] == ([True] if said else [])


def test_stages_leave_room_for_a_cache(kernels: Any) -> None:
    """Triton asks for all shared memory as soon as a thread block takes more than 48 KB."""
    seen: list[dict[str, Any]] = []

    def keep(_kernel: Any, _grid: Any, *_arguments: Any, **options: Any) -> None:
        seen.append(options)

    for dtype in (torch.bfloat16, torch.float32):
        plain = router(RouterConfig(scoring_func="sigmoid", top_k=8), 384, 128, 0, biased=True, dtype=dtype)
        for tokens in (1, 32, 300):
            kernels.TritonRouter(plain, launch=keep)(torch.zeros(tokens, 128, dtype=dtype))
            product = seen[-2]
            stage = (product["BLOCK_T"] + product["BLOCK_E"]) * product["BLOCK_C"] * dtype.itemsize
            assert product["num_stages"] == 2 or product["num_stages"] * stage <= 48 << 10
