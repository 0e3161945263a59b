"""Compare loaded layers with what the checkpoint says, and loads with each other.

The reference reads raw tensors, one expert at a time, in float64; it shares no arithmetic with `loader.formats`,
`loader.moe` or the kernels, and knows nothing of plans and slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatekeeper import Index, MoeTensors, TensorInfo
from loader.activation import ExpertConfig
from loader.checkpoint import Checkpoint, dtype_name
from loader.errors import VerificationError
from loader.formats import FORMATS
from loader.moe import MoELayer, RouterConfig
from loader.plan import Plan

TOKENS = 16
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
    """Run each layer on random tokens and compare with the reference computed from `tensors` of `index`.

    In `dtype`; None is the sharpest that the layer's backend has on its device, float32 or else bfloat16.

    Raises `VerificationError` at the first layer whose figure is beyond its tolerance or not a number.
    """
    found = []
    by_name = {each.name: each for each in tensors}
    with Checkpoint(index) as checkpoint:
        for layer, layer_plan in zip(layers, plan.layers, strict=True):
            device = next(layer.parameters()).device
            compute = dtype or sharpest(layer_plan.backend, device)
            x_TD = random_tokens(tokens, layer_plan.hidden_size, seed + layer.index).to(compute)
            names = [layer_plan.format] + ([layer_plan.shared_format] if layer_plan.shared_format else [])
            widest = max(layer_plan.hidden_size, layer_plan.width, layer_plan.shared_width)
            allowed = tolerance(names, compute, widest, plan.experts)
            expected_TD, clear_T = reference_layer(checkpoint, by_name[layer.name], plan.router, plan.experts, x_TD)
            with torch.no_grad():
                actual_TD = layer(x_TD.to(device)).cpu().double()
            if not clear_T.any():
                raise VerificationError(
                    f"layer {layer.index} (`{layer.name}`) can't be compared: its router scores experts alike for "
                    f"all of {tokens} random tokens; is `{layer.name}` trained at all?",
                    layer=layer.index,
                    figure=math.nan,
                    tolerance=allowed,
                )
            figure = relative_error(actual_TD[clear_T], expected_TD[clear_T])
            if not figure <= allowed:  # also where it is NaN
                raise VerificationError(
                    f"layer {layer.index} (`{layer.name}`) is off by {figure:.3g} of its largest output, allowed are "
                    f"{allowed:.3g} in {dtype_name(compute)}; the layer was loaded wrongly or its backend "
                    f"`{layer_plan.backend}` is at fault: try --set server.moe_runner_backend=eager",
                    layer=layer.index,
                    figure=figure,
                    tolerance=allowed,
                )
            found.append(
                Verified(
                    index=layer.index, name=layer.name, figure=figure, tolerance=allowed, tokens=int(clear_T.sum())
                )
            )
    return tuple(found)


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


# -- the reference ------------------------------------------------------------------------------------------------


def reference_layer(
    checkpoint: Checkpoint, tensors: MoeTensors, router: RouterConfig, experts: ExpertConfig, x_TD: Tensor
) -> tuple[Tensor, Tensor]:
    """Output of one MoE layer in float64, ``(T, D)``, and which tokens had a clear choice of experts, ``(T,)``."""
    x_TD = x_TD.double()
    assert tensors.router is not None
    logits_TE = x_TD @ checkpoint.fetch(tensors.router.name).double().T
    bias = None if tensors.router_bias is None else checkpoint.fetch(tensors.router_bias.name).double()
    if bias is not None and router.bias == "logits":
        logits_TE, bias = logits_TE + bias, None
    choices = [_choose(row, None if bias is None else bias.tolist(), router) for row in logits_TE.tolist()]
    y_TD = torch.zeros_like(x_TD)
    for expert in sorted({e for chosen, _ in choices for e in chosen}):
        mlp = _Mlp(checkpoint, tensors.expert(expert), tensors.expert_bias(expert), experts)
        for token, (chosen, _) in enumerate(choices):
            if weight := chosen.get(expert):
                x_D = x_TD[token]
                y_TD[token] += mlp(weight * x_D) if experts.weighed == "input" else weight * mlp(x_D)
    if tensors.shared:
        shared_TD = _Mlp(checkpoint, tensors.shared, {}, experts)(x_TD)
        if tensors.shared_gate is not None:
            shared_TD = shared_TD * torch.sigmoid(x_TD @ checkpoint.fetch(tensors.shared_gate.name).double().T)
        y_TD += shared_TD
    return y_TD, torch.tensor([margin > CLEAR_MARGIN for _, margin in choices])


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
    """One expert in float64, worked out from its definition."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        projections: Mapping[str, Mapping[str, TensorInfo]],
        biases: Mapping[str, TensorInfo],
        config: ExpertConfig,
    ) -> None:
        self.weights = {each: raw_weight(checkpoint, parts) for each, parts in projections.items()}
        self.biases = {each: fetch_part(checkpoint, info).double() for each, info in biases.items()}
        self.config = config

    def __call__(self, x: Tensor) -> Tensor:
        c, gate, up = self.config, self._project("gate", x), self._project("up", x)
        if c.limit is not None:
            gate, up = torch.minimum(gate, torch.tensor(c.limit)), torch.minimum(up, torch.tensor(c.limit))
            up = torch.maximum(up, torch.tensor(-c.limit))
        if c.hidden_act == "gelu_pytorch_tanh":
            act = gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        else:
            act = gate / (1 + torch.exp(-gate * (1.0 if c.alpha is None else c.alpha)))
        return self._project("down", act * (up + c.up_offset))

    def _project(self, projection: str, x: Tensor) -> Tensor:
        y = x @ self.weights[projection].T
        return y + self.biases[projection] if projection in self.biases else y


def fetch_part(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
    """A tensor, or what is meant of it: one expert's matrix, gathered row by row from a stack of all."""
    tensor = checkpoint.fetch(info.name)
    view = info.view
    if view is None:
        return tensor
    one = tensor[view.item]
    one = one.reshape(one.shape[0], -1) if one.dim() > 1 else one
    picked = [one[:, row] if view.transposed else one[row] for row in view.rows]
    return torch.stack(picked)


def raw_weight(checkpoint: Checkpoint, parts: Mapping[str, TensorInfo]) -> Tensor:
    """The weight that these tensors store, ``(out, in)`` in float64, worked out number by number of bits."""
    return raw_numbers({suffix: fetch_part(checkpoint, info) for suffix, info in parts.items()})


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
