"""Layers against the slow, obvious MoE of `tests/reference.py`."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from loader.activation import ExpertConfig
from loader.formats import layout_of
from loader.kernels.known import KERNELS
from loader.moe import Experts, MoELayer, Router, SharedExpert, SharedGate, SharedSlotRouter
from loader.router_config import RouterConfig
from tests.loader.fakes import shipped
from tests.reference import Mlp, Routing, moe

T, D, F, E, K = 5, 7, 3, 12, 3
# float32 against float64 over sums of at most D * F products of order one: well below 1e-5.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def normal(*shape: int, seed: int) -> Tensor:
    """Numbers that bf16 has, so that storing them loses nothing."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def stack(mlps: list[Mlp], width: int, kernel: str = "eager", d: int = D) -> Experts:
    experts = Experts(
        layout_of(shipped().formats["bf16"]), n_experts=len(mlps), hidden_size=d, width=width, kernel=KERNELS[kernel]
    )
    experts.w13_weight = parameter(torch.stack([torch.cat([m.gate, m.up]) for m in mlps]))
    experts.w2_weight = parameter(torch.stack([m.down for m in mlps]))
    return experts


def mlp(width: int, seed: int, d: int = D) -> Mlp:
    return Mlp(
        gate=normal(width, d, seed=seed), up=normal(width, d, seed=seed + 1), down=normal(d, width, seed=seed + 2)
    )


def slots_of(shared: Mlp, n_shared: int, width: int = F) -> list[Mlp]:
    """One MLP of width S * F as S experts: SwiGLU is separable over the intermediate dimension."""
    spans = [slice(s * width, (s + 1) * width) for s in range(n_shared)]
    return [Mlp(gate=shared.gate[s], up=shared.up[s], down=shared.down[:, s]) for s in spans]


GROUPS = {
    "none": {},
    "v3": {"n_group": 4, "topk_group": 2},
    "v2": {"n_group": 4, "topk_group": 2, "group_score": "max"},
}
# No model has a bias and V2's mask of 0.0, which a negative biased score would lose to.
CHOICES = [(groups, biased) for groups in GROUPS for biased in (False, True) if (groups, biased) != ("v2", True)]


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("n_shared", [0, 1, 2])
@pytest.mark.parametrize(("groups", "biased"), CHOICES, ids=[f"{groups}-{biased}" for groups, biased in CHOICES])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_layer_equals_the_reference(scoring: str, groups: str, biased: bool, n_shared: int, fused: bool) -> None:
    router_ED, bias_E = normal(E, D, seed=1), normal(E, seed=2).float() if biased else None
    mlps = [mlp(F, 10 * e) for e in range(E)]
    shared = mlp(n_shared * F, 1000) if n_shared else None
    x_TD = normal(T, D, seed=3).float()
    for renormalise, scale in itertools.product((False, True), (1.0, 2.5)):
        config = RouterConfig(
            scoring_func=scoring, top_k=K, norm_topk_prob=renormalise, routed_scaling_factor=scale, **GROUPS[groups]
        )
        router = Router(config, parameter(router_ED), None if bias_E is None else parameter(bias_E))
        in_slots = fused and shared is not None
        layer = MoELayer(
            index=0,
            name="mlp",
            router=SharedSlotRouter(router, n_shared, None) if in_slots else router,
            experts=stack(mlps + (slots_of(shared, n_shared) if in_slots else []), F),
            shared=SharedExpert(stack([shared], n_shared * F), None) if shared is not None and not fused else None,
        )
        routing = Routing(scoring=scoring, top_k=K, renormalise=renormalise, scale=scale, **GROUPS[groups])
        expected = moe(x_TD, router_ED, bias_E, mlps, shared, routing)
        torch.testing.assert_close(layer(x_TD).double(), expected, **TOLERANCE)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_gated_shared_expert(fused: bool) -> None:
    router_ED, gate_1D, mlps, shared = (
        normal(E, D, seed=1),
        normal(1, D, seed=5),
        [mlp(F, e) for e in range(E)],
        mlp(F, 99),
    )
    gate = SharedGate(parameter(gate_1D))
    router = Router(RouterConfig(scoring_func="softmax", top_k=K), parameter(router_ED), None)
    layer = MoELayer(
        index=0,
        name="mlp",
        router=SharedSlotRouter(router, 1, gate) if fused else router,
        experts=stack([*mlps, shared] if fused else mlps, F),
        shared=None if fused else SharedExpert(stack([shared], F), gate),
    )
    x_TD = normal(T, D, seed=3).float()
    routing = Routing(scoring="softmax", top_k=K, renormalise=True)
    expected = moe(x_TD, router_ED, None, mlps, shared, routing, gate_1D[0])
    torch.testing.assert_close(layer(x_TD).double(), expected, **TOLERANCE)


