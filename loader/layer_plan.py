"""Plan one MoE layer: by the storage of its routed experts, every tensor to its slot, every misfit a fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gatekeeper import Family, Format, Index, MoeTensors, TensorInfo
from loader.dtypes import NAMES, is_wide_float, name_of
from loader.errors import Code, PlanFault
from loader.formats import FORMATS, Layout, Part, StraddleError, match_layout
from loader.formats.base import Span
from loader.kernels.configs import ON_TRITON
from loader.plan import LayerPlan, ParamSpec, Placement, ShapeNote
from loader.runs import parts_in_runs

Projection = Mapping[str, TensorInfo]
"""Parts of one projection by suffix."""
GATE, UP, DOWN = "gate", "up", "down"


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Sizes of a layer according to config.json."""

    hidden_size: int
    """D: 7168"""
    width: int
    """F: 2048"""
    n_routed: int
    """E: 384"""
    n_shared: int
    """S, in slots: 1; 0 where there is no shared expert."""
    shared_width: int
    """Width of the shared MLP: S * F, unless config.json says otherwise."""


def plan_layer(
    index: Index,
    family: Family,
    layer: MoeTensors,
    widths: Widths,
    *,
    fused_slots: int,
    router_bias: str | None,
    backend: str,
    dense_shared_from: int = 0,
    formats: Mapping[str, Format],
) -> tuple[LayerPlan | None, list[PlanFault]]:
    """The plan of `layer` with `fused_slots` shared experts in slots (0: on their own), and all that is wrong with it.

    `router_bias` is the router's parameter that its bias fills, None without one. The plan is None where not even the
    format of the routed experts can be told.
    """
    planner = _LayerPlanner(index, family, layer, widths, fused_slots, router_bias, formats)
    return planner.plan(backend, dense_shared_from)


