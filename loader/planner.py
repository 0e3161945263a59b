"""Plan all MoE layers of a runner: decisions and index to a Plan, or one error with everything that does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gatekeeper import (
    CheckpointError,
    Decision,
    Facts,
    Family,
    Format,
    Index,
    MoeTensors,
    TensorInfo,
    find_moe_layers,
    load_rules,
)
from loader import obey
from loader.accounts import Ledger
from loader.costs import fusion_cost, rank_bytes
from loader.errors import PlanError, PlanFault
from loader.layer_plan import Widths, plan_layer
from loader.plan import LayerPlan, Plan
from loader.routing import expert_config, router_config

ROLES = {"target": "main", "draft": "mtp"}


def build_plan(
    index: Index,
    family: Family,
    facts: Facts,
    decisions: Mapping[str, Decision],
    formats: Mapping[str, Format] | None = None,
    tensors: Sequence[MoeTensors] | None = None,
) -> Plan:
    """Say where every expert, router and shared tensor of the layers of `facts.runner` goes.

    A layer's shared expert fills slots where `shared_experts_fusion` is on in that layer, and stays on its own
    everywhere else. `formats` are those of a rule set, the shipped one by default; `tensors` are the `runner_layers`,
    where somebody has found them already. Raises `PlanError` with every tensor
    and slot that does not work out and the index's own faults, `CheckpointError` where config.json has no sizes to plan
    with or the family is one that this loader can't compute.
    """
    tensors = runner_layers(index, family, facts) if tensors is None else tensors
    formats = load_rules().formats if formats is None else formats
    _require_supported(family)
    router, experts = router_config(family, facts.values), expert_config(family, facts.values)
    widths = _widths(facts.values)
    if tensors:
        _require_plausible(widths, index, tensors)
    faults = [PlanFault(layer=-1, tensor=f.shard, code="header", problem=f.problem) for f in index.faults]
    faults += _layer_faults(family, facts, tensors)
    blocks = _blocks(index, [layer.name for layer in tensors])
    layers: list[LayerPlan] = []
    for layer in tensors:
        plan, found = plan_layer(
            blocks[layer.name],
            family,
            layer,
            widths,
            fused_slots=obey.fused_slots(decisions, layer.index),
            router_bias=router.bias_parameter if family.names.router_bias else None,
            backend=obey.backend(decisions, layer.index),
            dense_shared_from=obey.dense_shared_from(decisions, layer.index),
            formats=formats,
        )
        faults += found
        layers += [] if plan is None else [plan]
    if faults:
        raise PlanError(faults)
    for planned in layers:
        _balance(planned, blocks[planned.name])
    tp_size, ep_size = (_size(facts.values, f"parallel.{name}") for name in ("tp_size", "ep_size"))
    return Plan(
        family=family.name,
        runner=facts.runner,
        router=router,
        experts=experts,
        layers=tuple(layers),
        per_rank=rank_bytes(layers, tp_size, ep_size),
        fusion=fusion_cost(layers, tp_size, ep_size),
    )


def runner_layers(index: Index, family: Family, facts: Facts) -> tuple[MoeTensors, ...]:
    """The MoE layers of `index` that the runner of `facts` loads, by layer index."""
    role = ROLES[facts.runner]
    found = (layer for layer in find_moe_layers(index, family, facts.values) if layer.role == role)
    return tuple(sorted(found, key=lambda layer: layer.index))


def _blocks(index: Index, names: Sequence[str]) -> dict[str, Index]:
    """The tensors of each MoE block; one pass, for a checkpoint has a hundred thousand of them and sixty blocks."""
    found: dict[str, dict[str, TensorInfo]] = {name: {} for name in names}
    depths = sorted({name.count(".") + 1 for name in names})
    for name, info in index.tensors.items():
        segments = name.split(".")
        for depth in depths:
            if (block := ".".join(segments[:depth])) in found:
                found[block][name] = info
    return {name: Index(folder=index.folder, tensors=tensors) for name, tensors in found.items()}


def _require_supported(family: Family) -> None:
    names = family.names
    if set(names.projections) != {"gate", "up", "down"} or not names.router:
        raise CheckpointError(
            f"family `{family.name}` has experts of a kind that this loader does not compute; it computes those with "
            "gate, up and down, behind a router"
        )


def _widths(values: Mapping[str, Any]) -> Widths:
    names = ("hidden_size", "moe_intermediate_size", "n_routed_experts")
    missing = [name for name in names if not isinstance(values.get(f"model.{name}"), int)]
    if missing:
        raise CheckpointError(
            f"config.json does not give {', '.join(f'`{name}`' for name in missing)}; add what is missing"
        )
    hidden, width, routed = (values[f"model.{name}"] for name in names)
    n_shared = values.get("model.n_shared_experts")
    n_shared = n_shared if isinstance(n_shared, int) else 0
    shared_width = values.get("model.shared_expert_intermediate_size")
    return Widths(
        hidden_size=hidden,
        width=width,
        n_routed=routed,
        n_shared=n_shared,
        shared_width=shared_width if isinstance(shared_width, int) and shared_width else n_shared * width,
    )


def _require_plausible(widths: Widths, index: Index, layers: Sequence[MoeTensors]) -> None:
    """Refuse counts that no checkpoint of this size can have, before anything is done that many times."""
    stacked = max((layer.n_experts for layer in layers if layer.stacked), default=0)
    for name, count in (("n_routed_experts", widths.n_routed), ("n_shared_experts", widths.n_shared)):
        if count > max(len(index.tensors), stacked):
            raise CheckpointError(
                f"config.json has `{name}` {count}, the checkpoint only {len(index.tensors)} tensors; correct either"
            )


def _size(values: Mapping[str, Any], name: str) -> int:
    """A parallel size; where nobody has chosen it, this loader runs on one rank."""
    value = values.get(name)
    return value if isinstance(value, int) and value > 0 else 1


def _layer_faults(family: Family, facts: Facts, tensors: Sequence[MoeTensors]) -> list[PlanFault]:
    """Layers that config.json and tensors disagree about, and layers that are there twice."""
    found = Counter(layer.index for layer in tensors)
    names = {layer.index: layer.name for layer in tensors}
    faults = [
        PlanFault(layer=index, tensor=names[index], code="doubled", problem="the layer is there twice, under two names")
        for index, count in found.items()
        if count > 1
    ]
    numbers = family.layer_numbers(facts.values)
    if numbers is None:
        return faults
    role = ROLES[facts.runner]
    expected = {index: family.names.block(one, index, draft) for one, index, draft in numbers if one == role}
    faults += [
        PlanFault(
            layer=index,
            tensor=f"{expected[index]}.*",
            code="missing",
            problem="config.json has experts here: no tensor",
        )
        for index in expected.keys() - found.keys()
    ]
    return faults + [
        PlanFault(layer=index, tensor=f"{names[index]}.*", code="unexpected", problem="config.json has no experts here")
        for index in found.keys() - expected.keys()
    ]


def _balance(plan: LayerPlan, index: Index) -> None:
    """Keep a ledger over the plan itself: what it forgets or does twice is our mistake, and an error all the same."""
    slots = {
        (param.name, expert): param.shape[1] if expert is not None else param.shape[0]
        for param in plan.params
        for expert in (range(param.shape[0]) if ".experts." in param.name or ".shared." in param.name else [None])
    }
    keys = {placement.key for placement in plan.placements} | {note.key for note in plan.notes} | set(plan.unused)
    keys |= {name for name in index.tensors if name.startswith(f"{plan.name}.")}
    ledger = Ledger(slots, {key: index.tensors[key].shape for key in keys})
    for placement in plan.placements:
        slot = (placement.param, placement.expert)
        ledger.write(slot, placement.rows, placement.key, placement.source, placement.again, placement.view)
    for key in (*(note.key for note in plan.notes), *plan.unused):
        ledger.read(key)
    problems = ledger.faults()
    if problems:
        raise PlanError(
            PlanFault(layer=plan.index, tensor=plan.name, code="doubled", problem=line) for line in problems
        )
