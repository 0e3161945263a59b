"""What goes where: a Plan names every slot, the tensor that fills it, and the bytes; it holds no tensor itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from gatekeeper import View, ranges
from loader.activation import ExpertConfig
from loader.costs import FusionCost, RankBytes
from loader.dtypes import itemsize, name_of
from loader.formats.base import Layout, Span
from loader.router_config import RouterConfig
from loader.runs import in_runs
from loader.text import count, human

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One checkpoint tensor, or a block of it, and the rows of the slot that it fills."""

    key: str
    """``model.layers.3.mlp.shared_experts.gate_proj.weight``"""
    param: str
    """``layers.3.experts.w13_weight``"""
    expert: int | None
    """Slot: routed experts first, then the fused shared ones; None for a parameter that is not stacked."""
    rows: Span
    """Rows of the slot: gate_proj fills (0, F), up_proj (F, 2 * F), down_proj (0, D), in stored rows."""
    source: tuple[Span, Span] | None = None
    """Rows and columns of the tensor, or of what `view` shows of it, in stored items; None: all of it."""
    again: bool = False
    """Whether another slot took the same: a scale of a whole matrix goes to each slot with a part of that matrix."""
    view: View | None = None
    """Where the expert's matrix is in a tensor that holds those of all experts; None: the tensor is the matrix."""

    def cut(self, tensor: Tensor, axes: int) -> Tensor:
        """What of the tensor fills the rows, with so many axes: a vector is a column in memory, a scalar 1 x 1.

        Shares the tensor's memory.
        """
        block = tensor
        if self.view is not None:
            block = block[self.view.item]
            block = block.flatten(1) if block.dim() > 2 else block
            block = block.T if self.view.transposed else block
            block = block[self.view.rows.start : self.view.rows.stop : self.view.rows.step]
        block = block if block.dim() >= axes else block.reshape(-1, 1)
        if self.source is not None:
            (top, bottom), (left, right) = self.source
            block = block[top:bottom, left:right] if block.dim() > 1 else block[top:bottom]
        return block


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """A parameter to allocate."""

    name: str
    """``layers.3.experts.w13_weight_packed``"""
    shape: tuple[int, ...]
    """``(385, 4096, 896)``: slots first where it is stacked."""
    dtype: str
    """As in the checkpoint, by safetensors' word: ``I32``."""
    runs: bool = False
    """Whether the layer's kernels read it in runs of columns (`loader.runs`): scales of groups."""

    @property
    def laid_out(self) -> tuple[int, ...]:
        """Shape once the layer is loaded: ``(385, 28, 4096, 8)`` of ``(385, 4096, 224)`` in runs."""
        return in_runs(self.shape) if self.runs else self.shape

    @property
    def nbytes(self) -> int:
        """Memory of the parameter."""
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def kind(self) -> Literal["experts", "shared", "routers"]:
        """Whose it is; the gate of a shared expert counts as a router."""
        module = self.name.split(".")[2]
        return "experts" if module == "experts" else "shared" if module == "shared" else "routers"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeNote:
    """A tensor whose only content is the shape of a weight (``weight_shape``): compared while building, not kept."""

    key: str
    """``….experts.0.gate_proj.weight_shape``"""
    shape: Span
    """What it must hold: ``(2048, 7168)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Which share of every layer a plan is for."""

    index: int
    """5 of 8"""
    tp_size: int
    """Ranks in all: 8."""
    ep_size: int
    """Groups of ranks that hold other experts: 2."""

    @property
    def moe_tp_size(self) -> int:
        """Slices that an expert's width is cut into: 4."""
        return self.tp_size // self.ep_size

    @property
    def moe_tp_rank(self) -> int:
        """Which of them is here: 1."""
        return self.index % self.moe_tp_size

    @property
    def adds_down_bias(self) -> bool:
        """Whether biases of down are here: ranks' outputs are summed up, so that one rank of a group adds them."""
        return self.moe_tp_rank == 0

    def experts(self, n_routed: int) -> Span:
        """The routed experts of this rank's group, of `n_routed`: (192, 384)."""
        group = self.index // self.moe_tp_size
        return n_routed * group // self.ep_size, n_routed * (group + 1) // self.ep_size


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One MoE layer."""

    index: int
    """3"""
    name: str
    """``language_model.model.layers.3.mlp``"""
    role: Literal["main", "mtp"]
    """``mtp`` for a draft layer."""
    backend: str
    """Kernel of the experts: ``eager``."""
    dense_shared_from: int
    """Tokens of a call from which shared experts in slots are computed on their own: 513; 0: never."""
    layout: Layout
    """How the checkpoint stores the experts in the stack."""
    shared: Literal["slot", "separate", "none"]
    """Where the shared expert goes."""
    shared_layout: Layout | None
    """How it stores a shared expert on its own; None where there is none on its own."""
    n_routed: int
    """Routed experts E: 384."""
    n_shared: int
    """Shared experts S: 1."""
    hidden_size: int
    """D: 7168"""
    width: int
    """moe_intermediate_size F: 2048."""
    shared_width: int
    """Width of the shared MLP, all of its slots together: 2048."""
    router_bias: bool
    """Whether the router has a correction bias."""
    shared_gate: bool
    """Whether the shared expert has a gate of its own (Qwen2-MoE)."""
    params: tuple[ParamSpec, ...]
    """What is allocated."""
    placements: tuple[Placement, ...]
    """What fills it; every row of every slot exactly once."""
    notes: tuple[ShapeNote, ...]
    """Tensors that are only compared."""
    unused: tuple[str, ...] = ()
    """Tensors that a layer's weights have no use for, by name: scales of quantized activations."""
    held: Span | None = None
    """Routed experts in the stack, on a rank that has some of them: (192, 384); None: all."""
    shared_weight: float = 1.0
    """Weight of shared experts in slots that several ranks have: 1 / ep."""

    @property
    def format(self) -> str:
        """Storage of the stacked experts: ``int4_g32``."""
        return self.layout.name

    @property
    def shared_format(self) -> str | None:
        """Storage of a shared expert on its own: ``bf16``."""
        return None if self.shared_layout is None else self.shared_layout.name

    @property
    def routed_here(self) -> Span:
        """Routed experts in the stack: (192, 384)."""
        return self.held or (0, self.n_routed)

    @property
    def is_part(self) -> bool:
        """Whether other ranks have routed experts that this stack has not."""
        return self.routed_here != (0, self.n_routed)

    @property
    def n_slots(self) -> int:
        """Experts in the stack: routed ones and fused shared ones."""
        first, last = self.routed_here
        return last - first + (self.n_shared if self.shared == "slot" else 0)

    @property
    def nbytes(self) -> int:
        """Memory of the layer on a device that holds all that this plan has."""
        return sum(param.nbytes for param in self.params)

    def part_bytes(self, kind: Literal["experts", "shared", "routers"]) -> int:
        """Memory of the parameters of one kind."""
        return sum(param.nbytes for param in self.params if param.kind == kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that a load will do, known before a tensor is read."""

    family: str
    """``kimi_k25``"""
    runner: str
    """``target`` or ``draft``."""
    router: RouterConfig
    """How tokens choose experts, the same in all layers."""
    experts: ExpertConfig
    """What an expert computes, the same in all layers."""
    layers: tuple[LayerPlan, ...]
    """MoE layers of this runner, by index."""
    per_rank: RankBytes
    """Memory of each rank under the facts' tensor and expert parallelism."""
    fusion: FusionCost
    """What the shared experts in slots cost and save."""
    source: Literal["headers", "config"] = "headers"
    """Where names, dtypes and shapes are from: safetensors headers, or config.json alone."""
    rank: Rank | None = None
    """The rank that this is for; None: all of every layer."""

    @property
    def nbytes(self) -> int:
        """Memory of all layers on one device."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def placements(self) -> Iterator[Placement]:
        """Of all layers, in order."""
        return (placement for layer in self.layers for placement in layer.placements)

    def as_json(self, *, tensors: bool = False) -> dict[str, Any]:
        """Plain data for ``--json``; with `tensors`, every placement too."""
        return {
            "family": self.family,
            "runner": self.runner,
            "source": self.source,
            "bytes": self.nbytes,
            "bytes_per_rank": self.per_rank.as_json(),
            "rank": None if self.rank is None else asdict(self.rank),
            "fusion": self.fusion.as_json(),
            "layers": [_layer_json(layer, tensors) for layer in self.layers],
        }

    def lines(self) -> Iterator[str]:
        """For people; layers that are alike share a line."""
        n = sum(len(layer.placements) for layer in self.layers)
        alone = ", from config.json alone" if self.source == "config" else ""
        yield f"{self.runner}: {count(len(self.layers), 'MoE layer')} of {self.family}{alone}"
        for text, indices in _alike(self.layers).items():
            yield f"  {'layer' if len(indices) == 1 else 'layers'} {ranges(indices)}: {text}"
        if unused := sum(len(layer.unused) for layer in self.layers):
            yield f"  {count(unused, 'tensor')} of quantized activations not used: only weights are quantized here"
        whose = "in all" if self.rank is None else f"on rank {self.rank.index}"
        yield f"  {n} placements, {human(self.nbytes)} {whose}; {self.per_rank.text()}"
        yield f"  {self.fusion.text()}"


def _alike(layers: tuple[LayerPlan, ...]) -> Mapping[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for layer in layers:
        groups.setdefault(_describe(layer), []).append(layer.index)
    return groups


def _describe(layer: LayerPlan) -> str:
    last = layer.n_slots - 1
    where = {
        "slot": f"shared expert in slot {last}"
        if layer.n_shared == 1
        else f"shared experts in slots {layer.n_routed}-{last}",
        "separate": f"shared expert on its own in {layer.shared_format}",
        "none": "no shared expert",
    }[layer.shared]
    if layer.shared == "slot" and layer.dense_shared_from:
        where += f" (on its own from {layer.dense_shared_from} tokens)"
    return f"{layer.n_routed} routed experts in {layer.format}, {where}, backend {layer.backend}, {human(layer.nbytes)}"


def _layer_json(layer: LayerPlan, tensors: bool) -> dict[str, Any]:
    keys = (
        "index",
        "name",
        "role",
        "backend",
        "dense_shared_from",
        "format",
        "shared",
        "shared_format",
        "n_routed",
        "n_shared",
        "n_slots",
        "hidden_size",
        "width",
    )
    answer: dict[str, Any] = {key: getattr(layer, key) for key in keys} | {"bytes": layer.nbytes}
    answer["params"] = [
        {
            "name": p.name,
            "shape": list(p.shape),
            "laid_out": list(p.laid_out),
            "dtype": name_of(p.dtype),
            "bytes": p.nbytes,
        }
        for p in layer.params
    ]
    answer["placements"] = len(layer.placements)
    answer["unused"] = len(layer.unused)
    if tensors:
        answer["unused_tensors"] = list(layer.unused)
        answer["tensors"] = [
            {
                "key": p.key,
                "param": p.param,
                "expert": p.expert,
                "rows": list(p.rows),
                "source": p.source and [list(s) for s in p.source],
                "view": p.view
                and {
                    "item": p.view.item,
                    "rows": [p.view.rows.start, p.view.rows.stop, p.view.rows.step],
                    "transposed": p.view.transposed,
                },
            }
            for p in layer.placements
        ]
    return answer
