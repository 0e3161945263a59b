"""Bytes on each rank, and what shared experts in slots cost and save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loader.formats import Layout
from loader.text import human

if TYPE_CHECKING:
    from loader.plan import LayerPlan, ParamSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """Memory of one rank."""

    tp_size: int
    """Ranks in all: 8."""
    ep_size: int
    """Groups of ranks that hold other experts: 1."""
    nbytes: int | None
    """The fullest rank; None where the experts can't be divided so."""
    note: str = ""
    """Why not."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"tp_size": self.tp_size, "ep_size": self.ep_size, "bytes": self.nbytes, "note": self.note}

    def text(self) -> str:
        """For people."""
        size = f"can't be divided: {self.note}" if self.nbytes is None else human(self.nbytes)
        return f"on each rank of tp {self.tp_size}, ep {self.ep_size}: {size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionCost:
    """Fused against separate, over all layers of the plan."""

    layers_fused: int
    """Layers whose shared expert fills a slot: 60."""
    layers_separate: int
    """Layers with a shared expert on its own: 0."""
    slot_bytes: int
    """Memory of the slots that shared experts fill."""
    extra_bytes_per_rank: int
    """What a rank holds more than with shared experts on their own: an expert-parallel rank keeps whole slots."""
    gemms_saved: int
    """GEMMs of a forward pass that need no launch of their own: two a layer."""
    launches_saved: int
    """Kernels of a forward pass in all: both GEMMs, the activation, and the final addition."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        if not self.layers_fused:
            return f"fusion: off in all {self.layers_separate} layers with a shared expert"
        return (
            f"fusion: in {self.layers_fused} of {self.layers_fused + self.layers_separate} layers saves "
            f"{self.gemms_saved} GEMMs and {self.launches_saved} launches of a forward pass; "
            f"the slots hold {human(self.slot_bytes)}, {human(self.extra_bytes_per_rank)} more on each rank"
        )


def fusion_cost(layers: Sequence[LayerPlan], tp_size: int, ep_size: int) -> FusionCost:
    """Count over `layers`; with expert parallelism, slots are on every rank in full, a separate expert is cut by tp."""
    fused = [layer for layer in layers if layer.shared == "slot"]
    slot_bytes = sum(layer.n_shared * _slot_bytes(layer) for layer in fused)
    moe_tp = tp_size // ep_size
    return FusionCost(
        layers_fused=len(fused),
        layers_separate=sum(layer.shared == "separate" for layer in layers),
        slot_bytes=slot_bytes,
        extra_bytes_per_rank=slot_bytes // moe_tp - slot_bytes // tp_size,
        gemms_saved=2 * len(fused),
        launches_saved=4 * len(fused),
    )


def rank_bytes(layers: Sequence[LayerPlan], tp_size: int, ep_size: int) -> RankBytes:
    """Memory of a rank: experts divided by ep, widths by tp / ep; router and norms are on every rank."""
    why = _indivisible(layers, tp_size, ep_size)
    if why:
        return RankBytes(tp_size=tp_size, ep_size=ep_size, nbytes=None, note=why)
    nbytes = sum(_rank_share(layer, param, tp_size, ep_size) for layer in layers for param in layer.params)
    return RankBytes(tp_size=tp_size, ep_size=ep_size, nbytes=nbytes)


def _indivisible(layers: Sequence[LayerPlan], tp_size: int, ep_size: int) -> str:
    if tp_size % ep_size:
        return f"tp {tp_size} is not a multiple of ep {ep_size}"
    moe_tp = tp_size // ep_size
    for layer in layers:
        if layer.n_routed % ep_size:
            return f"{layer.n_routed} experts on {ep_size} ranks"
        if not _divides(layer.width, moe_tp, layer.layout):
            return f"{layer.format} of width {layer.width} in {moe_tp} parts"
        whole = layer.shared_width
        if layer.shared_layout is not None and not _divides(whole, tp_size, layer.shared_layout):
            return f"shared expert in {layer.shared_format} of width {whole} in {tp_size} parts"
    return ""


def _divides(width: int, parts: int, layout: Layout) -> bool:
    """Whether `width` can be cut into `parts` without a cut through a quantization block."""
    block = max(max(part.rows_per_item or 1, part.columns_per_item or 1) for part in layout.parts)
    return parts == 1 or width % (parts * block) == 0


def _rank_share(layer: LayerPlan, param: ParamSpec, tp_size: int, ep_size: int) -> int:
    if ".experts." in param.name:
        one = param.nbytes // layer.n_slots
        if param.name.endswith(".w2_bias"):  # added once, after the sum over ranks: not divided by width
            return one * layer.n_routed // ep_size + one * (layer.n_slots - layer.n_routed)
        return (one * layer.n_routed // ep_size + one * (layer.n_slots - layer.n_routed)) // (tp_size // ep_size)
    return param.nbytes // tp_size if ".shared." in param.name else param.nbytes


def _slot_bytes(layer: LayerPlan) -> int:
    return sum(param.nbytes // layer.n_slots for param in layer.params if ".experts." in param.name)
