"""What verification compares a layer with: the MoE layer from raw tensors, one expert at a time, in float64.

It shares no arithmetic with `loader.formats`, `loader.moe` or the kernels, and knows nothing of plans and slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gatekeeper import MoeTensors, TensorInfo
from loader.activation import ExpertConfig
from loader.narrow import Strip, Strips
from loader.plan import Plan
from loader.raw import Reader
from loader.raw_numbers import raw_numbers
from loader.router_config import RouterConfig

CLEAR_MARGIN = 1e-5
"""Scores that differ by a smaller part may be ranked either way in float32; such tokens are not compared."""
ROUTER_ROWS = 32
"""Rows of a router that are multiplied at once: 1.8 MB in float64 at a hidden size of 7168."""
EXPERTS_AT_ONCE = 4
"""Strips of 32 x 256 that are worked out at once: as many numbers as torch takes without threads of its own."""


class Reference:
    """One MoE layer from its raw tensors, in float64; of experts only the strips, of which it is told alone."""

    def __init__(self, reader: Reader, tensors: MoeTensors, plan: Plan, strips: Strips) -> None:
        self._reader, self._tensors, self._strips = reader, tensors, strips
        self._router, self._experts = plan.router, plan.experts

    def choices(self, x_TD: Tensor) -> tuple[list[dict[int, float]], Tensor]:
        """Weights of each token's experts, and which tokens had a clear choice of them, ``(T,)``."""
        router, bias = self._tensors.router, self._tensors.router_bias
        assert router is not None
        biases = None if bias is None else self._reader.checkpoint.fetch(bias.name).double()
        logits_TE = self._products(x_TD, router)
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
        here = [
            (token, expert - first, weight)
            for token, chosen in enumerate(choices)
            for expert, weight in chosen.items()
            if first <= expert < last
        ]
        if here:
            tokens, slots, weights = zip(*here, strict=True)
            dense_TS[tokens, slots] = torch.tensor(weights, dtype=torch.float64)
        return dense_TS

    def output(self, x_TD: Tensor, choices: Sequence[Mapping[int, float]]) -> Tensor:
        """What the strips of experts that are here sum up to, as wide as the strip of the hidden size."""
        shared_T = self._shared_weight(x_TD) * self._strips.shared_weight
        x_TD = x_TD[:, slice(*self._strips.hidden)].double()
        y_TD = torch.zeros_like(x_TD)
        first, last = self._strips.held
        experts = sorted({e for chosen in choices for e in chosen if first <= e < last})
        routed = [_Stored(self._strips.of_routed(e), self._tensors.expert(e), self._biases(e)) for e in experts]
        for expert, mlp in zip(experts, self._mlps(routed), strict=True):
            for token, chosen in enumerate(choices):
                if weight := chosen.get(expert):
                    x_1D = x_TD[token : token + 1]
                    is_input = self._experts.weighed == "input"
                    y_TD[token] += (mlp(weight * x_1D) if is_input else weight * mlp(x_1D))[0]
        if self._tensors.shared:
            for mlp in self._mlps([_Stored(strip, self._tensors.shared, {}) for strip in self._strips.of_shared()]):
                y_TD += shared_T.unsqueeze(-1) * mlp(x_TD)
        return y_TD

    def _biases(self, expert: int) -> Mapping[str, TensorInfo]:
        biases = self._tensors.expert_bias(expert)
        return {name: info for name, info in biases.items() if name != "down" or self._strips.adds_down_bias}

    def _mlps(self, stored: Sequence[_Stored]) -> Iterator[_Mlp]:
        for first in range(0, len(stored), EXPERTS_AT_ONCE):
            yield from _mlps(self._reader, stored[first : first + EXPERTS_AT_ONCE], self._experts)

    def _shared_weight(self, x_TD: Tensor) -> Tensor:
        gate = self._tensors.shared_gate
        if gate is None:
            return torch.ones(len(x_TD), dtype=torch.float64)
        return torch.sigmoid(self._products(x_TD, gate)[:, 0])

    def _products(self, x_TD: Tensor, matrix: TensorInfo) -> Tensor:
        """``x @ matrix.T``, some rows at a time: what is touched first costs more than it takes to multiply it."""
        x_TD, rows, fetch = x_TD.double(), matrix.shape[0], self._reader.checkpoint.fetch
        spans = ((first, min(first + ROUTER_ROWS, rows)) for first in range(0, rows, ROUTER_ROWS))
        return torch.cat([x_TD @ fetch(matrix.name, span).double().T for span in spans], 1)


