"""Carry out a Plan: allocate, copy after comparing, account for every slot and tensor; or leave nothing behind."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

from gatekeeper import Index
from loader.accounts import Slot
from loader.activation import ExpertConfig
from loader.checkpoint import DTYPES, Checkpoint
from loader.errors import BuildError
from loader.filling import Filling
from loader.formats import Layout
from loader.kernels.configs import ON_TRITON
from loader.kernels.known import KERNELS
from loader.kernels.triton_router import TritonRouter
from loader.kernels.tuned import find_table
from loader.local_router import LocalRouter
from loader.moe import (
    Experts,
    MoELayer,
    Router,
    SharedExpert,
    SharedGate,
    SharedSlotRouter,
    empty_parameter,
)
from loader.plan import LayerPlan, Plan
from loader.router_config import RouterConfig
from loader.transfer import Transfers

SWITCH_SECONDS = 1e-4
"""About what a thread does with one piece under the interpreter's lock."""


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

    def slots(self) -> dict[Slot, int]:
        """Every slot of the parameters that were really allocated, to its rows."""
        slots: dict[Slot, int] = {}
        for name, (module, _) in self.homes.items():
            shape = self.parameter(name).shape
            if isinstance(module, Experts):
                slots |= {(name, expert): shape[1] for expert in range(shape[0])}
            else:
                slots[name, None] = shape[0]
        return slots


Check = Callable[[MoELayer, LayerPlan, Checkpoint], Callable[[], None]]
"""Called with each layer while it is filled, to read what must come to be in it and not yet what is; what that returns
is called once it is filled. Both from a thread of their own; what either raises ends the load."""


def build(
    plan: Plan,
    index: Index,
    device: torch.device | str = "cpu",
    *,
    threads: int | None = None,
    tables: Path | None = None,
    moved: Callable[[int], None] = lambda _: None,
    check: Check | None = None,
) -> tuple[MoELayer, ...]:
    """Build the layers of `plan` on `device`, from the tensors of `index`.

    `threads` (None: `default_threads`) read straight into the layers' memory, so that the peak is the layers, a few MiB
    a thread, and 8 MiB while a layer's scales are put in order; `tables` is the folder of measured configurations
    (None: the shipped ones); `moved` is told the bytes that have arrived, from those threads; `check` looks at each
    layer while it and the next one are read. Raises `BuildError` (everything that does not add up), `CheckpointError`
    (a file that can't be read), `TableError` or what `check` raises; after any of them, no memory is left allocated.
    """
    index.require_sound()
    where = _device(device)
    _require_libraries(plan)
    skeletons = [assemble(layer, plan.router, plan.experts) for layer in plan.layers]
    started = time.perf_counter()
    try:
        with (
            _brief_waits(),
            Checkpoint(index) as checkpoint,
            _Checks(check, checkpoint) as checks,
            Transfers(checkpoint, where, threads=threads) as transfers,
        ):
            _fill_all(skeletons, where, checkpoint, transfers, moved, checks, lambda: _tune(skeletons, where, tables))
    except BaseException:
        # INVARIANT: a failed build holds no memory, even while its traceback keeps these frames alive.
        for skeleton in skeletons:
            _release(skeleton)
        raise
    _log_finished(plan, where, time.perf_counter() - started)
    return tuple(skeleton.layer for skeleton in skeletons)


@contextmanager
def _brief_waits() -> Iterator[None]:
    """While threads read, hand the interpreter's lock on soon, and don't look for garbage in a plan of many objects.

    By default a thread that has read waits 5 ms for the lock, and a collection keeps all of them waiting for 100 ms.
    """
    interval, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collects:
            gc.enable()


