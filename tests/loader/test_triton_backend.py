"""The backend of a layer: as one stack, and with the shared slots computed before the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loader.kernels.eager import eager
from loader.moe import Experts
from tests.loader.stacks import stack
from tests.loader.test_kernels import FORMATS, TOLERANCES, relative

pytestmark = pytest.mark.kernels
TOKENS, ROUTED, TOP_K, HIDDEN, WIDTH = 7, 5, 2, 96, 64


@pytest.fixture(scope="session")
def backend() -> Any:
    """`loader.kernels.triton_backend`, which can only be imported where Triton is installed."""
    from loader.kernels import triton_backend

    return triton_backend


def call(format_name: str, n_shared: int, **other: Any) -> tuple[Experts, Tensor, Tensor, Tensor]:
    """Experts whose shared slots are computed on their own from one token on; tokens, their weights and slots."""
    experts = stack(format_name, slots=ROUTED + n_shared, hidden=HIDDEN, width=WIDTH, seed=3, **other)
    experts.n_shared, experts.dense_shared_from = n_shared, 1
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights, ids = torch.rand(TOKENS, ROUTED, generator=generator).topk(TOP_K, dim=-1)
    shared = torch.arange(ROUTED, ROUTED + n_shared).expand(TOKENS, n_shared)
    of_shared = 0.5 + torch.rand(TOKENS, n_shared, generator=generator)
    return experts, x, torch.cat([weights, of_shared], 1), torch.cat([ids, shared], 1)


@pytest.mark.parametrize("n_shared", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("format_name", FORMATS)
def test_both_ways_give_what_the_reference_does(backend: Any, format_name: str, biased: bool, n_shared: int) -> None:
    experts, x, weights, ids = call(format_name, n_shared, biased=biased)
    expected = eager(x, weights, ids, experts)
    apart = backend.run(x, weights, ids, experts)
    experts.dense_shared_from = TOKENS + 1
    together = backend.run(x, weights, ids, experts)
    assert relative(apart, expected) <= TOLERANCES[torch.float32]
    assert relative(together, expected) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("n_shared", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_numbers_are_torchs_products(
    backend: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, n_shared: int
) -> None:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    experts, x, weights, ids = call(name, n_shared)
    asked: list[int] = []
    dense = backend._dense
    monkeypatch.setattr(backend, "_dense", lambda *given: asked.append(1) or dense(*given))
    actual = backend.run(x.to(dtype), weights, ids, experts)
    assert asked and actual.dtype == dtype
    assert relative(actual, eager(x.to(dtype).float(), weights, ids, experts)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("format_name", FORMATS)
def test_what_weighs_nothing_adds_nothing_on_either_way(backend: Any, format_name: str) -> None:
    """As docs/kernels.md has it: a token that is NaN and weighs nothing is 0, and no other's business."""
    experts, x, weights, ids = call(format_name, 1)
    clean = backend.run(x, weights, ids, experts)
    x[2], weights[2] = torch.nan, 0.0
    for experts.dense_shared_from in (1, 0):
        actual = backend.run(x, weights, ids, experts)
        assert torch.equal(actual[2], torch.zeros(HIDDEN))
        others = torch.arange(TOKENS) != 2
        assert relative(actual[others], clean[others]) <= TOLERANCES[torch.float32]


def test_a_base_of_another_shape_is_refused_and_a_view_is_read_as_it_is(backend: Any) -> None:
    experts, x, weights, ids = call("bf16", 1)
    kernels = backend.TritonExperts(experts)
    base = torch.randn(HIDDEN, TOKENS).T
    expected = eager(x, weights, ids, experts) + base
    assert relative(kernels(x, weights, ids, base_TD=base), expected) <= TOLERANCES[torch.float32]
    with pytest.raises(ValueError, match=r"base is \[1, 96\], expected \[7, 96\], as x is"):
        kernels(x, weights, ids, base_TD=base[:1])


@pytest.mark.parametrize("dense_from", [1, 0])
def test_pairs_of_other_ranks_are_left_out(backend: Any, monkeypatch: pytest.MonkeyPatch, dense_from: int) -> None:
    """At one token an expert of another rank, which weighs nothing here, would be read for nothing."""
    experts, x, weights, ids = call("int4_g32", 1)
    experts.dense_shared_from = dense_from
    given = x[:1], weights[:1], ids[:1]
    used: list[bool] = []
    real = backend.TritonExperts.__call__

    def noted(self: Any, *inputs: Any, config: Any, **other: Any) -> Tensor:
        used.append(config.by_pair)
        return real(self, *inputs, config=config, **other)

    monkeypatch.setattr(backend.TritonExperts, "__call__", noted)
    whole = backend.run(*given, experts)
    assert used[-1] is True
    experts.is_part = True
    part = backend.run(*given, experts)
    assert used[-1] is False
    assert relative(part, whole) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("dense_from", [1, 0])
def test_inputs_that_do_not_belong_together_are_refused_on_either_way(backend: Any, dense_from: int) -> None:
    experts, x, weights, ids = call("fp32", 1)
    experts.dense_shared_from = dense_from
    for given, says in (
        ((x, torch.cat([weights, weights[:, :1]], 1), ids), r"topk_weights is \[7, 4\], topk_ids \[7, 3\]"),
        ((x[:, :64], weights, ids), r"x is \[7, 64\], expected \[7, 96\]"),
    ):
        with pytest.raises(ValueError, match=says):
            backend.run(*given, experts)
