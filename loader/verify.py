"""Compare loaded layers with what the checkpoint says, and loads with each other.

The reference (`loader.reference`) reads raw tensors, in float64; it shares no arithmetic with `loader.formats`,
`loader.moe` or the kernels, and knows nothing of plans and slots.

What is compared, so that it costs little beside the load:

- **The router** on all tokens: every weight of every chosen expert.
- **A few tokens through the layer**, cut to a narrow strip of each expert they chose (`loader.narrow`): SwiGLU is
  separable over the intermediate, so that a strip is an expert of its own. It finds what is wrong with the arithmetic
  (packing, scales, gate and up, the weight of the shared expert) and with any slot a token chose, in any format.
- **One row of every tensor of every slot**, byte by byte (`loader.spots`): a slot swapped, never written or shifted,
  also where no token came by.

What it can't find: single bytes that differ elsewhere. That each row of each slot was filled, from the right place, is
what the ledger guarantees; the bytes themselves are the file system's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gatekeeper import Index, MoeTensors
from loader.activation import ExpertConfig
from loader.checkpoint import Checkpoint, dtype_name
from loader.errors import VerificationError
from loader.formats import FORMATS
from loader.moe import MoELayer
from loader.narrow import Strips
from loader.plan import LayerPlan, Plan
from loader.raw import Reader
from loader.reference import Reference
from loader.spots import Spot, compare_rows, spots_of

ROUTED_TOKENS = 16
"""Tokens that go through the router."""
TOKENS = 2
"""Those of them that go through experts too: at top 8, up to 16 experts and the shared one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What comparing one layer came to."""

    index: int
    """3"""
    name: str
    """``model.layers.3.mlp``"""
    figure: float
    """Largest difference over the largest number of the reference: 1.3e-6."""
    tolerance: float
    """What the figure may be at most."""
    tokens: int
    """Tokens compared."""
    experts: int
    """Experts that they went through."""
    rows: int
    """Rows compared byte by byte, one of every tensor in every slot."""


def tolerance(formats: Iterable[str], dtype: torch.dtype, widest: int, experts: ExpertConfig | None = None) -> float:
    """What `figure` may be: twice the roundings to `dtype` of format and experts, plus float32 sums over `widest`.

    Each rounding is at most half an ulp, and a sum of n products is off by at most n ulp / 2 (Higham, Accuracy and
    Stability of Numerical Algorithms, 2nd ed., section 3.1).
    """
    roundings = max(FORMATS[name].roundings for name in formats) + (experts.roundings if experts else 0)
    return roundings * torch.finfo(dtype).eps + widest * torch.finfo(torch.float32).eps


def verify(
    layers: Sequence[MoELayer],
    plan: Plan,
    index: Index,
    tensors: Sequence[MoeTensors],
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Verified, ...]:
    """Compare each of `layers` with `tensors` of `index`; see `Verifier`, which does the same while loading."""
    verifier = Verifier(plan, tensors, tokens=tokens, seed=seed, dtype=dtype)
    with Checkpoint(index) as checkpoint:
        for layer, layer_plan in zip(layers, plan.layers, strict=True):
            verifier(layer, layer_plan, checkpoint)()
    return verifier.verified


class Verifier:
    """A check for `build`: runs a layer on random tokens and compares it with the checkpoint.

    `tokens` go through experts, in `dtype`; None is the sharpest that the layer's backend has on its device, float32
    or else bfloat16. Raises `VerificationError` where a figure is beyond its tolerance or not a number.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Sequence[MoeTensors],
        *,
        tokens: int = TOKENS,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._plan = plan
        self._tensors = {each.name: each for each in tensors}
        self._tokens, self._seed, self._dtype = tokens, seed, dtype
        self._found: list[Verified] = []

    @property
    def verified(self) -> tuple[Verified, ...]:
        """What was compared so far."""
        return tuple(self._found)

    @torch.no_grad()
    def __call__(self, layer: MoELayer, plan: LayerPlan, checkpoint: Checkpoint) -> Callable[[], None]:
        """Work out from the checkpoint what a layer must hold and compute; what is returned compares it once filled."""
        tensors, reader, seed = self._tensors[layer.name], Reader(checkpoint), self._seed + layer.index
        dtype = self._dtype or sharpest(plan.backend, next(layer.parameters()).device)
        names = [plan.format] + ([plan.shared_format] if plan.shared_format else [])
        widest = max(plan.hidden_size, plan.width, plan.shared_width)
        allowed = tolerance(names, dtype, widest, self._plan.experts)
        count = max(ROUTED_TOKENS, self._tokens)
        x_TD = random_tokens(count, plan.hidden_size, seed).to(dtype)
        strips = Strips(plan, self._plan.rank, seed)
        reference = Reference(reader, tensors, self._plan, strips)
        choices, clear_T = reference.choices(x_TD)
        if not clear_T.any():
            raise VerificationError(
                f"layer {layer.index} (`{layer.name}`) can't be compared: its router scores experts alike for "
                f"all of {count} random tokens; is `{layer.name}` trained at all?",
                layer=layer.index,
                figure=math.nan,
                tolerance=allowed,
            )
        x_TD = x_TD[clear_T]
        choices = [choice for choice, clear in zip(choices, clear_T.tolist(), strict=True) if clear]
        some = slice(self._tokens)  # which go through experts too
        expected = _Expected(
            x_TD=x_TD,
            weights_TS=reference.weights(x_TD, choices),
            output_TD=reference.output(x_TD[some], choices[some]),
            spots=spots_of(layer, plan, self._plan.rank, tensors, reader, seed),
            strips=strips,
            allowed=allowed,
        )
        return partial(self._compare, layer, plan, expected)

    @torch.no_grad()
    def _compare(self, layer: MoELayer, plan: LayerPlan, expected: _Expected) -> None:
        there_TD = expected.x_TD.to(next(layer.parameters()).device)
        weights_TK, ids_TK = layer.router(there_TD)
        actual_TS = torch.zeros(expected.weights_TS.shape, dtype=torch.float64)
        actual_TS.scatter_add_(1, ids_TK.cpu(), weights_TK.cpu().double())
        figure = relative_error(actual_TS, expected.weights_TS)
        some, strips, allowed = slice(self._tokens), expected.strips, expected.allowed
        narrow, touched = strips.narrowed(layer, there_TD[some], weights_TK[some], ids_TK[some])
        actual_TD = narrow(there_TD[some, slice(*strips.hidden)]).cpu().double()
        figure = worse(figure, relative_error(actual_TD, expected.output_TD))
        if not figure <= allowed:  # also where it is NaN
            raise VerificationError(
                f"layer {layer.index} (`{layer.name}`) is off by {figure:.3g} of its largest output, allowed are "
                f"{allowed:.3g} in {dtype_name(there_TD.dtype)}; the layer was loaded wrongly or its backend "
                f"`{plan.backend}` is at fault: try --set server.moe_runner_backend=eager",
                layer=layer.index,
                figure=figure,
                tolerance=allowed,
            )
        rows = compare_rows(layer, expected.spots)
        self._found.append(
            Verified(
                index=layer.index,
                name=layer.name,
                figure=figure,
                tolerance=allowed,
                tokens=len(actual_TD),
                experts=touched,
                rows=rows,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    """What the checkpoint says of a layer."""

    x_TD: Tensor
    """Tokens that the router sees; the first ones go through experts too."""
    weights_TS: Tensor
    """The router's, by slot."""
    output_TD: Tensor
    """Of the strips."""
    spots: Sequence[Spot]
    strips: Strips
    allowed: float


def sharpest(backend: str, device: torch.device) -> torch.dtype:
    """The most exact dtype that a backend computes in; on a GPU `grouped_mm` has bfloat16 alone (torch 2.13)."""
    return torch.bfloat16 if backend == "grouped_mm" and device.type != "cpu" else torch.float32


def agreement(
    one: Sequence[MoELayer], other: Sequence[MoELayer], *, hidden_size: int, tokens: int = TOKENS, seed: int = 0
) -> dict[int, float]:
    """By layer index, how far two loads of one checkpoint are apart in float32, such as a fused and an unfused one."""
    figures = {}
    for a, b in zip(one, other, strict=True):
        x_TD = random_tokens(tokens, hidden_size, seed + a.index)
        with torch.no_grad():
            y_a, y_b = (layer(x_TD.to(next(layer.parameters()).device)).cpu().double() for layer in (a, b))
        figures[a.index] = relative_error(y_a, y_b)
    return figures


def random_tokens(tokens: int, hidden_size: int, seed: int) -> Tensor:
    """``(T, D)`` in float32 with numbers that bf16 has too, so that the dtype of a run does not change its input."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, hidden_size, generator=generator).bfloat16().float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number expected; NaN and infinity stay what they are."""
    if not expected.numel():
        return math.nan
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def worse(one: float, other: float) -> float:
    """The larger figure; what is not a number is the worst."""
    return one if math.isnan(one) or one > other else other
