"""Compare loaded layers with what the checkpoint says, and loads with each other.

The reference reads raw tensors, one expert at a time, in float64; it shares no arithmetic with `loader.formats`,
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from gatekeeper import Index, MoeTensors, TensorInfo
from loader.checkpoint import Checkpoint, dtype_name
from loader.errors import VerificationError
from loader.formats import FORMATS
from loader.moe import MoELayer, RouterConfig
from loader.narrow import Source, Strip, Strips
from loader.plan import LayerPlan, Plan
from loader.spots import compare_rows

ROUTED_TOKENS = 16
"""Tokens that go through the router."""
TOKENS = 2
"""Those of them that go through experts too: at top 8, up to 16 experts and the shared one."""
CLEAR_MARGIN = 1e-5
"""Scores that differ by a smaller part may be ranked either way in float32; such tokens are not compared."""


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


def tolerance(formats: Iterable[str], dtype: torch.dtype, widest: int) -> float:
    """What `figure` may be: twice the format's roundings to `dtype`, plus the float32 sums over `widest` products.

    Each rounding is at most half an ulp, and a sum of n products is off by at most n ulp / 2 (Higham, Accuracy and
    Stability of Numerical Algorithms, 2nd ed., section 3.1).
    """
    roundings = max(FORMATS[name].roundings for name in formats)
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
    with Verifier(plan, index, tensors, tokens=tokens, seed=seed, dtype=dtype) as verifier:
        for layer, layer_plan in zip(layers, plan.layers, strict=True):
            verifier(layer, layer_plan)
        return verifier.verified


class Verifier:
    """A check for `build`: runs a layer on random tokens and compares it with the checkpoint.

    `tokens` go through experts, in `dtype`; None is the sharpest that the layer's backend has on its device, float32
    or else bfloat16. Raises `VerificationError` where a figure is beyond its tolerance or not a number.
    """

    def __init__(
        self,
        plan: Plan,
        index: Index,
        tensors: Sequence[MoeTensors],
        *,
        tokens: int = TOKENS,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._plan, self._checkpoint = plan, Checkpoint(index)
        self._tensors = {each.name: each for each in tensors}
        self._tokens, self._seed, self._dtype = tokens, seed, dtype
        self._found: list[Verified] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._checkpoint.__exit__(kind, error, traceback)

    @property
    def verified(self) -> tuple[Verified, ...]:
        """What was compared so far."""
        return tuple(self._found)

    @torch.no_grad()
    def __call__(self, layer: MoELayer, plan: LayerPlan) -> None:
        """Compare one layer."""
        tensors = self._tensors[layer.name]
        device = next(layer.parameters()).device
        dtype = self._dtype or sharpest(plan.backend, device)
        names = [plan.format] + ([plan.shared_format] if plan.shared_format else [])
        allowed = tolerance(names, dtype, max(plan.hidden_size, plan.width, plan.shared_width))
        count = max(ROUTED_TOKENS, self._tokens)
        x_TD = random_tokens(count, plan.hidden_size, self._seed + layer.index).to(dtype)
        strips = Strips(plan, self._plan.rank, self._seed + layer.index)
        reference = Reference(self._checkpoint, tensors, self._plan.router, strips)
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
        expected_TS = reference.weights(x_TD, choices)
        weights_TK, ids_TK = layer.router(x_TD.to(device))
        actual_TS = torch.zeros(expected_TS.shape, dtype=torch.float64)
        actual_TS.scatter_add_(1, ids_TK.cpu(), weights_TK.cpu().double())
        figure = relative_error(actual_TS, expected_TS)
        x_TD, choices = x_TD[: self._tokens], choices[: self._tokens]
        narrow, touched = strips.narrowed(layer, x_TD.to(device))
        actual_TD = narrow(x_TD[:, slice(*strips.hidden)].to(device)).cpu().double()
        figure = worse(figure, relative_error(actual_TD, reference.output(x_TD, choices)))
        if not figure <= allowed:  # also where it is NaN
            raise VerificationError(
                f"layer {layer.index} (`{layer.name}`) is off by {figure:.3g} of its largest output, allowed are "
                f"{allowed:.3g} in {dtype_name(dtype)}; the layer was loaded wrongly or its backend "
                f"`{plan.backend}` is at fault: try --set server.moe_runner_backend=eager",
                layer=layer.index,
                figure=figure,
                tolerance=allowed,
            )
        rows = compare_rows(layer, plan, self._plan.rank, tensors, self._checkpoint, self._seed + layer.index)
        self._found.append(
            Verified(
                index=layer.index,
                name=layer.name,
                figure=figure,
                tolerance=allowed,
                tokens=len(x_TD),
                experts=touched,
                rows=rows,
            )
        )


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


# -- the reference ------------------------------------------------------------------------------------------------


class Reference:
    """One MoE layer from its raw tensors, in float64; of experts only the strips, of which it is told alone."""

    def __init__(self, checkpoint: Checkpoint, tensors: MoeTensors, router: RouterConfig, strips: Strips) -> None:
        self._checkpoint, self._tensors, self._router, self._strips = checkpoint, tensors, router, strips

    def choices(self, x_TD: Tensor) -> tuple[list[dict[int, float]], Tensor]:
        """Weights of each token's experts, and which tokens had a clear choice of them, ``(T,)``."""
        router, bias = self._tensors.router, self._tensors.router_bias
        assert router is not None
        biases = None if bias is None else self._checkpoint.fetch(bias.name).double().tolist()
        logits = (x_TD.double() @ self._checkpoint.fetch(router.name).double().T).tolist()
        found = [_choose(row, biases, self._router) for row in logits]
        return [chosen for chosen, _ in found], torch.tensor([margin > CLEAR_MARGIN for _, margin in found])

    def weights(self, x_TD: Tensor, choices: Sequence[Mapping[int, float]]) -> Tensor:
        """The weight of each slot that is here for each token, ``(T, slots)``."""
        first, last = self._strips.held
        shared_T = self._shared_weight(x_TD) * self._strips.shared_weight
        dense_TS = torch.zeros(len(x_TD), last - first + self._strips.shared_slots, dtype=torch.float64)
        dense_TS[:, last - first :] = shared_T.unsqueeze(-1)
        for token, chosen in enumerate(choices):
            for expert, weight in chosen.items():
                if first <= expert < last:
                    dense_TS[token, expert - first] = weight
        return dense_TS

    def output(self, x_TD: Tensor, choices: Sequence[Mapping[int, float]]) -> Tensor:
        """What the strips of experts that are here sum up to, as wide as the strip of the hidden size."""
        shared_T = self._shared_weight(x_TD) * self._strips.shared_weight
        x_TD = x_TD[:, slice(*self._strips.hidden)].double()
        y_TD = torch.zeros_like(x_TD)
        first, last = self._strips.held
        for expert in sorted({e for chosen in choices for e in chosen if first <= e < last}):
            weight_T = torch.tensor([chosen.get(expert, 0.0) for chosen in choices], dtype=torch.float64)
            strip = self._strips.of_routed(self._checkpoint, expert)
            y_TD += weight_T.unsqueeze(-1) * _mlp(strip, self._tensors.routed[expert], x_TD)
        if self._tensors.shared:
            for strip in self._strips.of_shared(self._checkpoint):
                y_TD += shared_T.unsqueeze(-1) * _mlp(strip, self._tensors.shared, x_TD)
        return y_TD

    def _shared_weight(self, x_TD: Tensor) -> Tensor:
        gate = self._tensors.shared_gate
        if gate is None:
            return torch.ones(len(x_TD), dtype=torch.float64)
        return torch.sigmoid(x_TD.double() @ self._checkpoint.fetch(gate.name).double()[0])


