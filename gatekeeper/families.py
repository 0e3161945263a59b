"""Model families as data: which models they are, which layers are MoE, and what the experts' tensors are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gatekeeper.errors import FactError, Fault, RuleError, Where
from gatekeeper.expressions import Expression, parse_expression
from gatekeeper.source import Document
from gatekeeper.stacking import Stacking
from gatekeeper.values import UNKNOWN, Values
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

    def announced_stack(self, block: str) -> str:
        """The module that config.json may name for all routed experts; none where they are usually one by one."""
        return self.stacked_module(block) if self.stacked and (self.stacked.usual or not self.routed) else ""

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
