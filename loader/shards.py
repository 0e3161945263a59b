"""Write a folder of safetensors shards with their index; streaming, so that one shard at a time is in memory."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from loader.checkpoint import DTYPES

_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write one file and return the bytes of its tensors. Format: https://github.com/huggingface/safetensors#format.

    The library's own writer goes through numpy, which the loader does without.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position + tensor.nbytes]
        header[name] = {"dtype": _WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            whole = tensor.cpu().contiguous()
            file.write(ctypes.string_at(whole.data_ptr(), whole.nbytes) if whole.nbytes else b"")
    return position


def write_shards(folder: Path, shards: Iterable[Mapping[str, Tensor]], n_shards: int) -> None:
    """Write ``model-00001-of-0000N.safetensors`` and so on, and ``model.safetensors.index.json``."""
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{n_shards:05d}.safetensors"
        total_bytes += write_shard(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
