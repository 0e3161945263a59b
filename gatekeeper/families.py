"""Model families as data: which models they are, which layers are MoE, and what the experts' tensors are called."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from gatekeeper.checkpoint import Index, TensorInfo
from gatekeeper.errors import CheckpointError, FactError, Fault, RuleError, Where
from gatekeeper.expressions import Expression, parse_expression
from gatekeeper.source import Document
from gatekeeper.stacking import KINDS, PROJECTIONS_OF, Stacking
from gatekeeper.values import UNKNOWN, Missing, Value, Values
from gatekeeper.waivers import Waiver, read_waivers

Role = Literal["main", "mtp"]

MAX_LAYERS = 10_000
"""A config.json that claims more layers or draft layers than this is broken or hostile."""
MAX_EXPERTS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Templates of tensor names; `{layer}`, `{draft}`, `{expert}` and `{projection}` are filled in."""

    layers: tuple[str, ...]
    """Prefixes of a layer's MoE block, the usual one first: `model.layers.{layer}.mlp`."""
    draft_layers: tuple[str, ...] = ()
    """Of draft (MTP) layers; `{layer}` counts on after the last layer, `{draft}` from 0. Empty: none has experts."""
    routed: str = ""
    """One expert's projection below the block: `experts.{expert}.{projection}`."""
    stacked: Stacking | None = None
    """Where all experts are in one tensor instead; a family may have both, and each checkpoint one of them."""
    expert_bias: str = ""
    """Suffix of the experts' biases, `bias`: `experts.0.up_proj.bias` or `experts.down_proj_bias`; empty: none."""
    shared: str = ""
    """`shared_experts.{projection}`; empty where there is no shared expert."""
    projections: Mapping[str, str] = field(default_factory=dict)
    """`gate`, `up`, `down` to their names; no `gate` where experts have none."""
    shared_projections: Mapping[str, str] = field(default_factory=dict)
    """Of the shared expert."""
    router: str = ""
    router_bias: str = ""
    shared_gate: str = ""

    def block(self, role: Role, layer: int, draft: int) -> str:
        """The usual prefix of the MoE block of one layer."""
        templates = self.layers if role == "main" else self.draft_layers
        return templates[0].format(layer=layer, draft=draft)

    def routed_modules(self, block: str, experts: Sequence[int]) -> tuple[str, ...]:
        """Modules that hold the routed experts; one, where they are stacked."""
        if not self.routed:
            return (self.stacked_module(block),) if self.stacked else ()
        return tuple(
            f"{block}.{self.routed.format(expert=expert, projection=projection)}"
            for expert in experts
            for projection in self.projections.values()
        )

    def shared_modules(self, block: str) -> tuple[str, ...]:
        """Modules of the shared expert; none, where there is none."""
        names = self.shared_projections.values() if self.shared else ()
        return tuple(f"{block}.{self.shared.format(projection=name)}" for name in names)

    def stacked_module(self, block: str) -> str:
        """The module that holds all routed experts in one, where the family may have them so."""
        return f"{block}.{self.stacked.module}" if self.stacked else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One file of ``rules/families``."""

    name: str
    doc: str
    file: str
    wrapper_architectures: frozenset[str]
    model_types: frozenset[str]
    architectures: frozenset[str]
    from_: Mapping[str, tuple[str, ...]]
    """Facts that this family's config.json keeps under keys of its own, in the place of the catalogue's `from`."""
    facts: Mapping[str, Any]
    """Facts that the architecture fixes, where config.json is silent."""
    moe_layer: Expression
    """True for the layers with experts; reads `model.*` and `layer.index`."""
    names: Names
    router: Mapping[str, Any]
    """What the loader's router needs beyond `model.*`; see ``schema/family.schema.json``."""
    experts: Mapping[str, Any]
    """What the loader's experts need beyond `model.*`; see there too."""
    ue8m0_scales: str
    """How the family stores FP8 block scales that are powers of two: `fp32` (as numbers) or `e8m0` (as bytes)."""
    loads_fused_shared: bool
    """Whether our loader can put its shared expert into a slot."""
    gateless: Mapping[str, str]
    """Feature to the reason why no gate covers this family."""
    where: Where
    allow: tuple[Waiver, ...] = ()

    @property
    def witness(self) -> str:
        """What witnesses call this file, wherever the rule set is."""
        return f"families/{self.name}.yaml"

    @classmethod
    def parse(cls, document: Document | Mapping[str, Any], file: str = "") -> Family:
        """Read one family whose shape was checked; raises `RuleError`."""
        if isinstance(document, Document):
            data, file, where = document.data, document.file, document.where(("moe_layer",))
            place, allow = document.where(("family",)), read_waivers(document, data)
        else:
            data, where = document, Where(file)
            place, allow = where, ()
        try:
            moe_layer = parse_expression(str(data["moe_layer"]))
        except ValueError as error:
            raise RuleError([Fault("bad-family", f"moe_layer: {error}", where)]) from None
        raw = data["names"]
        names = Names(
            layers=tuple(raw["layers"]),
            draft_layers=tuple(raw.get("draft_layers", ())),
            routed=raw.get("routed", ""),
            stacked=Stacking.parse(raw["stacked"]) if "stacked" in raw else None,
            expert_bias=raw.get("expert_bias", ""),
            shared=raw.get("shared", ""),
            projections=dict(raw.get("projections", {})),
            shared_projections=dict(raw.get("shared_projections") or raw.get("projections", {})),
            router=raw.get("router", ""),
            router_bias=raw.get("router_bias", ""),
            shared_gate=raw.get("shared_gate", ""),
        )
        matches = data["matches"]
        return cls(
            name=data["family"],
            doc=data["doc"],
            file=file,
            wrapper_architectures=frozenset(matches.get("wrapper_architectures", ())),
            model_types=frozenset(matches.get("model_types", ())),
            architectures=frozenset(matches.get("architectures", ())),
            from_={name: tuple(paths) for name, paths in data.get("from", {}).items()},
            facts=data.get("facts", {}),
            moe_layer=moe_layer,
            names=names,
            router=data.get("router", {}),
            experts=data.get("experts", {}),
            ue8m0_scales=data.get("ue8m0_scales", "fp32"),
            loads_fused_shared=data.get("loads_fused_shared", False),
            gateless=data.get("gateless", {}),
            allow=allow,
            where=place,
        )

    def is_moe_layer(self, index: int, values: Values) -> bool | None:
        """Whether layer `index` has experts; None: unknown, for want of facts in `values`."""
        result = self.moe_layer({**values, "layer.index": index})
        return None if result is UNKNOWN else result is True

    def layer_numbers(self, values: Values) -> list[tuple[Role, int, int]] | None:
        """Role, index and draft number of each layer that has experts; None where the config does not say."""
        layers, drafts = values.get("model.num_hidden_layers", UNKNOWN), values.get("model.num_nextn_predict_layers", 0)
        if not isinstance(layers, int):
            return None
        drafts = drafts if isinstance(drafts, int) else 0
        for name, count in (("num_hidden_layers", layers), ("num_nextn_predict_layers", drafts)):
            if count > MAX_LAYERS:
                raise FactError(f"`model.{name}` is {count}, more than {MAX_LAYERS}; correct config.json")
        found: list[tuple[Role, int, int]] = []
        for index in range(layers):
            is_moe = self.is_moe_layer(index, values)
            if is_moe is None:
                return None
            if is_moe:
                found.append(("main", index, 0))
        if self.names.draft_layers:
            found += [("mtp", layers + draft, draft) for draft in range(drafts)]
        return found


