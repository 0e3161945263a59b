"""Carry out a Plan: allocate, copy after comparing, account for every slot and tensor; or leave nothing behind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatekeeper import Index
from loader.accounts import Ledger, Slot
from loader.activation import ExpertConfig
from loader.checkpoint import Checkpoint, dtype_name
from loader.errors import BuildError
from loader.formats import Layout
from loader.kernels import KERNELS
from loader.moe import (
    Experts,
    MoELayer,
    Router,
    RouterConfig,
    SharedExpert,
    SharedGate,
    SharedSlotRouter,
    empty_parameter,
)
from loader.plan import LayerPlan, Placement, Plan

MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """A layer on the meta device, and where each parameter of its plan lives in it."""

    layer: MoELayer
    plan: LayerPlan
    homes: Mapping[str, tuple[nn.Module, str]]

    def parameter(self, name: str) -> nn.Parameter:
        module, attribute = self.homes[name]
        parameter = getattr(module, attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter


def build(plan: Plan, index: Index, device: torch.device | str = "cpu") -> tuple[MoELayer, ...]:
    """Build the layers of `plan` on `device`, from the tensors of `index`.

    One tensor at a time is read, so that the peak is the model and one tensor. Raises `BuildError` (everything that
    does not add up) or `CheckpointError` (a file that can't be read); after either, no memory is left allocated.
    """
    where = _device(device)
    skeletons = [assemble(layer, plan.router, plan.experts) for layer in plan.layers]
    try:
        with Checkpoint(index) as checkpoint:
            for skeleton in skeletons:
                _allocate(skeleton, where)
                _fill(skeleton, checkpoint)
    except BaseException:
        # INVARIANT: a failed build holds no memory, even while its traceback keeps these frames alive.
        for skeleton in skeletons:
            _release(skeleton)
        raise
    return tuple(skeleton.layer for skeleton in skeletons)


def _device(device: torch.device | str) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise BuildError(f"device `{device}` can't be used here: {first}; use cpu") from None
    return where


def assemble(plan: LayerPlan, router: RouterConfig, config: ExpertConfig) -> _Skeleton:
    """The modules that `plan` asks for, without memory; raises `BuildError` if they differ from its parameters."""
    try:
        kernel = KERNELS[plan.backend]
    except KeyError:
        raise BuildError(f"no backend `{plan.backend}` in this loader; there are {', '.join(KERNELS)}") from None
    base = f"layers.{plan.index}."
    homes: dict[str, tuple[nn.Module, str]] = {}
    specs = {param.name.removeprefix(base): param for param in plan.params}

    def vacant(name: str) -> nn.Parameter:
        return empty_parameter(specs[name].shape, specs[name].dtype)

    bias = vacant(router.bias_parameter) if plan.router_bias else None
    routing = Router(router, vacant("router.weight"), bias)
    homes |= {f"router.{name}": (routing, name) for name, _ in routing.named_parameters()}
    gate = SharedGate(vacant("shared_gate.weight")) if plan.shared_gate else None
    if gate is not None:
        homes["shared_gate.weight"] = (gate, "weight")

    def stack(prefix: str, layout: Layout, n_experts: int, width: int) -> Experts:
        bias = specs.get(f"{prefix}.w13_bias")
        made = Experts(
            layout,
            n_experts=n_experts,
            hidden_size=plan.hidden_size,
            width=width,
            kernel=kernel,
            config=config,
            bias_dtype=None if bias is None else bias.dtype,
        )
        homes.update({f"{prefix}.{name}": (made, name) for name, _ in made.named_parameters()})
        return made

    experts = stack("experts", plan.layout, plan.n_slots, plan.width)
    shared = None
    if plan.shared == "separate" and plan.shared_layout is not None:
        shared = SharedExpert(stack("shared", plan.shared_layout, 1, plan.shared_width), gate)
    chooser = SharedSlotRouter(routing, plan.n_shared, gate) if plan.shared == "slot" else routing
    layer = MoELayer(index=plan.index, name=plan.name, router=chooser, experts=experts, shared=shared)
    skeleton = _Skeleton(layer, plan, {base + name: home for name, home in homes.items()})
    declared = {name: (tuple(p.shape), p.dtype) for name in skeleton.homes for p in [skeleton.parameter(name)]}
    if declared != {param.name: (param.shape, param.dtype) for param in plan.params}:
        raise BuildError(f"layer {plan.index}: the plan's parameters are not those of its modules: {sorted(declared)}")
    return skeleton


def _allocate(skeleton: _Skeleton, device: torch.device) -> None:
    for param in skeleton.plan.params:
        module, attribute = skeleton.homes[param.name]
        try:
            memory = torch.empty(param.shape, dtype=param.dtype, device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own
            first = str(error).splitlines()[0]
            raise BuildError(f"no memory for {param.name}, {param.nbytes} bytes on {device}: {first}") from None
        setattr(module, attribute, nn.Parameter(memory, requires_grad=False))


def _release(skeleton: _Skeleton) -> None:
    for name in skeleton.homes:
        parameter = skeleton.parameter(name)
        if parameter.device.type != "meta":
            parameter.untyped_storage().resize_(0)


def _fill(skeleton: _Skeleton, checkpoint: Checkpoint) -> None:
    plan, tensors = skeleton.plan, checkpoint.index.tensors
    inside = {name: info.shape for name, info in tensors.items() if name.startswith(f"{plan.name}.")}
    named = {key: tensors[key].shape for key in _keys(plan) if key in tensors}
    ledger = Ledger(_slots(skeleton), inside | named)
    problems: list[str] = []
    by_key: dict[str, list[Placement]] = defaultdict(list)
    for placement in plan.placements:
        by_key[placement.key].append(placement)
    # In the order of the files, so that each shard is read once from front to back.
    for key in sorted(by_key, key=lambda k: (tensors[k].shard, tensors[k].start) if k in tensors else ("", 0)):
        tensor = checkpoint.fetch(key)
        for placement in by_key[key]:
            problems += _copy(skeleton, placement, tensor, ledger)
    for note in plan.notes:
        found = checkpoint.fetch(note.key).tolist()
        ledger.read(note.key)
        if found != list(note.shape):
            problems.append(f"`{note.key}` says {found}, the weight is {list(note.shape)}")
    for key in plan.unused:
        ledger.read(key)
    problems += ledger.faults()
    if problems:
        shown = problems[:MAX_SHOWN] + ([f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else [])
        raise BuildError(f"layer {plan.index} does not add up:\n" + "\n".join(f"  {line}" for line in shown))


def _keys(plan: LayerPlan) -> Sequence[str]:
    return [placement.key for placement in plan.placements] + [note.key for note in plan.notes] + list(plan.unused)


def _slots(skeleton: _Skeleton) -> dict[Slot, int]:
    """Every slot of the parameters that were really allocated, to its rows."""
    slots: dict[Slot, int] = {}
    for name, (module, _) in skeleton.homes.items():
        shape = skeleton.parameter(name).shape
        if isinstance(module, Experts):
            slots |= {(name, expert): shape[1] for expert in range(shape[0])}
        else:
            slots[name, None] = shape[0]
    return slots


def _copy(skeleton: _Skeleton, placement: Placement, tensor: Tensor, ledger: Ledger) -> list[str]:
    """Fill one place; what does not fit is not copied and returned as a problem."""
    parameter = skeleton.parameter(placement.param)
    slot = parameter.data if placement.expert is None else parameter.data[placement.expert]
    rows = slot[placement.rows[0] : placement.rows[1]]
    block = placement.cut(tensor, rows.dim())
    # Tensor.copy_ casts between any two dtypes and broadcasts, both in silence.
    if block.shape != rows.shape or block.dtype != rows.dtype:
        ours, theirs = (f"{list(t.shape)} {dtype_name(t.dtype)}" for t in (rows, block))
        return [f"`{placement.key}` is {theirs}, its place in {placement.param} {ours}"]
    rows.copy_(block)
    slot_written = (placement.param, placement.expert)
    ledger.write(slot_written, placement.rows, placement.key, placement.source, placement.again, placement.view)
    return []