def _choose(
    logits: Sequence[float], bias: Sequence[float] | None, router: RouterConfig
) -> tuple[dict[int, float], float]:
    """Weights of the chosen experts of one token, and by how much the choice was clear."""
    if router.scoring_func == "sigmoid":
        scores = [1 / (1 + math.exp(-each)) for each in logits]
    else:
        largest = max(logits)
        exponentials = [math.exp(each - largest) for each in logits]
        scores = [each / sum(exponentials) for each in exponentials]
    ranked = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // router.n_group
    margin = math.inf
    open_experts = list(range(len(scores)))
    if router.n_group > 1:
        best = 2 if router.group_score == "top2_sum" else 1
        worth = [sum(sorted(ranked[g * size : (g + 1) * size])[-best:]) for g in range(router.n_group)]
        groups, margin = _largest(dict(enumerate(worth)), router.topk_group)
        open_experts = [e for g in groups for e in range(g * size, (g + 1) * size)]
    chosen, clear = _largest({e: ranked[e] for e in open_experts}, router.top_k)
    total = sum(scores[e] for e in chosen) + 1e-20 if router.norm_topk_prob else 1.0
    factor = 1.0 if router.norm_topk_prob and not router.scales_normalised else router.routed_scaling_factor
    return {e: scores[e] / total * factor for e in chosen}, min(margin, clear)