def test_factor_or_normalisation_but_not_both() -> None:
    config = {"scoring_func": "softmax", "top_k": K, "routed_scaling_factor": 16.0, "scales_normalised": False}
    router_ED, x_TD = parameter(normal(E, D, seed=1)), normal(T, D, seed=3)
    normalised, _ = Router(RouterConfig(norm_topk_prob=True, **config), router_ED, None)(x_TD)
    torch.testing.assert_close(normalised.sum(-1), torch.ones(T))
    scaled, _ = Router(RouterConfig(norm_topk_prob=False, **config), router_ED, None)(x_TD)
    assert (scaled.sum(-1) > 1).all()


def test_a_negative_biased_score_does_not_lose_to_a_closed_group() -> None:
    # With a mask of 0.0 in place of -inf, experts of closed groups would win over these.
    config = RouterConfig(scoring_func="sigmoid", top_k=2, n_group=2, topk_group=1)
    bias_E = torch.tensor([-2.0, -2.0, -3.0, -3.0])
    router = Router(config, parameter(torch.zeros(4, D)), parameter(bias_E))
    _, ids_TK = router(torch.ones(1, D))
    assert sorted(ids_TK[0].tolist()) == [0, 1]


KINDS = (
    ExpertConfig(),
    ExpertConfig(limit=1.5, alpha=1.702, up_offset=1.0),  # gpt-oss, which has biases too
    ExpertConfig(hidden_act="gelu_pytorch_tanh", weighed="input"),
)


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", KINDS, ids=["plain", "biased", "input"])
def test_kernels_agree(tokens: int, dtype: torch.dtype, config: ExpertConfig) -> None:
    """More experts than are dequantized at once, and some that no token chose."""
    n_experts, d, width, k = 70, 16, 8, 4
    mlps = [mlp(width, 3 * e, d) for e in range(n_experts)]
    x_TD = normal(tokens, d, seed=1).to(dtype)
    ids_TK = (
        torch.stack([torch.randperm(n_experts, generator=torch.Generator().manual_seed(t))[:k] for t in range(tokens)])
        if tokens
        else torch.empty(0, k, dtype=torch.int64)
    )
    weights_TK = torch.rand(tokens, k, generator=torch.Generator().manual_seed(9))
    kernels = [stack(mlps, width, name, d) for name in ("eager", "grouped_mm")]
    for experts in kernels:
        experts.config = config
        if config.alpha is not None:
            experts.w13_bias = parameter(normal(n_experts, 2 * width, seed=4))
            experts.w2_bias = parameter(normal(n_experts, d, seed=5))
    eager, grouped = (experts(x_TD, weights_TK, ids_TK) for experts in kernels)
    assert eager.shape == (tokens, d) and eager.dtype == grouped.dtype == torch.float32
    # Both round gate, up and down to `dtype` at the same places; only the order of sums differs.
    torch.testing.assert_close(grouped, eager, rtol=8 * torch.finfo(dtype).eps, atol=32 * torch.finfo(dtype).eps)


def test_any_leading_shape_and_the_dtype_of_x() -> None:
    router = Router(RouterConfig(scoring_func="sigmoid", top_k=K), parameter(normal(E, D, seed=1)), None)
    layer = MoELayer(index=0, name="mlp", router=router, experts=stack([mlp(F, e) for e in range(E)], F), shared=None)
    x = normal(2, 3, D, seed=3)
    y = layer(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    torch.testing.assert_close(y.reshape(-1, D), layer(x.reshape(-1, D)))
