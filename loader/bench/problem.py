"""What is timed: layers of one shape with random weights, and random tokens with their routing.

Shapes: T tokens, E routed experts, S shared experts in slots behind them, K slots of a token (routed, then shared).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor, nn

from gatekeeper import load_rules
from loader.formats import Layout, layout_of
from loader.kernels.configs import KINDS, Shape
from loader.kernels.known import KERNELS
from loader.moe import Experts, Router, SharedSlotRouter
from loader.router_config import RouterConfig

_KIMI = RouterConfig(scoring_func="sigmoid", top_k=8, routed_scaling_factor=2.827)
_DEEPSEEK = RouterConfig(scoring_func="sigmoid", top_k=8, n_group=8, topk_group=4, routed_scaling_factor=2.5)
_GLM = RouterConfig(scoring_func="sigmoid", top_k=8, routed_scaling_factor=2.5)
_QWEN = RouterConfig(scoring_func="softmax", top_k=8)
MODELS: Mapping[str, tuple[int, int, int, int, RouterConfig]] = MappingProxyType(
    {
        "kimi-k2.5": (384, 1, 7168, 2048, _KIMI),
        "kimi-k2.5-routed": (384, 0, 7168, 2048, _KIMI),  # as released in int4, whose shared expert is in bf16
        "deepseek-v3": (256, 1, 7168, 2048, _DEEPSEEK),
        "qwen3-30b-a3b": (128, 0, 2048, 768, _QWEN),
        "glm-4.5": (160, 1, 5120, 1536, _GLM),
    }
)
"""Routed and shared experts, hidden size, width, and how experts are chosen; from config.json."""


FORMATS = ("bf16", "fp8_block", "int4_g32", "mxfp4")
"""Of the stacks that are timed: what checkpoints of such models have, and the kernels multiply with bf16 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One MoE layer of a known model on one rank of `tp_size`."""

    name: str
    format: str
    tp_size: int
    n_routed: int
    n_shared: int
    hidden_size: int
    width: int
    router: RouterConfig

    @classmethod
    def of(cls, name: str, format_name: str, tp_size: int) -> Model:
        """The layer of a model of `MODELS`; raises `ValueError` for an unknown one or a width that does not divide."""
        if format_name not in FORMATS:
            raise ValueError(f"unknown format `{format_name}`; there are {', '.join(FORMATS)}")
        if name not in MODELS:
            raise ValueError(f"unknown shape `{name}`; there are {', '.join(MODELS)}")
        routed, shared, hidden, width, router = MODELS[name]
        if width % tp_size:
            raise ValueError(f"`{name}` has experts of width {width}, which {tp_size} ranks do not divide")
        multiple = _layout(format_name).column_multiple
        if width // tp_size % multiple:
            raise ValueError(f"{tp_size} ranks leave `{name}` {width // tp_size} columns, no multiple of {multiple}")
        return cls(
            name=name,
            format=format_name,
            tp_size=tp_size,
            n_routed=routed,
            n_shared=shared,
            hidden_size=hidden,
            width=width // tp_size,
            router=router,
        )

    @property
    def top_k(self) -> int:
        """Routed slots of a token."""
        return self.router.top_k

    @property
    def shape(self) -> Shape:
        """What the kernels' configurations depend on."""
        return Shape(
            format=self.format,
            n_slots=self.n_routed + self.n_shared,
            hidden_size=self.hidden_size,
            width=self.width,
            top_k=self.top_k + self.n_shared,
        )

    @property
    def stacks(self) -> list[Shape]:
        """What has settings of its own: all slots, and where some are shared the routed ones and the shared ones.

        Shared slots of plain numbers have none: apart from the others they are torch's products.
        """
        if not self.n_shared:
            return [self.shape]
        apart = [self.shape.routed(self.n_shared), self.shape.shared(self.n_shared)]
        return [self.shape, *(apart[:1] if KINDS[self.format] == "plain" else apart)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One call: a layer's weights, tokens, and which slots they go to."""

    model: Model
    router: Router
    """The reference, which chose the slots; weights in bfloat16."""
    experts: Experts
    """``w13_<part>`` ``(E + S, 2F, ...)``, gate rows and then up rows, and ``w2_<part>`` ``(E + S, D, ...)``; scales of
    groups in runs (`loader.runs`)."""
    x_TD: Tensor
    """bfloat16."""
    topk_weights_TK: Tensor
    """float32; those of the shared slots, the last S columns, are 1."""
    topk_ids_TK: Tensor
    """int32; those of the shared slots are E, E + 1, ..."""

    def parts(self) -> list[Problem]:
        """The same tokens on their way to the slots of each of the model's `stacks`."""
        k = self.model.top_k
        apart = (
            replace(
                self,
                topk_weights_TK=self.topk_weights_TK[:, columns].contiguous(),
                topk_ids_TK=self.topk_ids_TK[:, columns].contiguous(),
            )
            for columns in (slice(k), slice(k, None))
        )
        return [self, *itertools.islice(apart, len(self.model.stacks) - 1)]


@cache
def _layout(format_name: str) -> Layout:
    return layout_of(load_rules().formats[format_name])


def random_experts(model: Model, device: torch.device | str, seed: int) -> Experts:
    """Stacked weights in `model.format`, as the loader would have them, with numbers of a trained layer's size."""
    with torch.device("meta"):
        experts = Experts(
            _layout(model.format),
            n_experts=model.n_routed + model.n_shared,
            hidden_size=model.hidden_size,
            width=model.width,
            kernel=KERNELS["eager"],
        )
    experts.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in experts.named_parameters():
        for slot in parameter.data:
            _fill(slot, generator, is_scale="scale" in name)
    experts.lay_out()
    return experts


def random_router(model: Model, device: torch.device | str, generator: torch.Generator) -> Router:
    """A router whose tokens go everywhere alike: 64 tokens of Kimi-K2.5 reach about 284 of 384 experts.

    The bias of its choice, which sigmoid has, is read as any other and is 0.
    """
    weight_ED = torch.randn(model.n_routed, model.hidden_size, device=device, generator=generator)
    bias_E = torch.zeros(model.n_routed, device=device)
    return Router(
        model.router,
        nn.Parameter((weight_ED * 0.02).bfloat16(), requires_grad=False),
        nn.Parameter(bias_E, requires_grad=False) if model.router.scoring_func == "sigmoid" else None,
    )


def _fill(numbers: Tensor, generator: torch.Generator, *, is_scale: bool) -> None:
    if numbers.dtype in (torch.uint8, torch.float8_e8m0fnu):
        low, high = (117, 121) if is_scale else (0, 256)
        numbers.view(torch.uint8).random_(low, high, generator=generator)
    elif numbers.dtype == torch.int32:
        numbers.random_(-(2**31), 2**31 - 1, generator=generator)
    elif numbers.dtype == torch.float8_e4m3fn:
        numbers.copy_(torch.randn(numbers.shape, device=numbers.device, generator=generator))
    elif is_scale:
        numbers.uniform_(0.002, 0.01, generator=generator)
    else:
        numbers.normal_(0, 0.02, generator=generator)


def problems(model: Model, layers: Sequence[Experts], tokens: int, seed: int) -> list[Problem]:
    """One for each of `layers`: random tokens, which a random router sends to experts, and to all the shared slots."""
    found = []
    for n, experts in enumerate(layers):
        device = next(experts.parameters()).device
        generator = torch.Generator(device).manual_seed(seed + n)
        x_TD = torch.randn(tokens, model.hidden_size, device=device, generator=generator).bfloat16()
        router = random_router(model, device, generator)
        weights_TK, ids_TK = SharedSlotRouter(router, model.n_shared, gate=None)(x_TD)
        found.append(
            Problem(
                model=model,
                router=router,
                experts=experts,
                x_TD=x_TD,
                topk_weights_TK=weights_TK,
                topk_ids_TK=ids_TK.int(),
            )
        )
    return found