def _largest(values: Mapping[int, float], count: int) -> tuple[list[int], float]:
    """The keys of the largest values, and by what part of its size the least of them beats the next."""
    order = sorted(values, key=lambda key: -values[key])
    if len(order) <= count:
        return order[:count], math.inf
    last, following = values[order[count - 1]], values[order[count]]
    return order[:count], (last - following) / max(abs(last), 1e-30)


def _mlp(strip: Strip, projections: Mapping[str, Mapping[str, TensorInfo]], x_TD: Tensor) -> Tensor:
    gate, up = (raw_weight(strip.rows, projections[each]) for each in ("gate", "up"))
    down = raw_weight(strip.columns, projections["down"])
    gated = _times(x_TD, gate)
    return _times(gated / (1 + torch.exp(-gated)) * _times(x_TD, up), down)


def _times(x_TD: Tensor, weight_FD: Tensor) -> Tensor:
    """``x @ weight.T`` without BLAS, whose threads wait for each other longer than a strip takes."""
    return (x_TD.unsqueeze(1) * weight_FD).sum(-1)


def raw_weight(checkpoint: Source, parts: Mapping[str, TensorInfo]) -> Tensor:
    """The weight that these tensors store, ``(out, in)`` in float64, worked out number by number of bits."""
    raw = {suffix: checkpoint.fetch(info.name) for suffix, info in parts.items()}
    if "weight_packed" in raw and raw["weight_packed"].dtype is torch.int32:
        # A little-endian int32 of eight nibbles is four bytes of two, the low one first.
        values = _nibbles(raw["weight_packed"].contiguous().view(torch.uint8)).double() - 8
        return values * raw["weight_scale"].double().repeat_interleave(32, dim=1)
    weight = raw["weight"]
    if weight.dtype is torch.uint8:
        code = _nibbles(weight).long()
        exponent, mantissa = (code >> 1) & 3, (code & 1).double()
        size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
        scale = raw["weight_scale"].view(torch.float8_e8m0fnu).double().repeat_interleave(32, dim=1)
        return torch.where(code >= 8, -size, size) * scale
    if weight.dtype is torch.float8_e4m3fn:
        scale = raw["weight_scale_inv"].double()
        row, column = (torch.arange(size) // 128 for size in weight.shape)
        return weight.double() * scale[row][:, column]
    return weight.double()


def _nibbles(packed: Tensor) -> Tensor:
    wide = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.uint8)
    wide[:, 0::2], wide[:, 1::2] = packed % 16, packed // 16
    return wide
