"""Make a small checkpoint of a real model from its config.json: real names, layer numbers and exclude lists.

What stands in layers without experts is left out, as is attention; sizes shrink, nothing else in the config changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatekeeper import CheckpointError, Family, load_rules, read_facts
from loader.errors import RecipeError
from loader.make_checkpoint import write_checkpoint
from loader.packing import PACKERS

NESTED = ("text_config", "language_config", "llm_config")
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
HF_QUANT = "hf_quant_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """What to make of a config.json."""

    config: Path
    """The real one; ``hf_quant_config.json`` beside it comes along."""
    formats: tuple[str, str]
    """Storage of routed and of shared experts: ``("mxfp4", "bf16")``."""
    draft_formats: tuple[str, str] | None = None
    """Of draft layers; None: the same."""
    layers: int = 2
    """MoE layers, the model's last ones; draft layers come on top."""
    experts: int | None = None
    """Routed experts; None: as many as the model has, which gates ask for."""
    hidden: int = 64
    """Hidden size D."""
    width: int = 32
    """Width F of a routed expert."""
    seed: int = 0
    """The same seed makes the same bytes."""


def shrink(out: Path, what: Shrunk) -> Path:
    """Write the checkpoint into `out`, whole or not at all, and return `out`.

    Which layers are dense is said as the real config says it. The formats are not read from its lists: whether those
    say the same is what such a checkpoint is for. Raises `RecipeError` where a format has no packer or the model has
    fewer layers, `CheckpointError` where `out` is not empty, no family knows the model, or no key of its config says
    which layers are dense.
    """
    maker = _Maker(what)
    beside = what.config.parent / HF_QUANT
    files = {"config.json": json.dumps(maker.config, indent=2) + "\n"}
    if beside.exists():
        files[HF_QUANT] = beside.read_text(encoding="utf-8")
    return write_checkpoint(out, files, maker.shards(), len(maker.blocks))


class _Maker:
    def __init__(self, what: Shrunk) -> None:
        self.what = what
        unknown = sorted({*what.formats, *(what.draft_formats or ())} - PACKERS.keys())
        if unknown:
            raise RecipeError(f"no packer for format `{unknown[0]}`; there are {', '.join(sorted(PACKERS))}")
        rules = load_rules()
        values = read_facts(what.config, rules=rules).values
        family = rules.families.get(str(values.get("model.family")))
        if family is None or not family.names.routed:
            raise CheckpointError(f"`{what.config}`: no family with experts one by one knows this model")
        self.family: Family = family
        self.n_shared = values.get("model.n_shared_experts")
        layers, numbers = values.get("model.num_hidden_layers"), family.layer_numbers(values) or []
        if not isinstance(layers, int) or sum(role == "main" for role, _, _ in numbers) < what.layers:
            raise RecipeError(f"`{what.config}` has fewer than {what.layers} layers with experts")
        first = layers - what.layers
        self.blocks = [
            (
                family.names.block(role, layer, draft),
                what.formats if role == "main" else what.draft_formats or what.formats,
            )
            for role, layer, draft in numbers
            if layer >= first
        ]
        self.config = json.loads(what.config.read_text(encoding="utf-8"))
        self.own: dict[str, Any] = next((self.config[key] for key in NESTED if key in self.config), self.config)
        self.shared_width = what.width * self._shared_ratio()
        self._cut(first, layers)

    def _shared_ratio(self) -> int:
        """How many times as wide as a routed expert the shared one is."""
        width, shared = (self.own.get(k) for k in ("moe_intermediate_size", "shared_expert_intermediate_size"))
        if isinstance(width, int) and isinstance(shared, int):
            return shared // width
        return self.n_shared if isinstance(self.n_shared, int) else 1

    def _cut(self, first: int, layers: int) -> None:
        own, what = self.own, self.what
        dense = {
            "first_k_dense_replace": first,
            "mlp_layer_types": ["dense"] * first + ["sparse"] * what.layers,
            "mlp_only_layers": list(range(first)),
        }
        said = dense.keys() & own.keys()
        if not said:
            raise CheckpointError(f"`{what.config}` has no key that says which layers are dense: {', '.join(dense)}")
        sizes = {
            "hidden_size": what.hidden,
            "intermediate_size": 2 * what.width,
            "moe_intermediate_size": what.width,
            "shared_expert_intermediate_size": self.shared_width,
        }
        own |= {key: dense[key] for key in said} | {key: size for key, size in sizes.items() if key in own}
        self.experts = next(own[key] for key in EXPERTS if key in own)
        if what.experts is not None:
            self.experts = what.experts
            own |= {key: what.experts for key in EXPERTS if key in own}
        own["num_experts_per_tok"] = min(own["num_experts_per_tok"], self.experts)

    def shards(self) -> Iterator[Mapping[str, Tensor]]:
        """One shard a layer."""
        for number, (block, formats) in enumerate(self.blocks):
            draw = torch.Generator().manual_seed(self.what.seed * 1009 + number)
            yield dict(self._layer(block, formats, draw))

    def _layer(self, block: str, formats: tuple[str, str], draw: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        names, d, experts = self.family.names, self.what.hidden, self.experts
        yield f"{block}.{names.router}", _normal(draw, experts, d).bfloat16()
        if names.router_bias:
            yield f"{block}.{names.router_bias}", 0.1 * _normal(draw, experts, 1)[:, 0]
        for projection, name in names.projections.items():
            rows, columns = self._size(projection, self.what.width)
            weight = _normal(draw, experts * rows, columns).view(experts, rows, columns)
            for suffix, stacked in PACKERS[formats[0]](weight).items():
                for expert, one in enumerate(stacked):
                    yield f"{block}.{names.routed.format(expert=expert, projection=name)}.{suffix}", one
        for projection, name in names.shared_projections.items() if names.shared and self.n_shared else ():
            weight = _normal(draw, *self._size(projection, self.shared_width))
            for suffix, one in PACKERS[formats[1]](weight).items():
                yield f"{block}.{names.shared.format(projection=name)}.{suffix}", one
        if names.shared_gate:
            yield f"{block}.{names.shared_gate}", _normal(draw, 1, d).bfloat16()

    def _size(self, projection: str, width: int) -> tuple[int, int]:
        return (self.what.hidden, width) if projection == "down" else (width, self.what.hidden)


def _normal(draw: torch.Generator, rows: int, columns: int) -> Tensor:
    """Variance 1 / columns, so that a layer's output is about as large as its input."""
    return torch.randn(rows, columns, generator=draw) / math.sqrt(columns)