def _choose(
    logits: Sequence[float], bias: Sequence[float] | None, router: RouterConfig
) -> tuple[dict[int, float], float]:
    """Weights of the chosen experts of one token, and by how much the choice was clear."""
    if router.scoring_func == "sigmoid":
        scores = [1 / (1 + math.exp(-each)) for each in logits]
    else:
        largest = max(logits)
        exponentials = [math.exp(each - largest) for each in logits]
        total = sum(exponentials)
        scores = [each / total for each in exponentials]
    ranked = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // router.n_group
    margin = math.inf
    open_experts: Sequence[int] = range(len(scores))
    if router.n_group > 1:
        best = 2 if router.group_score == "top2_sum" else 1
        worth = [sum(sorted(ranked[g * size : (g + 1) * size])[-best:]) for g in range(router.n_group)]
        groups, margin = _largest(range(router.n_group), worth, router.topk_group)
        open_experts = [e for g in groups for e in range(g * size, (g + 1) * size)]
    chosen, clear = _largest(open_experts, ranked, router.top_k)
    total = sum(scores[e] for e in chosen) + 1e-20 if router.norm_topk_prob else 1.0
    factor = 1.0 if router.norm_topk_prob and not router.scales_normalised else router.routed_scaling_factor
    return {e: scores[e] / total * factor for e in chosen}, min(margin, clear)


def _largest(places: Sequence[int], values: Sequence[float], count: int) -> tuple[list[int], float]:
    """The places of the largest values, and by what part of its size the least of them beats the next."""
    order = sorted(places, key=values.__getitem__, reverse=True)
    if len(order) <= count:
        return order[:count], math.inf
    last, following = values[order[count - 1]], values[order[count]]
    return order[:count], (last - following) / max(abs(last), 1e-30)


class _Stored(NamedTuple):
    """Where the strip of one expert is in the checkpoint."""

    strip: Strip
    projections: Mapping[str, Mapping[str, TensorInfo]]
    biases: Mapping[str, TensorInfo]


def _mlps(reader: Reader, stored: Sequence[_Stored], config: ExpertConfig) -> list[_Mlp]:
    """Read experts that are stored alike, and work out their numbers together."""
    weights, biases = {}, {}
    for projection, parts in stored[0].projections.items():
        kept = stored[0].strip.of(projection).parts.keys() & parts.keys()
        weights[projection] = raw_numbers({suffix: _read(reader, stored, projection, suffix) for suffix in kept})
    for projection in stored[0].biases:
        matrices = [one.strip.of(projection).bias(reader.matrix(one.biases[projection])) for one in stored]
        biases[projection] = reader.read(matrices).flatten(1).double()
    return [
        _Mlp({p: each[i] for p, each in weights.items()}, {p: each[i] for p, each in biases.items()}, config)
        for i in range(len(stored))
    ]


def _read(reader: Reader, stored: Sequence[_Stored], projection: str, suffix: str) -> Tensor:
    matrices = (reader.matrix(one.projections[projection][suffix]) for one in stored)
    return reader.read([one.strip.of(projection).part(suffix, m) for one, m in zip(stored, matrices, strict=True)])


@dataclass(frozen=True, slots=True)
class _Mlp:
    """The strip of one expert in float64, worked out from its definition."""

    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    config: ExpertConfig

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
