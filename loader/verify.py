"""Compare loaded layers with what the checkpoint says, and loads with each other.

The reference (`loader.reference`) reads raw tensors, in float64; it shares no arithmetic with `loader.formats`,
`loader.moe` or the kernels, and knows nothing of plans and slots.

What is compared, so that it costs little beside the load:

- **The router** on all tokens: every weight of every chosen expert.
- **A few tokens through the layer**, cut to a narrow strip of each expert they chose (`loader.narrow`): SwiGLU is
  separable over the intermediate, so that a strip is an expert of its own. It finds what is wrong with the meaning of
  numbers (packing, scales, gate and up, the weight of the shared expert) and with any slot a token chose, in any
  format. Strips are computed by `eager`, whatever the layer's backend.
- **The backend**, on the first layer of each kind: those tokens by its kernels and by `eager` (`loader.backends`).
- **One row of every tensor of every slot**, byte by byte (`loader.spots`): a slot swapped, never written or shifted,
  also where no token came by.

The host waits for a GPU three times a layer, save the first of its kind: twice to hand it tokens and the places of
strips, once to fetch what is there.

What it can't find: single bytes that differ elsewhere, and a backend that errs with other numbers of tokens only. That
each row of each slot was filled, from the right place, is what the ledger guarantees; the bytes themselves are the file
system's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from gatekeeper import Index, MoeTensors
from loader.activation import ExpertConfig
from loader.backends import BackendCheck, compute_dtype, kind_of, outputs
from loader.checkpoint import Checkpoint, dtype_name
from loader.errors import VerificationError
from loader.formats import FORMATS
from loader.formats.base import Span
from loader.gathered import moved
from loader.kernels.configs import ON_TRITON
from loader.kernels.eager import eager
from loader.moe import MoELayer
from loader.narrow import Piece, Strips, narrowed
from loader.plan import LayerPlan, Plan
from loader.raw import Reader
from loader.reference import Reference
from loader.spots import Spot, compare_rows, spots_of
from loader.twins import Routing, by_kernel, routed

ROUTED_TOKENS = 16
"""Tokens that go through the router."""
TOKENS = 2
"""Those of them that go through experts too: at top 8, up to 16 experts and the shared one."""
WAY_OUT = "try --set server.moe_runner_backend=eager"
"""What to do about a backend that is at fault."""


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
    backend: BackendCheck | None
    """Of the first layer of its kind; None for others, and where the backend is `eager`."""


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
    dtype: torch.dtype = torch.float32,
) -> tuple[Verified, ...]:
    """Compare each of `layers` with `tensors` of `index`; see `Verifier`, which does the same while loading."""
    verifier = Verifier(plan, tensors, tokens=tokens, seed=seed, dtype=dtype)
    with Checkpoint(index) as checkpoint:
        for layer, layer_plan in zip(layers, plan.layers, strict=True):
            verifier(layer, layer_plan, checkpoint)()
    return verifier.verified


class Verifier:
    """A check for `build`: runs a layer on random tokens and compares it with the checkpoint.

    `tokens` go through experts, whose strips are computed in `dtype`. Raises `VerificationError` where a figure is
    beyond its tolerance or not a number.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Sequence[MoeTensors],
        *,
        tokens: int = TOKENS,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._plan = plan
        self._tensors = {each.name: each for each in tensors}
        self._tokens, self._seed, self._dtype = tokens, seed, dtype
        self._found: list[Verified] = []
        self._kinds: set[Hashable] = set()  # whose backend was compared

    @property
    def verified(self) -> tuple[Verified, ...]:
        """What was compared so far."""
        return tuple(self._found)

    @torch.no_grad()
    def __call__(self, layer: MoELayer, plan: LayerPlan, checkpoint: Checkpoint) -> Callable[[], None]:
        """Work out from the checkpoint what a layer must hold and compute; what is returned compares it once filled."""
        tensors, reader, seed = self._tensors[layer.name], Reader(checkpoint), self._seed + layer.index
        allowed = self._tolerance(plan, self._dtype)
        count = max(ROUTED_TOKENS, self._tokens)
        x_TD = random_tokens(count, plan.hidden_size, seed)
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
        weights_TS = reference.weights(x_TD, choices)
        slots = weights_TS[some].any(0).nonzero().flatten().tolist() or [0]
        expected = _Expected(
            x_TD=x_TD,
            # Nothing is lost: the numbers are bf16's. So the router runs the kernels that serving runs.
            there_TD=x_TD.bfloat16().to(next(layer.parameters()).device),
            weights_TS=weights_TS,
            output_TD=reference.output(x_TD[some], choices[some]),
            spots=spots_of(layer, plan, self._plan.rank, tensors, reader, seed),
            pieces=strips.pieces(layer, slots),
            hidden=strips.hidden,
            allowed=allowed,
        )
        return partial(self._compare, layer, plan, expected)

    @torch.no_grad()
    def _compare(self, layer: MoELayer, plan: LayerPlan, expected: _Expected) -> None:
        allowed, some = expected.allowed, slice(self._tokens)
        there = Routing.of(layer, expected.there_TD)
        routing, numbers, rows = expected.fetched(there)
        actual_TS = torch.zeros_like(expected.weights_TS)
        actual_TS.scatter_add_(1, routing.ids_TK.long(), routing.weights_TK.double())
        figure = relative_error(actual_TS, expected.weights_TS)
        if not figure <= allowed:  # also where it is NaN
            own = f" or the router of its backend `{plan.backend}` is at fault: {WAY_OUT}"
            why = f"the layer was loaded wrongly{own if plan.backend in ON_TRITON else ''}"
            raise _off(layer, f"its router is off by {figure:.3g} of its largest weight", figure, allowed, why)
        narrow = narrowed(layer, expected.pieces, numbers, routing.first(self._tokens))
        x_TD = expected.x_TD[some, slice(*expected.hidden)].to(self._dtype)
        actual_TD = by_kernel(narrow, eager)(x_TD).double()
        figure = worse(figure, relative_error(actual_TD, expected.output_TD))
        if not figure <= allowed:
            what = f"strips of its experts are off by {figure:.3g} of their largest output"
            raise _off(layer, what, figure, allowed, "the layer was loaded wrongly")
        compared = compare_rows(layer, expected.spots, rows)
        if expected.there_TD.device.type == "cpu":  # see `loader.backends`
            backend = self._backend(narrow, plan, x_TD, whole=False)
        else:
            backend = self._backend(routed(layer, there.first(self._tokens)), plan, expected.there_TD[some], whole=True)
        self._found.append(
            Verified(
                index=layer.index,
                name=layer.name,
                figure=figure,
                tolerance=allowed,
                tokens=len(actual_TD),
                experts=len(expected.pieces[0].slots) + (layer.shared is not None),
                rows=compared,
                backend=backend,
            )
        )

    def _backend(self, layer: MoELayer, plan: LayerPlan, x_TD: Tensor, *, whole: bool) -> BackendCheck | None:
        """Compare the backend with `eager` on a layer that is routed already, if it is the first of its kind."""
        if plan.backend == "eager" or (kind := kind_of(plan)) in self._kinds:
            return None
        self._kinds.add(kind)
        dtype = compute_dtype(plan)
        # Eager's numbers are float32, so that all roundings to `dtype` are the backend's: what a tolerance counts.
        allowed = self._tolerance(plan, dtype)
        figure, name = relative_error(*outputs(layer, plan, x_TD, dtype)), dtype_name(dtype)
        if not figure <= allowed:
            what = f"its backend `{plan.backend}` is off by {figure:.3g} of eager's largest output in {name}"
            why = f"its numbers are as in the checkpoint, and the backend is at fault: {WAY_OUT}"
            raise _off(layer, what, figure, allowed, why)
        return BackendCheck(
            backend=plan.backend, dtype=name, figure=figure, tolerance=allowed, tokens=len(x_TD), whole=whole
        )

    def _tolerance(self, plan: LayerPlan, dtype: torch.dtype) -> float:
        names = [plan.format] + ([plan.shared_format] if plan.shared_format else [])
        widest = max(plan.hidden_size, plan.width, plan.shared_width)
        return tolerance(names, dtype, widest, self._plan.experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    """What the checkpoint says of a layer."""

    x_TD: Tensor
    """Tokens that the router sees; the first ones go through experts too."""
    there_TD: Tensor
    """The same in bf16, where the layer is."""
    weights_TS: Tensor
    """The router's, by slot."""
    output_TD: Tensor
    """Of the strips."""
    spots: Sequence[Spot]
    pieces: Sequence[Piece]
    """Where the strips are."""
    hidden: Span
    """Columns of a token that strips take."""
    allowed: float

    def fetched(self, routing: Routing) -> tuple[Routing, list[Tensor], list[Tensor]]:
        """`routing`, the strips' numbers and the rows of spots, brought to the CPU in one transfer."""
        answers = [each for each in routing if each is not None]
        numbers, rows = [piece.numbers() for piece in self.pieces], [spot.held for spot in self.spots]
        found = iter(moved([*answers, *numbers, *rows], torch.device("cpu")))
        here = Routing(next(found), next(found), None if routing.gate_T1 is None else next(found))
        return here, list(islice(found, len(numbers))), list(found)


def _off(layer: MoELayer, what: str, figure: float, allowed: float, why: str) -> VerificationError:
    text = f"layer {layer.index} (`{layer.name}`): {what}, allowed are {allowed:.3g}; {why}"
    return VerificationError(text, layer=layer.index, figure=figure, tolerance=allowed)


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
