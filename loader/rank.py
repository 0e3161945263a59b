"""One rank's share of a plan: experts divided by expert parallelism, widths by tensor parallelism; plain data.

Ranks are numbered as SGLang and vLLM do: rank ``r`` of tp x ep has the experts of group ``r // moe_tp`` and the slice
``r % moe_tp`` of their width, with ``moe_tp = tp / ep``. A shared expert in a slot is in every group and weighs
``1 / ep`` there; one on its own is cut in tp slices. The biases of gate and up are cut as their rows are, those of down
are on the first rank of a group alone. The sum of all ranks' outputs is the layer's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loader.errors import PlanError, PlanFault
from loader.formats import Layout, Part, StraddleError
from loader.formats.base import BIAS, Span
from loader.plan import LayerPlan, ParamSpec, Placement, Plan, Rank


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the stack of one module is divided: slice `index` of `count` equal ones of `width` elements."""

    parts: Mapping[str, Part]
    width: int
    index: int
    count: int

    @property
    def span(self) -> Span:
        return self.width * self.index // self.count, self.width * (self.index + 1) // self.count

    def stored(self, param: str) -> Span:
        """Stored rows (of each of gate and up) or columns (of down) of a slot that are this slice's."""
        name, suffix = _split(param)
        if (name, suffix) == ("w13", BIAS):
            return self.span
        part = self.parts[suffix]
        stored = part.stored_columns if name == "w2" else part.stored_rows
        return stored(self.span, self.width)


def plan_of_rank(plan: Plan, rank: int, tp_size: int, ep_size: int = 1) -> Plan:
    """What rank `rank` of `tp_size` ranks, in `ep_size` groups of other experts, allocates and reads.

    Raises `PlanError` where layers can't be divided so, with every tensor that has a quantization block across a cut.
    """
    faults = [
        PlanFault(layer=layer.index, tensor=layer.name, code="shape", problem=problem)
        for layer in plan.layers
        for problem in _indivisible(layer, rank, tp_size, ep_size)
    ]
    if faults:
        raise PlanError(faults)
    place = Rank(index=rank, tp_size=tp_size, ep_size=ep_size)
    layers = tuple(_layer(layer, place, faults) for layer in plan.layers)
    if faults:
        raise PlanError(faults)
    return replace(plan, layers=layers, rank=place)


def _indivisible(layer: LayerPlan, rank: int, tp_size: int, ep_size: int) -> Sequence[str]:
    if tp_size < 1 or ep_size < 1 or tp_size % ep_size:
        return [f"tp {tp_size} is not a multiple of ep {ep_size}"]
    problems = [] if 0 <= rank < tp_size else [f"there is no rank {rank} of {tp_size}; they count from 0"]
    if layer.n_routed % ep_size:
        problems.append(f"{layer.n_routed} experts can't be divided by ep {ep_size}")
    if layer.width % (tp_size // ep_size):
        problems.append(f"width {layer.width} can't be divided by {tp_size // ep_size}")
    if layer.shared == "separate" and layer.shared_width % tp_size:
        problems.append(f"the shared expert's width {layer.shared_width} can't be divided by {tp_size}")
    return problems


def _layer(layer: LayerPlan, rank: Rank, faults: list[PlanFault]) -> LayerPlan:
    held = rank.experts(layer.n_routed)
    cuts = {"experts": _Cut(_parts(layer.layout), layer.width, rank.moe_tp_rank, rank.moe_tp_size)}
    if layer.shared_layout is not None:
        cuts["shared"] = _Cut(_parts(layer.shared_layout), layer.shared_width, rank.index, rank.tp_size)
    slots = [*range(*held), *range(layer.n_routed, layer.n_slots)]  # of the whole stack, in the order kept here
    here = {slot: position for position, slot in enumerate(slots)}
    whole = {param.name: param for param in layer.params}
    placements = []
    for placement in layer.placements:
        module = _module(placement.param)
        if module == "experts":
            if placement.expert not in here or _is_elsewhere(placement.param, rank):
                continue
            placement = replace(placement, expert=here[placement.expert])
        try:
            placements.append(_share(placement, whole[placement.param], cuts[module]) if module in cuts else placement)
        except StraddleError as error:
            problem = f"{placement.param} on rank {rank.index} of tp {rank.tp_size}, ep {rank.ep_size}: {error}"
            faults.append(PlanFault(layer=layer.index, tensor=placement.key, code="shape", problem=problem))
    if faults:
        return layer
    read = {placement.key.rpartition(".")[0] for placement in placements}
    in_slots = layer.shared == "slot"
    return replace(
        layer,
        held=held,
        shared_weight=1 / rank.ep_size if in_slots else 1.0,
        width=layer.width // rank.moe_tp_size,
        shared_width=layer.shared_width // (rank.moe_tp_size if in_slots else rank.tp_size),
        params=tuple(
            _param(p, cuts[_module(p.name)], len(slots)) if _module(p.name) in cuts else p
            for p in layer.params
            if not _is_elsewhere(p.name, rank)
        ),
        placements=tuple(placements),
        notes=tuple(note for note in layer.notes if note.key.rpartition(".")[0] in read),
    )


def _share(placement: Placement, param: ParamSpec, cut: _Cut) -> Placement:
    """The part of a placement that this slice takes: rows of gate and up, columns of down."""
    if cut.count == 1 or _is_down_bias(param.name):
        return placement
    first, last = cut.stored(param.name)
    a, b = placement.rows
    columns = param.shape[2] if len(param.shape) > 2 else 1
    (top, bottom), (left, right) = placement.source or ((0, b - a), (0, columns))
    if _split(param.name)[0] == "w2":
        source, rows = ((top, bottom), (left + first, left + last)), placement.rows
    else:
        half = a // (b - a)  # 0 for gate, 1 for up
        source, rows = ((top + first, top + last), (left, right)), _times(half, last - first)
    return replace(placement, rows=rows, source=source)


def _times(position: int, size: int) -> Span:
    return position * size, (position + 1) * size


def _param(param: ParamSpec, cut: _Cut, n_slots: int) -> ParamSpec:
    stacked = n_slots if _module(param.name) == "experts" else param.shape[0]
    if cut.count == 1 or _is_down_bias(param.name):
        return replace(param, shape=(stacked, *param.shape[1:]))
    first, last = cut.stored(param.name)
    if _split(param.name)[0] == "w2":
        return replace(param, shape=(stacked, param.shape[1], last - first))
    return replace(param, shape=(stacked, 2 * (last - first), *param.shape[2:]))


def _is_elsewhere(param: str, rank: Rank) -> bool:
    return _module(param) == "experts" and _is_down_bias(param) and not rank.adds_down_bias


def _is_down_bias(param: str) -> bool:
    return _split(param) == ("w2", BIAS)


def _parts(layout: Layout) -> Mapping[str, Part]:
    return {part.name: part for part in layout.parts}


def _module(param: str) -> str:
    """``experts`` of ``layers.3.experts.w13_weight``."""
    return param.split(".")[2]


def _split(param: str) -> tuple[str, str]:
    """``w13`` and ``weight_scale`` of ``layers.3.experts.w13_weight_scale``."""
    name, _, suffix = param.rpartition(".")[2].partition("_")
    return name, suffix