class _Checks:
    """Runs a check, where there is one, beside the load and brings its errors back."""

    def __init__(self, check: Check | None, checkpoint: Checkpoint) -> None:
        self._check, self._checkpoint = check, checkpoint
        self._pool = ThreadPoolExecutor(1, "check")
        self._under_way: list[Future[None]] = []
        self._expected: list[list[Callable[[], None]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)  # where all went well none is left
        for expected in self._expected:  # a traceback may keep what would compare them
            expected.clear()

    def expect(self, skeleton: _Skeleton) -> Callable[[], None]:
        """Start beside the filling of a layer, and give a function that goes on once it is filled."""
        if self._check is None:
            return lambda: None
        # Not the result of a future, which would keep what was read until the end of the load.
        expected: list[Callable[[], None]] = []
        self._expected.append(expected)
        check, arguments = self._check, (skeleton.layer, skeleton.plan, self._checkpoint)
        self._submit(lambda: expected.append(check(*arguments)))
        # One thread does all in order: it is there by then, or its error is raised first.
        return lambda: self._compare(expected)

    def finish(self) -> None:
        """Wait for all of them, and raise the first error."""
        for future in self._under_way:
            future.result()

    def _compare(self, expected: list[Callable[[], None]]) -> None:
        self._submit(lambda: expected.pop()())
        for future in [future for future in self._under_way if future.done()]:
            future.result()
            self._under_way.remove(future)

    def _submit(self, work: Callable[[], None]) -> None:
        self._under_way.append(self._pool.submit(work))


def _fill_all(
    skeletons: Sequence[_Skeleton],
    device: torch.device,
    checkpoint: Checkpoint,
    transfers: Transfers,
    moved: Callable[[int], None],
    checks: _Checks,
    meanwhile: Callable[[], None],
) -> None:
    """Layer after layer; while one is waited for, the next one's transfers are already queued.

    `meanwhile` is called once, while the first layer is read, and before any is compared.
    """
    names = sorted(checkpoint.index.tensors)
    under_way: list[tuple[_Skeleton, Filling, Callable[[], None], Callable[[], None]]] = []

    def finish_first() -> None:
        skeleton, filling, arrived, compare = under_way.pop(0)
        filling.reckon()
        arrived()
        filling.account()
        _lay_out(skeleton, device)
        compare()

    for skeleton in skeletons:
        _allocate(skeleton, device)
        filling = Filling(skeleton.plan, skeleton.slots(), checkpoint.index, skeleton.parameter, names)
        arrived = transfers.start(filling.transfers, moved)
        under_way.append((skeleton, filling, arrived, checks.expect(skeleton)))
        if skeleton is skeletons[0]:
            meanwhile()
        if len(under_way) > 1:
            finish_first()
    while under_way:
        finish_first()
    checks.finish()


def _log_finished(plan: Plan, device: torch.device, seconds: float) -> None:
    import structlog

    structlog.get_logger("loader").info(
        "load.finished",
        runner=plan.runner,
        layers=len(plan.layers),
        device=str(device),
        bytes=plan.nbytes,
        seconds=round(seconds, 3),
        gb_per_second=round(plan.nbytes / 1e9 / max(seconds, 1e-9), 3),
    )


def _device(device: torch.device | str) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise BuildError(f"device `{device}` can't be used here: {first}; use cpu") from None
    return where


def _require_libraries(plan: Plan) -> None:
    """Before a byte is read, and not at the first token."""
    on_triton = sorted({layer.backend for layer in plan.layers} & ON_TRITON)
    if on_triton and find_spec("triton") is None:
        raise BuildError(
            f"backend `{on_triton[0]}` needs Triton, which is not installed; install it (the extra `bench` has the "
            "version that the kernels are tested with), or try --set server.moe_runner_backend=grouped_mm"
        )


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
        return empty_parameter(specs[name].shape, DTYPES[specs[name].dtype])

    bias = vacant(router.bias_parameter) if plan.router_bias else None
    routing = Router(router, vacant("router.weight"), bias)
    homes |= {f"router.{name}": (routing, name) for name, _ in routing.named_parameters()}
    gate = SharedGate(vacant("shared_gate.weight")) if plan.shared_gate else None
    if gate is not None:
        homes["shared_gate.weight"] = (gate, "weight")

    def stack(prefix: str, layout: Layout, n_experts: int, width: int, n_shared: int = 0) -> Experts:
        biases = {
            name: DTYPES[spec.dtype] for name in ("w13_bias", "w2_bias") if (spec := specs.get(f"{prefix}.{name}"))
        }
        made = Experts(
            layout,
            n_experts=n_experts,
            hidden_size=plan.hidden_size,
            width=width,
            kernel=kernel,
            config=config,
            biases=biases,
            n_shared=n_shared,
            dense_shared_from=plan.dense_shared_from,
        )
        homes.update({f"{prefix}.{name}": (made, name) for name, _ in made.named_parameters()})
        return made

    n_shared = plan.n_shared if plan.shared == "slot" else 0
    experts = stack("experts", plan.layout, plan.n_slots, plan.width, n_shared)
    shared = None
    if plan.shared == "separate" and plan.shared_layout is not None:
        shared = SharedExpert(stack("shared", plan.shared_layout, 1, plan.shared_width), gate)
    chooser = _chooser(plan.backend, routing, n_shared, gate)
    if plan.is_part:
        chooser = LocalRouter(chooser, plan.routed_here, plan.n_routed, plan.shared_weight)
        experts.is_part = True
    layer = MoELayer(index=plan.index, name=plan.name, router=chooser, experts=experts, shared=shared)
    skeleton = _Skeleton(layer, plan, {base + name: home for name, home in homes.items()})
    declared = {name: (tuple(p.shape), p.dtype) for name in skeleton.homes for p in [skeleton.parameter(name)]}
    if declared != {param.name: (param.shape, DTYPES[param.dtype]) for param in plan.params}:
        raise BuildError(f"layer {plan.index}: the plan's parameters are not those of its modules: {sorted(declared)}")
    return skeleton


def _chooser(backend: str, routing: Router, n_shared: int, gate: SharedGate | None) -> nn.Module:
    if backend in ON_TRITON:
        return TritonRouter(routing, n_shared, gate if n_shared else None)
    return SharedSlotRouter(routing, n_shared, gate) if n_shared else routing


def _tune(skeletons: Sequence[_Skeleton], device: torch.device, tables: Path | None) -> None:
    """Hand what was measured on the device to the layers whose backend uses it."""
    stacks = [m for s in skeletons if s.plan.backend == "triton" for m in s.layer.modules() if isinstance(m, Experts)]
    table = find_table(torch.cuda.get_device_name(device), tables) if stacks and device.type == "cuda" else None
    for experts in stacks:
        experts.table = table


def _allocate(skeleton: _Skeleton, device: torch.device) -> None:
    for param in skeleton.plan.params:
        module, attribute = skeleton.homes[param.name]
        try:
            memory = torch.empty(param.shape, dtype=DTYPES[param.dtype], device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own
            raise _no_memory(f"for {param.name}, {param.nbytes} bytes", device, error) from None
        setattr(module, attribute, nn.Parameter(memory, requires_grad=False))


def _no_memory(what: str, device: torch.device, error: RuntimeError) -> BuildError:
    return BuildError(f"no memory {what} on {device}: {str(error).splitlines()[0]}")


def _lay_out(skeleton: _Skeleton, device: torch.device) -> None:
    """Put what has arrived in the order that the layer's kernels read, in the same memory."""
    stacks = {skeleton.homes[param.name][0] for param in skeleton.plan.params if param.runs}
    for experts in stacks:
        assert isinstance(experts, Experts)
        try:
            experts.lay_out()
        except RuntimeError as error:  # as in `_allocate`
            raise _no_memory(f"to put the scales of layer {skeleton.plan.index} in order", device, error) from None
    if stacks and device.type == "cuda":  # whoever looks at the layer next may do so from another thread's stream
        torch.cuda.current_stream(device).synchronize()


def _release(skeleton: _Skeleton) -> None:
    for name in skeleton.homes:
        parameter = skeleton.parameter(name)
        if parameter.device.type != "meta":
            parameter.untyped_storage().resize_(0)