class _LayerPlanner:
    def __init__(
        self,
        index: Index,
        family: Family,
        layer: MoeTensors,
        widths: Widths,
        fused_slots: int,
        router_bias: str | None,
        formats: Mapping[str, Format],
    ) -> None:
        self.index, self.family, self.layer, self.w = index, family, layer, widths
        self.fused_slots, self.router_bias = fused_slots, router_bias
        self.formats = formats
        # A shared expert without the gate that its family has would weigh 1 for every token, in silence.
        self.has_shared_gate = bool(family.names.shared_gate) and bool(widths.n_shared or fused_slots)
        self.faults: list[PlanFault] = []
        self.placements: list[Placement] = []
        self.notes: list[ShapeNote] = []
        self.params: list[ParamSpec] = []
        self.unused: list[str] = []
        self.claimed: set[str] = set()
        count = min(layer.n_experts, widths.n_routed) if layer.stacked and not layer.routed else layer.n_experts
        self.experts = [layer.expert(number) for number in range(count)]
        self.filled: dict[tuple[str, int | None, Span], str] = {}

    def plan(self, backend: str, dense_shared_from: int) -> tuple[LayerPlan | None, list[PlanFault]]:
        routed = match_layout(self.formats, (p for expert in self.experts for p in expert.values()))
        if routed is None:
            return None, [self._no_format("routed", self._first_routed())]
        self._router()
        self._counts()
        n_slots = self.w.n_routed + self.fused_slots
        self._stack("experts", routed, n_slots, self.w.width, backend)
        for expert in range(max(self.w.n_routed, len(self.experts))):
            self._routed(routed, expert, n_slots)
        self._biases(n_slots)
        shared = self._shared(routed, backend)
        self._unclaimed()
        plan = LayerPlan(
            index=self.layer.index,
            name=self.layer.name,
            role=self.layer.role,
            backend=backend,
            dense_shared_from=dense_shared_from,
            layout=routed,
            shared="slot" if self.fused_slots else "separate" if shared else "none",
            shared_layout=shared,
            n_routed=self.w.n_routed,
            n_shared=self.w.n_shared,
            hidden_size=self.w.hidden_size,
            width=self.w.width,
            shared_width=self.w.shared_width,
            router_bias=self.router_bias is not None,
            shared_gate=self.has_shared_gate,
            params=tuple(self.params),
            placements=tuple(self.placements),
            notes=tuple(self.notes),
            unused=tuple(dict.fromkeys(self.unused)),
        )
        return plan, self.faults

    # -- what is there ------------------------------------------------------------------------------------------

    def _router(self) -> None:
        d, e, names = self.w.hidden_size, self.w.n_routed, self.family.names
        self._whole("router.weight", self.layer.router, f"{self.layer.name}.{names.router}", (e, d))
        if self.router_bias is not None:
            fallback = f"{self.layer.name}.{names.router_bias}"
            self._whole(self.router_bias, self.layer.router_bias, fallback, (e,))
        if self.has_shared_gate:
            self._whole("shared_gate.weight", self.layer.shared_gate, f"{self.layer.name}.{names.shared_gate}", (1, d))

    def _whole(self, name: str, info: TensorInfo | None, fallback: str, shape: tuple[int, ...]) -> None:
        """A parameter that one tensor fills, in whatever floating-point dtype it has."""
        if info is None:
            self._fault("missing", fallback, f"{name} is never written: no tensor")
            return
        if self._is_float(name, info, shape):
            param = self._param(name)
            self.params.append(ParamSpec(name=param, shape=shape, dtype=info.dtype))
            self.placements.append(Placement(key=info.name, param=param, expert=None, rows=(0, shape[0])))

    def _is_float(self, name: str, info: TensorInfo, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has this shape and a floating-point dtype that is no packing; claims it either way."""
        self.claimed.add(info.name)
        if not is_wide_float(info.dtype):
            self._fault("dtype", info.name, f"{name} must be a float of 16 bits or more, the tensor is {info.dtype}")
        elif info.shape != shape:
            self._fault("shape", info.name, f"{name} is {list(shape)}, the tensor {list(info.shape)}")
        else:
            return True
        return False

    def _stack(self, module: str, layout: Layout, n_experts: int, width: int, backend: str) -> None:
        d = self.w.hidden_size
        laid_out = parts_in_runs(layout) if backend in ON_TRITON else []
        for part in layout.parts:
            rows, columns = part.shape(width, d)
            runs = part in laid_out
            self.params += [
                ParamSpec(name=self._param(f"{module}.{name}_{part.name}"), shape=shape, dtype=part.dtype, runs=runs)
                for name, shape in (("w13", (n_experts, 2 * rows, columns)), ("w2", (n_experts, *part.shape(d, width))))
            ]

    def _routed(self, layout: Layout, expert: int, n_slots: int) -> None:
        tensors = self.experts[expert] if expert < len(self.experts) else {}
        for projection in (GATE, UP, DOWN):
            found = tensors.get(projection, {})
            if expert >= n_slots:
                continue  # left unclaimed: reported as unexpected
            base = self._base(expert, projection)
            self._projection(layout, "experts", projection, found, base, self.w.width, [(expert, (0, self.w.width))])

    def _counts(self) -> None:
        """Stacks of more experts than there are; in one of fewer, the slots that stay empty are reported."""
        stacks = [info for parts in self.layer.stacked.values() for info in parts.values()]
        for info in (*stacks, *self.layer.stacked_bias.values()) if not self.layer.routed else ():
            if info.shape and info.shape[0] > self.w.n_routed:
                self._fault("shape", info.name, f"holds {info.shape[0]} experts, config.json has {self.w.n_routed}")

    def _biases(self, n_slots: int) -> None:
        """Biases of the experts, all of one dtype: rows of gate, then of up, and those of down."""
        f, d, suffix = self.w.width, self.w.hidden_size, self.family.names.expert_bias
        found = [self.layer.expert_bias(expert) for expert in range(self.w.n_routed)] if suffix else []
        dtypes = Counter(info.dtype for biases in found for info in biases.values())
        dtype = max(dtypes, key=lambda each: dtypes[each], default="")
        for name, size in (("w13_bias", 2 * f), ("w2_bias", d)):
            if dtype in NAMES:
                param = self._param(f"experts.{name}")
                self.params.append(ParamSpec(name=param, shape=(n_slots, size), dtype=dtype))
        for expert, biases in enumerate(found):
            for projection, name, rows in ((GATE, "w13", (0, f)), (UP, "w13", (f, 2 * f)), (DOWN, "w2", (0, d))):
                info, where = biases.get(projection), f"slot {expert} of {name}_bias"
                if info is None:
                    self._fault("missing", f"{self._base(expert, projection)}{suffix}", f"{where}: no tensor")
                elif info.dtype != dtype:
                    self._fault("dtype", info.name, f"{where} is {name_of(info.dtype)}, others are {name_of(dtype)}")
                elif self._is_float(where, info, (rows[1] - rows[0],)):
                    param = self._param(f"experts.{name}_bias")
                    self.placements.append(
                        Placement(key=info.name, param=param, expert=expert, rows=rows, view=info.view)
                    )

    def _shared(self, routed: Layout, backend: str) -> Layout | None:
        """Place the shared expert; its own format where it is on its own."""
        tensors = self.layer.shared or {}
        if not self.w.n_shared and not self.fused_slots:
            return None  # what is there all the same is reported as unexpected
        if self.fused_slots:
            f, first = self.w.width, self.w.n_routed
            slots = [(first + s, (s * f, (s + 1) * f)) for s in range(self.fused_slots)]
            self._shared_projections(routed, "experts", tensors, self.fused_slots * f, slots)
            return None
        layout = match_layout(self.formats, tensors.values())
        if layout is None:
            first_key = next((i.name for p in tensors.values() for i in p.values()), None)
            if first_key is None:
                self._fault(
                    "missing", f"{self._base(None, GATE)}weight", "the shared expert is never written: no tensor"
                )
            else:
                self.faults.append(self._no_format("shared", first_key))
                self.claimed |= {i.name for p in tensors.values() for i in p.values()}
            return None
        self._stack("shared", layout, 1, self.w.shared_width, backend)
        width = self.w.shared_width
        self._shared_projections(layout, "shared", tensors, width, [(0, (0, width))])
        return layout

    def _shared_projections(
        self,
        layout: Layout,
        module: str,
        tensors: Mapping[str, Projection],
        width: int,
        slots: Sequence[tuple[int, Span]],
    ) -> None:
        for projection in (GATE, UP, DOWN):
            found = tensors.get(projection, {})
            base = self._base(None, projection)
            self._projection(layout, module, projection, found, base, width, slots)

    # -- one projection -----------------------------------------------------------------------------------------

    def _projection(
        self,
        layout: Layout,
        module: str,
        projection: str,
        found: Projection,
        base: str,
        width: int,
        slots: Sequence[tuple[int, Span]],
    ) -> None:
        """Place the parts of one projection of an MLP of `width`; each slot takes a span of that width."""
        d = self.w.hidden_size
        rows, columns = (d, width) if projection == DOWN else (width, d)
        if columns % layout.column_multiple:
            self._fault("shape", base, f"{columns} columns are no multiple of {layout.column_multiple}")
            return
        for part in layout.parts:
            key = found[part.suffix].name if part.suffix in found else f"{base}{part.suffix}"
            for expert, span in slots:
                self._place(key, found.get(part.suffix), part, module, projection, expert, span, (rows, columns))
        if layout.shape_part is not None:
            note = layout.shape_part
            self._note(f"{base}{note.suffix}", found.get(note.suffix), note, (rows, columns))
        for part in layout.unused:
            if part.suffix in found and self._is_as_planned(found[part.suffix], part, part.suffix, (rows, columns)):
                self.unused.append(found[part.suffix].name)

    def _place(
        self,
        key: str,
        info: TensorInfo | None,
        part: Part,
        module: str,
        projection: str,
        expert: int,
        span: Span,
        size: tuple[int, int],
    ) -> None:
        name = f"{'w2' if projection == DOWN else 'w13'}_{part.name}"
        slot = f"slot {expert} of {name}" if module == "experts" else f"shared {name}"
        if info is None:
            self._fault("missing", key, f"{slot} is never written: no tensor")
            return
        if not self._is_as_planned(info, part, slot, size):
            return
        if info.view is not None and info.view.rows.step > 1 and part.rows_per_item != 1:
            self._fault("shape", key, f"{slot} can't be cut out: gate and up take turns inside of one block")
            return
        try:
            placement = self._placement(info, part, f"{module}.{name}", projection, expert, span, size)
        except StraddleError as error:
            self._fault("shape", key, f"{slot} takes {span[0]}:{span[1]} of the intermediate: {error}")
            return
        filled = (placement.param, expert, placement.rows)
        if filled in self.filled:
            self._fault("doubled", key, f"{slot} is already written by `{self.filled[filled]}`")
            return
        self.filled[filled] = key
        self.placements.append(placement)

    def _is_as_planned(self, info: TensorInfo, part: Part, what: str, size: tuple[int, int]) -> bool:
        """Claim a tensor, and say whether it has a shape and the dtype that `part` has in this layer."""
        self.claimed.add(info.name)
        if not part.fits(info.shape, *size):
            wanted = " or ".join(str(list(shape)) for shape in part.shapes(*size))
            self._fault(
                "shape",
                info.name,
                f"{what} takes {wanted} {name_of(part.dtype)}, the tensor is {list(info.shape)} {name_of(info.dtype)}",
            )
            return False
        if info.dtype != part.dtype:
            self._fault(
                "dtype",
                info.name,
                f"{what} is {name_of(part.dtype)}, the tensor {name_of(info.dtype)}; a copy would cast in silence",
            )
            return False
        return True

    def _placement(
        self, info: TensorInfo, part: Part, name: str, projection: str, expert: int, span: Span, size: tuple[int, int]
    ) -> Placement:
        rows, columns = size
        stored = part.shape(rows, columns)
        if projection == DOWN:
            source, into = ((0, stored[0]), part.stored_columns(span, columns)), (0, stored[0])
            undivided = part.columns_per_item is None
        else:
            source = (part.stored_rows(span, rows), (0, stored[1]))
            height = source[0][1] - source[0][0]
            into = (0, height) if projection == GATE else (height, 2 * height)
            undivided = part.rows_per_item is None
        whole = source == ((0, stored[0]), (0, stored[1]))
        return Placement(
            key=info.name,
            param=self._param(name),
            expert=expert,
            rows=into,
            source=None if whole else source,
            view=info.view,
            again=undivided and span[0] > 0,
        )

    def _note(self, key: str, info: TensorInfo | None, part: Part, size: tuple[int, int]) -> None:
        if info is None:
            self._fault("missing", key, "a shape to compare with: no tensor")
            return
        if self._is_as_planned(info, part, part.suffix, size):
            self.notes.append(ShapeNote(key=key, shape=size))

    # -- names and faults ---------------------------------------------------------------------------------------

    def _unclaimed(self) -> None:
        inside = f"{self.layer.name}."
        owned = {i.name for e in self.experts for p in e.values() for i in p.values()}
        owned |= {i.name for p in (self.layer.shared or {}).values() for i in p.values()}
        owned |= {i.name for i in (self.layer.router, self.layer.router_bias, self.layer.shared_gate) if i is not None}
        owned |= {name for name in self.index.tensors if name.startswith(inside)}
        for name in owned - self.claimed:
            info = self.index.tensors[name]
            self._fault("unexpected", name, f"no slot takes this tensor, {list(info.shape)} {name_of(info.dtype)}")

    def _fault(self, code: Code, key: str, problem: str) -> None:
        self.faults.append(PlanFault(layer=self.layer.index, tensor=key, code=code, problem=problem))

    def _no_format(self, kind: str, key: str) -> PlanFault:
        base, _, _ = key.rpartition(".")
        parts = sorted(
            f"{n.rpartition('.')[2]} {i.dtype} {list(i.shape)}"
            for n, i in self.index.tensors.items()
            if n.rpartition(".")[0] == base
        )
        problem = (
            f"{kind} experts are stored as {', '.join(parts) or 'nothing'}; this loader reads {', '.join(FORMATS)}"
        )
        return PlanFault(layer=self.layer.index, tensor=key, code="format", problem=problem)

    def _first_routed(self) -> str:
        names = (i.name for e in self.experts for p in e.values() for i in p.values())
        return next(names, f"{self.layer.name}.experts")

    def _param(self, name: str) -> str:
        return f"layers.{self.layer.index}.{name}"

    def _base(self, expert: int | None, projection: str) -> str:
        """What the tensors of one projection are called up to their suffix; of the shared expert where None."""
        names = self.family.names
        if expert is None:
            return f"{self.layer.name}.{names.shared.format(projection=names.shared_projections[projection])}."
        if self.layer.stacked and names.stacked is not None:
            return f"{self.layer.name}.{names.stacked.name_of(projection)}."
        return f"{self.layer.name}.{names.routed.format(expert=expert, projection=names.projections[projection])}."
