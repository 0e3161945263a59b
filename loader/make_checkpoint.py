"""Make a tiny checkpoint that looks like a real one: names, packing, exclude lists and config keys; only widths shrink.

Written are the parts that loading experts depends on, and what stands next to them (norms, embeddings, the dense MLP);
attention is left out.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatekeeper import CheckpointError
from loader.blueprints import BLUEPRINTS, Blueprint, quantization_config
from loader.errors import RecipeError
from loader.packing import PACKERS
from loader.shards import write_shards
from loader.text import count

VOCABULARY = 64
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SHARED_AS_SHIPPED = {"int4_g32": "bf16"}
"""Moonshot's int4 releases keep their shared experts in bf16; other quantizers treat both alike by default."""
PAIRS = {(name, name) for name in PACKERS} | {(name, "bf16") for name in PACKERS} | {("bf16", "fp8_block")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to make. Sizes of None are the real model's."""

    family: str
    """``kimi_k25``"""
    format_name: str
    """Storage of routed experts: ``int4_g32``."""
    shared_format: str | None = None
    """Storage of shared experts; None: as the releases in that format have it."""
    layers: int = 3
    """Decoder layers, the first of them dense; a draft layer of the family comes on top."""
    experts: int | None = None
    """Routed experts; None: the family's 256 or 384, which gates ask for."""
    hidden: int = 64
    """Hidden size D."""
    width: int = 32
    """moe_intermediate_size F."""
    seed: int = 0
    """The same recipe makes the same bytes."""


def make_checkpoint(out: Path, recipe: Recipe) -> Path:
    """Write the checkpoint into `out`, whole or not at all, and return `out`.

    Raises `CheckpointError` where `out` is a file or has something in it, `RecipeError` where nobody can make it.
    """
    maker = _Maker(recipe)
    files = {"config.json": json.dumps(maker.config(), indent=2) + "\n"}
    return write_checkpoint(out, files, maker.shards(), maker.n_layers + 1)


def write_checkpoint(
    out: Path, files: Mapping[str, str], shards: Iterable[Mapping[str, Tensor]], n_shards: int
) -> Path:
    """Write text `files` and `shards` into `out`, whole or not at all; `CheckpointError` where it is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"`{out}` exists and is not empty; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_shards(temporary, shards, n_shards)
        temporary.replace(out)  # over an empty folder or nothing: both are one step
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:  # a full disk does not say where
            problem = f"{error.strerror}; nothing is left of it, name a folder with more room or other rights"
            raise OSError(error.errno, problem, str(out)) from None
        raise
    return out


class _Maker:
    def __init__(self, recipe: Recipe) -> None:
        if recipe.family not in BLUEPRINTS:
            raise RecipeError(f"no blueprint of family `{recipe.family}`; there are {', '.join(sorted(BLUEPRINTS))}")
        self.recipe = recipe
        self.blueprint: Blueprint = BLUEPRINTS[recipe.family]
        self.shared_format = recipe.shared_format or SHARED_AS_SHIPPED.get(recipe.format_name, recipe.format_name)
        for name in (recipe.format_name, self.shared_format):
            if name not in PACKERS:
                raise RecipeError(f"no packer for format `{name}`; there are {', '.join(sorted(PACKERS))}")
        if (recipe.format_name, self.shared_format) not in PAIRS:
            raise RecipeError(
                f"no quantizer writes routed experts in {recipe.format_name} and shared ones in {self.shared_format}; "
                f"use {recipe.format_name} or bf16 for the shared ones"
            )
        real = self.blueprint.config
        self.experts = real["n_routed_experts"] if recipe.experts is None else recipe.experts
        self.n_shared: int = real["n_shared_experts"]
        self.top_k = min(real["num_experts_per_tok"], self.experts)
        self.n_layers = recipe.layers + self.blueprint.has_draft
        self._check_sizes()

    def _check_sizes(self) -> None:
        r, groups = self.recipe, self.blueprint.config["n_group"]
        wrong = [
            f"{name} {size} is not a multiple of 32"
            for name, size in (("hidden", r.hidden), ("width", r.width))
            if size < 32 or size % 32
        ]
        if r.layers < 2:
            wrong.append(f"{count(r.layers, 'layer')}: the first is dense, so 2 are needed")
        if self.experts < 1 or self.experts % groups or self.experts // groups < 2:
            wrong.append(f"{self.experts} experts can't be in {groups} groups of two or more")
        elif self.experts // groups * self.blueprint.config["topk_group"] < self.top_k:
            wrong.append(f"{self.experts} experts in {groups} groups are too few for top {self.top_k}")
        if wrong:
            raise RecipeError("; ".join(wrong))

    @property
    def moe_layers(self) -> range:
        """Indices of layers with experts, the draft layer last."""
        return range(1, self.n_layers)

    def config(self) -> dict[str, Any]:
        """config.json, quantization_config where the real model has it."""
        r = self.recipe
        sizes = {
            "hidden_size": r.hidden,
            "intermediate_size": 2 * r.width,
            "moe_intermediate_size": r.width,
            "n_routed_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": r.layers,
            "first_k_dense_replace": 1,
            "vocab_size": VOCABULARY,
        }
        text: dict[str, Any] = {**self.blueprint.config, **sizes}
        top = {**self.blueprint.wrapper, "text_config": text} if self.blueprint.wrapper else text
        quantization = quantization_config(
            r.format_name, self.shared_format, self.blueprint, range(self.n_layers), self.moe_layers
        )
        if quantization is not None:
            inside = quantization["quant_method"] in self.blueprint.quantization_inside
            (text if inside else top)["quantization_config"] = quantization
        return top

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """One shard a layer, the last one for what is in no layer."""
        for layer in range(self.n_layers):
            yield self._layer(layer)
        d, draw = self.recipe.hidden, self._generator(self.n_layers)
        prefix = self.blueprint.prefix
        yield {
            f"{prefix}model.embed_tokens.weight": _normal(draw, VOCABULARY, d).bfloat16(),
            f"{prefix}model.norm.weight": torch.ones(d, dtype=torch.bfloat16),
            f"{prefix}lm_head.weight": _normal(draw, VOCABULARY, d).bfloat16(),
        }

    def _generator(self, layer: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.recipe.seed * 1009 + layer)

    def _layer(self, layer: int) -> dict[str, Tensor]:
        base, d, draw = f"{self.blueprint.prefix}model.layers.{layer}", self.recipe.hidden, self._generator(layer)
        tensors = {
            f"{base}.{name}.weight": torch.ones(d, dtype=torch.bfloat16)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        if layer == 0:
            # Dense MLPs go with the shared experts in every exclude list that is made here.
            return tensors | self._mlp(f"{base}.mlp", 2 * self.recipe.width, self.shared_format, draw)
        if layer == self.recipe.layers:
            tensors |= self._draft_head(base, draw)
        tensors[f"{base}.mlp.gate.weight"] = _normal(draw, self.experts, d).bfloat16()
        if self.blueprint.router_bias:
            tensors[f"{base}.mlp.gate.e_score_correction_bias"] = 0.1 * _normal(draw, self.experts, 1)[:, 0]
        tensors |= self._experts(f"{base}.mlp.experts", draw)
        return tensors | self._mlp(
            f"{base}.mlp.shared_experts", self.n_shared * self.recipe.width, self.shared_format, draw
        )

    def _draft_head(self, base: str, draw: torch.Generator) -> dict[str, Tensor]:
        d = self.recipe.hidden
        norms = {f"{base}.{name}.weight": torch.ones(d) for name in ("enorm", "hnorm", "shared_head.norm")}
        tables = {
            f"{base}.{name}.weight": _normal(draw, VOCABULARY, d) for name in ("embed_tokens", "shared_head.head")
        }
        mixed = norms | tables | {f"{base}.eh_proj.weight": _normal(draw, d, 2 * d)}
        return {name: tensor.bfloat16() for name, tensor in mixed.items()}

    def _experts(self, base: str, draw: torch.Generator) -> dict[str, Tensor]:
        """All routed experts, packed together and named one by one."""
        d, f = self.recipe.hidden, self.recipe.width
        tensors: dict[str, Tensor] = {}
        for projection, (rows, columns) in zip(PROJECTIONS, ((f, d), (f, d), (d, f)), strict=True):
            weight = _normal(draw, self.experts * rows, columns).view(self.experts, rows, columns)
            for suffix, stacked in PACKERS[self.recipe.format_name](weight).items():
                tensors |= {f"{base}.{e}.{projection}.{suffix}": one for e, one in enumerate(stacked)}
        return dict(sorted(tensors.items()))

    def _mlp(self, base: str, width: int, format_name: str, draw: torch.Generator) -> dict[str, Tensor]:
        d = self.recipe.hidden
        tensors: dict[str, Tensor] = {}
        for projection, (rows, columns) in zip(PROJECTIONS, ((width, d), (width, d), (d, width)), strict=True):
            parts = PACKERS[format_name](_normal(draw, rows, columns))
            tensors |= {f"{base}.{projection}.{suffix}": part for suffix, part in parts.items()}
        return tensors


def _normal(draw: torch.Generator, rows: int, columns: int) -> Tensor:
    """Variance 1 / columns, so that a layer's output is about as large as its input."""
    return torch.randn(rows, columns, generator=draw) / math.sqrt(columns)
