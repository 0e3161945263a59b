"""Small models and made-up points, so that the bench can be tested without a GPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from loader.bench.fetched import MANIFEST
from loader.bench.problem import Model
from loader.bench.report import Point, Report
from loader.bench.timing import Ceilings
from loader.router_config import RouterConfig

CEILINGS = Ceilings(copy_bytes_per_second=4.2e12, bf16_flops=780e12, fp8_flops=1400e12)

ROUTER = RouterConfig(scoring_func="sigmoid", top_k=2, routed_scaling_factor=1.5)


def model(format_name: str = "bf16", **other: Any) -> Model:
    """A layer that the interpreter runs in no time."""
    sizes = {"n_routed": 6, "n_shared": 1, "hidden_size": 64, "width": 32, "router": ROUTER}
    return Model(**{"name": "small", "format": format_name, "tp_size": 1, **sizes, **other})


def point(**other: Any) -> Point:
    """One point of int4 at 16 tokens, settings measured."""
    values: dict[str, Any] = {
        "shape": "kimi-k2.5",
        "tp": 8,
        "format": "int4_g32",
        "tokens": 16,
        "floor_us": 100.0,
        "memory_us": 100.0,
        "arithmetic_us": 5.0,
        "ours_us": 150.0,
        "ours_apart_us": 160.0,
        "ours_counted_us": 165.0,
        "layer_us": 158.0,
        "error": 0.001,
        "config": {"block_m": 16},
        "measured": True,
    }
    return Point(**values | other)


def report(*points: Point) -> Report:
    """What a bench of these points came to."""
    return Report(
        device="NVIDIA H200",
        versions={"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"},
        command="moe-loader bench --shape kimi-k2.5",
        ceilings=CEILINGS,
        points=list(points),
    )


def fetched(folder: Path, *members: str) -> Path:
    """A folder as `benchmarks/peers/fetch.py` leaves it, with empty files."""
    digest = hashlib.sha256(b"").hexdigest()
    for member in members:
        (folder / member).parent.mkdir(parents=True, exist_ok=True)
        (folder / member).write_bytes(b"")
    files = [{"member": member, "stored": member, "sha256": digest} for member in members]
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
    return folder
