"""Tiny safetensors files of zeros, right or wrong, written byte by byte: what the library would refuse to write too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatekeeper.checkpoint import DTYPE_BITS

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name to dtype and shape."""


def header_of(tensors: Tensors) -> tuple[dict[str, Any], int]:
    """A well-formed header and the length of its data."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header, end


def shard_bytes(header: Any, data: int, header_bytes: int | None = None) -> bytes:
    """A file with this header (JSON, or bytes as they are) and so many bytes of data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if header_bytes is None else header_bytes).to_bytes(8, "little") + raw + bytes(data)


def write_shards(folder: Path, shards: Mapping[str, Tensors], *, index: bool = True) -> Path:
    """Write shards and, unless told not to, their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, tensors in shards.items():
        (folder / shard).write_bytes(shard_bytes(*header_of(tensors)))
    if index:
        write_index(folder, {name: shard for shard, tensors in shards.items() for name in tensors})
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    """Write an index as Hugging Face names it."""
    document = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
