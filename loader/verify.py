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
from loader.activation import ExpertConfig
from loader.checkpoint import Checkpoint, dtype_name
from loader.errors import VerificationError
from loader.formats import FORMATS
from loader.moe import MoELayer, RouterConfig
from loader.narrow import Cut, Strip, Strips
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
        widest = max(plan.hidden_size, plan.width, plan.shared_width)
        allowed = tolerance(names, dtype, widest, self._plan.experts)
        count = max(ROUTED_TOKENS, self._tokens)
        x_TD = random_tokens(count, plan.hidden_size, self._seed + layer.index).to(dtype)
        strips = Strips(plan, self._plan.rank, self._seed + layer.index)
        reference = Reference(self._checkpoint, tensors, self._plan, strips)
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

    def __init__(self, checkpoint: Checkpoint, tensors: MoeTensors, plan: Plan, strips: Strips) -> None:
        self._checkpoint, self._tensors, self._strips = checkpoint, tensors, strips
        self._router, self._experts = plan.router, plan.experts

    def choices(self, x_TD: Tensor) -> tuple[list[dict[int, float]], Tensor]:
        """Weights of each token's experts, and which tokens had a clear choice of them, ``(T,)``."""
        router, bias = self._tensors.router, self._tensors.router_bias
        assert router is not None
        biases = None if bias is None else self._checkpoint.fetch(bias.name).double()
        logits_TE = x_TD.double() @ self._checkpoint.fetch(router.name).double().T
        if biases is not None and self._router.bias == "logits":
            logits_TE, biases = logits_TE + biases, None
        ranks = None if biases is None else biases.tolist()
        found = [_choose(row, ranks, self._router) for row in logits_TE.tolist()]
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
            tensors, biases = self._tensors.expert(expert), self._tensors.expert_bias(expert)
            mlp = _Mlp(self._strips.of_routed(self._checkpoint, expert), tensors, biases, self._experts)
            for token, chosen in enumerate(choices):
                if weight := chosen.get(expert):
                    x_1D = x_TD[token : token + 1]
                    is_input = self._experts.weighed == "input"
                    y_TD[token] += (mlp(weight * x_1D) if is_input else weight * mlp(x_1D))[0]
        if self._tensors.shared:
            for strip in self._strips.of_shared(self._checkpoint):
                y_TD += shared_T.unsqueeze(-1) * _Mlp(strip, self._tensors.shared, {}, self._experts)(x_TD)
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


class _Mlp:
    """The strip of one expert in float64, worked out from its definition."""

    def __init__(
        self,
        strip: Strip,
        projections: Mapping[str, Mapping[str, TensorInfo]],
        biases: Mapping[str, TensorInfo],
        config: ExpertConfig,
    ) -> None:
        cuts = {"gate": strip.rows, "up": strip.rows, "down": strip.columns}
        self.weights = {each: raw_weight(cuts[each], parts) for each, parts in projections.items()}
        self.biases = {each: cuts[each].bias(info).double() for each, info in biases.items()}
        self.config = config

    def __call__(self, x_TD: Tensor) -> Tensor:
        c, gate, up = self.config, self._project("gate", x_TD), self._project("up", x_TD)
        if c.limit is not None:
            gate, up = torch.minimum(gate, torch.tensor(c.limit)), torch.minimum(up, torch.tensor(c.limit))
            up = torch.maximum(up, torch.tensor(-c.limit))
        if c.hidden_act == "gelu_pytorch_tanh":
            act = gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        else:
            act = gate / (1 + torch.exp(-gate * (1.0 if c.alpha is None else c.alpha)))
        return self._project("down", act * (up + c.up_offset))

    def _project(self, projection: str, x_TD: Tensor) -> Tensor:
        # Without BLAS, whose threads wait for each other longer than a strip takes.
        y_TD = (x_TD.unsqueeze(1) * self.weights[projection]).sum(-1)
        return y_TD + self.biases[projection] if projection in self.biases else y_TD


def raw_weight(cut: Cut, parts: Mapping[str, TensorInfo]) -> Tensor:
    """The weight that these tensors store, ``(out, in)`` in float64, worked out number by number of bits."""
    return raw_numbers({suffix: cut.part(suffix, info) for suffix, info in parts.items()})


def raw_numbers(raw: Mapping[str, Tensor]) -> Tensor:
    """What the tensors of one projection, by suffix, mean: ``(out, in)`` in float64.

    Told by what lies there alone: elements by their dtype, scales by their shape, a factor by its name.
    """
    numbers = _elements(next(raw[name] for name in ("weight_packed", "blocks", "weight") if name in raw))
    scale = next((raw[name] for name in ("weight_scale", "weight_scale_inv", "scale", "scales") if name in raw), None)
    if scale is not None:
        numbers = numbers * _spread(_scales(scale), *numbers.shape)
    if "weight_scale_2" in raw:
        numbers = numbers * raw["weight_scale_2"].double().reshape(())
    if "weight_global_scale" in raw:
        numbers = numbers / raw["weight_global_scale"].double().reshape(())
    return numbers


def _elements(stored: Tensor) -> Tensor:
    if stored.dtype is torch.int32:
        # A little-endian int32 of eight nibbles is four bytes of two, the low one first.
        return _nibbles(stored.contiguous().view(torch.uint8)).double() - 8
    if stored.dtype in (torch.uint8, torch.int8):
        return _small_floats(_nibbles(stored.view(torch.uint8)), exponent_bits=2, mantissa_bits=1)
    if stored.dtype is torch.float8_e4m3fn:
        code = stored.view(torch.uint8)
        # The one exponent and mantissa that would be 480 is NaN instead: OCP 8-bit Floating Point Specification 1.0.
        return _small_floats(code, exponent_bits=4, mantissa_bits=3).masked_fill(code % 128 == 127, math.nan)
    return stored.double()


def _small_floats(code: Tensor, *, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Sign, exponent and mantissa, worked out as IEEE 754 does: biased by half, gradual towards zero."""
    field = code.long()
    mantissa = (field % 2**mantissa_bits).double() / 2**mantissa_bits
    exponent = field // 2**mantissa_bits % 2**exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    size = torch.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias).double())
    return torch.where(field >= 2 ** (exponent_bits + mantissa_bits), -size, size)


def _scales(stored: Tensor) -> Tensor:
    """As numbers; a byte is an exponent."""
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):
        code = stored.view(torch.uint8).double()
        return torch.where(code == 255, math.nan, 2.0 ** (code - 127))
    return _elements(stored)


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """A scale for each number: by blocks of 128 x 128, of equal parts of each row, by row or for all."""
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    down, across = scale.shape
    if (down, across) == (math.ceil(rows / 128), math.ceil(columns / 128)):
        row, column = torch.arange(rows) // 128, torch.arange(columns) // 128
    else:
        row, column = torch.arange(rows) * down // rows, torch.arange(columns) * across // columns
    return scale[row][:, column]


def _nibbles(packed: Tensor) -> Tensor:
    wide = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.uint8)
    wide[:, 0::2], wide[:, 1::2] = packed % 16, packed // 16
    return wide
