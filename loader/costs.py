"""Bytes on each rank, and what shared experts in slots cost and save."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loader.formats import Layout
from loader.text import human

if TYPE_CHECKING:
    from loader.plan import LayerPlan, ParamSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """Memory of the fullest rank; all of it 0 where the experts can't be divided so."""

    tp_size: int
    """Ranks in all: 8."""
    ep_size: int
    """Groups of ranks that hold other experts: 1."""
    experts: int = 0
    """Bytes of the stacked experts, shared ones in slots among them: 71345111040."""
    shared: int = 0
    """Bytes of shared experts on their own."""
    routers: int = 0
    """Bytes of routers, their biases and the gates of shared experts, which are on every rank."""
    note: str = ""
    """Why the experts can't be divided so; empty where they can."""

    @property
    def nbytes(self) -> int | None:
        """Everything together; None where the experts can't be divided so."""
        return None if self.note else self.experts + self.shared + self.routers

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        parts = {f"{name}_bytes": getattr(self, name) for name in ("experts", "shared", "routers")}
        sizes = {"tp_size": self.tp_size, "ep_size": self.ep_size, "bytes": self.nbytes}
        return sizes | (dict.fromkeys(parts) if self.note else parts) | {"note": self.note}

    def text(self) -> str:
        """For people."""
        where = f"on each rank of tp {self.tp_size}, ep {self.ep_size}: "
        if self.nbytes is None:
            return f"{where}can't be divided: {self.note}"
        parts = (("experts", self.experts), ("shared experts", self.shared), ("routers", self.routers))
        listed = ", ".join(f"{what} {human(size)}" for what, size in parts if size)
        return f"{where}{human(self.nbytes)}{f' ({listed})' if listed else ''}"


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
    unfused_bytes_per_rank: int
    """What a rank would hold more, were the shared experts on their own in slots too; negative: less."""
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
            if not self.layers_separate:
                return "fusion: no layer has a shared expert"
            word = "less" if self.unfused_bytes_per_rank < 0 else "more"
            where = f"all {self.layers_separate} layers" if self.layers_separate > 1 else "the one layer"
            return (
                f"fusion: off in {where} with a shared expert; in slots they would "
                f"take {human(abs(self.unfused_bytes_per_rank))} {word} on each rank"
            )
        return (
            f"fusion: in {self.layers_fused} of {self.layers_fused + self.layers_separate} layers saves "
            f"{self.gemms_saved} GEMMs and {self.launches_saved} launches of a forward pass; "
            f"the slots hold {human(self.slot_bytes)}, {human(self.extra_bytes_per_rank)} more on each rank"
        )


def fusion_cost(layers: Sequence[LayerPlan], tp_size: int, ep_size: int) -> FusionCost:
    """Count over `layers`; with expert parallelism, slots are on every rank in full, a separate expert is cut by tp."""
    fused = [layer for layer in layers if layer.shared == "slot"]
    separate = [layer for layer in layers if layer.shared == "separate"]
    slot_bytes = sum(layer.n_shared * _slot_bytes(layer) for layer in fused)
    moe_tp = max(1, tp_size // ep_size)
    return FusionCost(
        layers_fused=len(fused),
        layers_separate=len(separate),
        slot_bytes=slot_bytes,
        extra_bytes_per_rank=slot_bytes // moe_tp - slot_bytes // tp_size,
        unfused_bytes_per_rank=sum(layer.n_shared * _slot_bytes(layer) for layer in separate) // moe_tp
        - sum(layer.part_bytes("shared") for layer in separate) // tp_size,
        gemms_saved=2 * len(fused),
        launches_saved=4 * len(fused),
    )


def rank_bytes(layers: Sequence[LayerPlan], tp_size: int, ep_size: int) -> RankBytes:
    """Memory of a rank: experts divided by ep, widths by tp / ep; router and norms are on every rank."""
    why = _indivisible(layers, tp_size, ep_size)
    if why:
        return RankBytes(tp_size=tp_size, ep_size=ep_size, note=why)
    parts: Counter[str] = Counter()
    for layer in layers:
        for param in layer.params:
            parts[param.kind] += _rank_share(layer, param, tp_size, ep_size)
    experts, shared, routers = (parts[kind] for kind in ("experts", "shared", "routers"))
    return RankBytes(tp_size=tp_size, ep_size=ep_size, experts=experts, shared=shared, routers=routers)


def _indivisible(layers: Sequence[LayerPlan], tp_size: int, ep_size: int) -> str:
    if tp_size % ep_size:
        asked = "; set parallel.tp_size, too" if tp_size == 1 else ""
        return f"tp {tp_size} is not a multiple of ep {ep_size}{asked}"
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
    if param.kind == "experts":
        one = param.nbytes // layer.n_slots
        held = one * layer.n_routed // ep_size + one * (layer.n_slots - layer.n_routed)
        return held // (tp_size // ep_size) if _is_cut(param, layer.layout) else held
    if param.kind == "shared" and layer.shared_layout is not None and _is_cut(param, layer.shared_layout):
        return param.nbytes // tp_size
    return param.nbytes


def _is_cut(param: ParamSpec, layout: Layout) -> bool:
    """Whether ranks share a parameter's bytes: gate and up are cut by rows and down by columns, where it has such."""
    matrix, _, name = param.name.rpartition(".")[2].partition("_")
    part = next((part for part in layout.parts if part.name == name), None)
    if part is None:  # a bias: that of down is whole, on the first rank of a group
        return matrix == "w13"
    return (part.rows_per_item if matrix == "w13" else part.columns_per_item) is not None


def _slot_bytes(layer: LayerPlan) -> int:
    return sum(param.nbytes // layer.n_slots for param in layer.params if ".experts." in param.name)
