"""Whose tensor is whose: the tensors of an index by MoE layer, expert and projection, after the names of a family."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gatekeeper.checkpoint import Index, TensorInfo
from gatekeeper.errors import CheckpointError
from gatekeeper.families import MAX_EXPERTS, Family, Names, Role
from gatekeeper.stacking import KINDS, PROJECTIONS_OF, Stacking
from gatekeeper.values import UNKNOWN, Missing, Value, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeTensors:
    """The tensors of one MoE layer, as an index has them; what is missing there is missing here."""

    index: int
    name: str
    """Dotted prefix of the MoE block: `language_model.model.layers.3.mlp`."""
    role: Role
    routed: tuple[Mapping[str, Mapping[str, TensorInfo]], ...]
    """For each expert: projection (`gate`, `up`, `down`) to suffix (`weight_packed`) to tensor."""
    stacked: Mapping[str, Mapping[str, TensorInfo]]
    """Where experts are stacked: `gate_up` (or `gate`, `up`) and `down` to suffix to tensor; `routed` is empty then."""
    shared: Mapping[str, Mapping[str, TensorInfo]] | None
    router: TensorInfo | None
    router_bias: TensorInfo | None
    shared_gate: TensorInfo | None
    routed_bias: tuple[Mapping[str, TensorInfo], ...] = ()
    """For each expert: projection to its bias; empty mappings where there is none."""
    stacked_bias: Mapping[str, TensorInfo] = field(default_factory=dict)
    """`gate_up` (or `gate`, `up`) and `down` to the biases of all experts."""
    stacking: Stacking | None = None
    """How the family stacks experts."""

    @property
    def n_experts(self) -> int:
        """Routed experts that have a place here, whether or not their tensors are there."""
        return len(self.routed) or max(
            (info.shape[0] for parts in self.stacked.values() for info in parts.values() if info.shape), default=0
        )

    def expert(self, number: int) -> Mapping[str, Mapping[str, TensorInfo]]:
        """Projection to suffix to tensor of one routed expert, stacked or not.

        Of a stack each tensor comes with the shape of the expert's own matrix and a `view` of where that is; what
        can't be cut out is left out.
        """
        if self.routed:
            return self.routed[number] if number < len(self.routed) else {}
        found: dict[str, dict[str, TensorInfo]] = _nested()
        for kind, parts in self.stacked.items():
            for suffix, info in parts.items():
                for projection, one in self._cut(kind, suffix, info, number):
                    found[projection][suffix] = one
        return dict(found)

    def expert_bias(self, number: int) -> Mapping[str, TensorInfo]:
        """Projection to bias of one routed expert, as `expert`."""
        if self.routed:
            return self.routed_bias[number] if number < len(self.routed_bias) else {}
        return {
            projection: one
            for kind, info in self.stacked_bias.items()
            for projection, one in self._cut(kind, "", info, number)
        }

    def _cut(self, kind: str, suffix: str, info: TensorInfo, number: int) -> Iterator[tuple[str, TensorInfo]]:
        assert self.stacking is not None
        for projection in PROJECTIONS_OF[kind]:
            view = self.stacking.view(kind, projection, suffix, info.shape, number)
            if view is not None:
                yield projection, replace(info, shape=view.shape(info.shape), view=view)


@dataclass(slots=True)
class _Found:
    """One layer while its tensors are being collected."""

    name: str
    routed: dict[int, dict[str, dict[str, TensorInfo]]] = field(default_factory=lambda: defaultdict(_nested))
    routed_bias: dict[int, dict[str, TensorInfo]] = field(default_factory=lambda: defaultdict(dict))
    stacked: dict[str, dict[str, TensorInfo]] = field(default_factory=lambda: defaultdict(dict))
    stacked_bias: dict[str, TensorInfo] = field(default_factory=dict)
    shared: dict[str, dict[str, TensorInfo]] = field(default_factory=lambda: defaultdict(dict))
    single: dict[str, TensorInfo] = field(default_factory=dict)


def _nested() -> dict[str, dict[str, TensorInfo]]:
    return defaultdict(dict)


def find_moe_layers(index: Index, family: Family, values: Values) -> tuple[MoeTensors, ...]:
    """Sort the tensors of `index` by MoE layer and expert, main layers first, after the names of `family`.

    A layer counts as MoE where routed experts of it are there. Experts that are missing below the highest number (or
    `model.n_routed_experts`) are empty mappings, so that positions are expert numbers. Raises `CheckpointError` where
    one layer goes by two prefixes or an expert's number can't be true.
    """
    main_layers = values.get("model.num_hidden_layers", UNKNOWN)
    blocks = [(_template(t), "main") for t in family.names.layers]
    blocks += [(_template(t), "mtp") for t in family.names.draft_layers]
    below = _below(family.names)
    of_routed = {name: projection for projection, name in family.names.projections.items()}
    of_shared = {name: projection for projection, name in family.names.shared_projections.items()}
    found: dict[tuple[Role, int], _Found] = {}
    for name, info in index.tensors.items():
        placed = _place(name, blocks, main_layers)
        if placed is None:
            continue
        role, number, block, rest = placed
        for kind, pattern in below:
            match = pattern.fullmatch(rest)
            if match is None:
                continue
            layer = found.setdefault((role, number), _Found(block))
            if layer.name != block:
                raise CheckpointError(
                    f"layer {number} has tensors under `{layer.name}` and under `{block}`; one layer has one name"
                )
            groups = match.groupdict()
            if kind == "routed":
                expert = int(groups["expert"])
                if expert >= MAX_EXPERTS:
                    raise CheckpointError(f"{info.shard}: `{name}` is of expert {expert}, more than {MAX_EXPERTS}")
                projection = of_routed[groups["projection"]]
                if groups["suffix"] == family.names.expert_bias:
                    layer.routed_bias[expert][projection] = info
                else:
                    layer.routed[expert][projection][groups["suffix"]] = info
            elif kind == "shared":
                layer.shared[of_shared[groups["projection"]]][groups["suffix"]] = info
            elif kind in KINDS and info.shape and info.shape[0] > MAX_EXPERTS:
                raise CheckpointError(f"{info.shard}: `{name}` holds {info.shape[0]} experts, more than {MAX_EXPERTS}")
            elif kind in KINDS and groups["suffix"] and groups["suffix"] == family.names.expert_bias:
                layer.stacked_bias[kind] = info
            elif kind in KINDS:
                layer.stacked[kind][groups["suffix"] or "weight"] = info
            else:
                layer.single[kind] = info
            break
    return tuple(
        _finished(role, number, layer, values.get("model.n_routed_experts", UNKNOWN), family.names.stacked)
        for (role, number), layer in sorted(found.items())
        if layer.routed or layer.stacked
    )


def _finished(
    role: Role, number: int, layer: _Found, declared: Value | Missing, stacking: Stacking | None
) -> MoeTensors:
    count = max(layer.routed, default=-1) + 1
    if layer.routed and isinstance(declared, int) and declared <= MAX_EXPERTS:
        count = max(count, declared)
    return MoeTensors(
        index=number,
        name=layer.name,
        role=role,
        routed=tuple(MappingProxyType(dict(layer.routed[e])) if e in layer.routed else {} for e in range(count)),
        stacked=dict(layer.stacked),
        shared=dict(layer.shared) or None,
        router=layer.single.get("router"),
        router_bias=layer.single.get("router_bias"),
        shared_gate=layer.single.get("shared_gate"),
        routed_bias=tuple(dict(layer.routed_bias.get(e, {})) for e in range(count)) if layer.routed_bias else (),
        stacked_bias=dict(layer.stacked_bias),
        stacking=stacking
        and stacking.settled({k: p["weight"].shape for k, p in layer.stacked.items() if "weight" in p}),
    )


def _template(template: str) -> re.Pattern[str]:
    """`model.layers.{layer}.mlp` as a pattern of what stands before the dot, and of the rest behind it."""
    text = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d{1,9})").replace(r"\{draft\}", r"(?P<draft>\d{1,9})")
    return re.compile(rf"(?P<block>{text})\.(?P<rest>.+)", re.DOTALL)


def _below(names: Names) -> list[tuple[str, re.Pattern[str]]]:
    def pattern(template: str, projections: Mapping[str, str]) -> re.Pattern[str]:
        one_of = "|".join(map(re.escape, projections.values()))
        text = re.escape(template).replace(r"\{expert\}", r"(?P<expert>\d{1,9})")
        return re.compile(text.replace(r"\{projection\}", f"(?P<projection>{one_of})") + r"\.(?P<suffix>[^.]+)")

    found: list[tuple[str, re.Pattern[str]]] = []
    if names.routed:
        found.append(("routed", pattern(names.routed, names.projections)))
    if names.shared:
        found.append(("shared", pattern(names.shared, names.shared_projections)))
    for kind, name in names.stacked.names.items() if names.stacked else ():
        # One parameter of the module, or with parts: `gate_up_proj`, `gate_up_proj_scales`, `gate_up_proj.weight`.
        found.append((kind, re.compile(re.escape(name) + r"(?:[._](?P<suffix>[^.]+))?")))
    singles = (("router", names.router), ("router_bias", names.router_bias), ("shared_gate", names.shared_gate))
    return found + [(kind, re.compile(re.escape(text))) for kind, text in singles if text]


def _place(
    name: str, blocks: Sequence[tuple[re.Pattern[str], str]], main_layers: Value | Missing
) -> tuple[Role, int, str, str] | None:
    """Role, layer number, block and what stands below it, of a tensor in some layer's MoE block."""
    first_draft = main_layers if isinstance(main_layers, int) else None
    for pattern, kind in blocks:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        groups = match.groupdict()
        if groups.get("draft") is not None:
            return "mtp", (first_draft or 0) + int(groups["draft"]), match["block"], match["rest"]
        number = int(groups["layer"])
        is_draft = first_draft is not None and number >= first_draft
        if is_draft == (kind == "mtp"):
            return ("mtp" if is_draft else "main"), number, match["block"], match["rest"]
    return None