def select_family(
    families: Sequence[Family],
    wrapper_architecture: str | None,
    model_types: Sequence[str],
    architecture: str | None,
) -> Family | None:
    """The family of a model: a wrapper's match beats a model type's, which beats an architecture's.

    DeepSeek V3, Kimi K2 and Kimi K2.5 share one architecture. A language model without an architecture of its own goes
    by its wrapper's, so that one may be a wrapper too. Of `model_types` the first that matches counts. Raises
    `FactError` where two families match equally well.
    """
    wrapper = wrapper_architecture or architecture
    for found in (
        [f for f in families if wrapper in f.wrapper_architectures],
        *([f for f in families if model_type in f.model_types] for model_type in model_types),
        [f for f in families if architecture in f.architectures],
    ):
        if len(found) > 1:
            names = ", ".join(f"`{f.name}` ({f.file})" for f in found)
            raise FactError(f"several families match this model: {names}; make their `matches` differ")
        if found:
            return found[0]
    return None


def overlaps(families: Sequence[Family]) -> list[str]:
    """Say which families could match one model equally well."""
    problems = []
    for position, one in enumerate(families):
        for other in families[position + 1 :]:
            for what in ("wrapper_architectures", "model_types", "architectures"):
                both = sorted(getattr(one, what) & getattr(other, what))
                problems += [f"families `{one.name}` and `{other.name}` both match {what} `{name}`" for name in both]
    return problems


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
        stacking=stacking,
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
