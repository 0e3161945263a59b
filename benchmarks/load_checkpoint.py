"""A checkpoint of real shapes to load at speed: random numbers, written once into a cache folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gatekeeper import load_rules
from loader.checkpoint import DTYPES
from loader.formats.layouts import layout_of
from loader.make_checkpoint import Recipe, make_checkpoint
from loader.shards import write_shards
from loader.transfer import default_threads

FORMATS = load_rules().formats
POOL_NUMBERS = 1 << 25
EXPERTS_A_SHARD = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is written; hidden size and width are those of DeepSeek V3 and Kimi K2.5, the rest decides the size."""

    family: str
    """``kimi_k2``"""
    format_name: str
    """Of routed and shared experts alike, so that they can be fused: ``int4_g32``."""
    experts: int
    """Routed experts of a layer: 96."""
    layers: int
    """MoE layers: 2."""
    hidden: int = 7168
    width: int = 2048


SHAPES = {
    "int4": Shape(family="kimi_k2", format_name="int4_g32", experts=96, layers=2),
    "bf16": Shape(family="deepseek_v3", format_name="bf16", experts=24, layers=2),
    "kimi_k25": Shape(family="kimi_k2", format_name="int4_g32", experts=384, layers=4),
    "kimi_k25_mxfp4": Shape(family="kimi_k2", format_name="mxfp4", experts=384, layers=2),
}
"""4.8 GB, 4.4 GB, and for a GPU 38.1 and 18.0 GB in layers as large as Kimi-K2.5's."""


def checkpoint(cache: Path, shape: Shape) -> Path:
    """The folder of `shape` in `cache`, made where it is not there yet and flushed to the disk."""
    folder = cache / "-".join(str(value) for value in asdict(shape).values())
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache))
    small = make_checkpoint(
        temporary / "small",
        Recipe(
            family=shape.family,
            format_name=shape.format_name,
            shared_format=shape.format_name,
            experts=shape.experts,
            layers=shape.layers + 1,
        ),
    )
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": shape.hidden, "moe_intermediate_size": shape.width, "num_nextn_predict_layers": 0}
    large = temporary / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(config, indent=2))
    n_shards = shape.layers * -(-(shape.experts + 1) // EXPERTS_A_SHARD)
    write_shards(large, _shards(shape), n_shards, default_threads())  # views of one pool: they take no memory
    for path in large.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    large.rename(folder)
    shutil.rmtree(temporary)
    return folder


def _shards(shape: Shape) -> Iterator[dict[str, Tensor]]:
    numbers = _Numbers()
    for layer in range(1, shape.layers + 1):
        base = f"model.layers.{layer}.mlp"
        modules = [f"{base}.experts.{e}" for e in range(shape.experts)] + [f"{base}.shared_experts"]
        for first in range(0, len(modules), EXPERTS_A_SHARD):
            tensors: dict[str, Tensor] = {}
            for module in modules[first : first + EXPERTS_A_SHARD]:
                tensors |= _mlp(shape, module, numbers)
            if first == 0:
                router = torch.randn(shape.experts, shape.hidden) / shape.hidden**0.5
                tensors[f"{base}.gate.weight"] = router.bfloat16()
                tensors[f"{base}.gate.e_score_correction_bias"] = 0.1 * torch.randn(shape.experts)
            yield dict(sorted(tensors.items()))


def _mlp(shape: Shape, module: str, numbers: _Numbers) -> dict[str, Tensor]:
    layout = layout_of(FORMATS[shape.format_name])
    (noted,) = [spec.suffix for spec in FORMATS[shape.format_name].signatures[0].parts if spec.role == "shape"] or [""]
    tensors: dict[str, Tensor] = {}
    sizes = {
        "gate": (shape.width, shape.hidden),
        "up": (shape.width, shape.hidden),
        "down": (shape.hidden, shape.width),
    }
    for projection, (rows, columns) in sizes.items():
        for part in layout.parts:
            tensors[f"{module}.{projection}_proj.{part.suffix}"] = numbers.take(
                part.shape(rows, columns), DTYPES[part.dtype], is_scale=part.role == "scale"
            )
        if noted:
            tensors[f"{module}.{projection}_proj.{noted}"] = torch.tensor([rows, columns])
    return tensors


class _Numbers:
    """Tensors that are views at random places of one pool: different from each other, and made at no cost."""

    def __init__(self) -> None:
        self._draw = torch.Generator().manual_seed(0)
        numbers = torch.randn(POOL_NUMBERS, generator=self._draw) / 64
        self._pools = {
            torch.bfloat16: numbers.bfloat16(),
            torch.int32: self._integers(-(2**31), 2**31, torch.int32),
            torch.uint8: self._integers(0, 2**8, torch.uint8),
        }
        self._exponents = self._integers(115, 123, torch.uint8)

    def take(self, shape: tuple[int, int], dtype: torch.dtype, *, is_scale: bool) -> Tensor:
        """Scales stored as exponents are near 1 / 64, as the other numbers are."""
        size = shape[0] * shape[1]
        start = int(torch.randint(POOL_NUMBERS - size, (), generator=self._draw))
        pool = self._exponents if is_scale and dtype == torch.uint8 else self._pools[dtype]
        return pool[start : start + size].view(shape)

    def _integers(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, (POOL_NUMBERS,), generator=self._draw, dtype=dtype)
