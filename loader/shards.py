"""Write a folder of safetensors shards with their index; streaming, so that one shard at a time is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from loader.checkpoint import DTYPES, bytes_of

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
            file.write(bytes_of(whole))
    return position


def write_shards(folder: Path, shards: Iterable[Mapping[str, Tensor]], n_shards: int, threads: int = 1) -> None:
    """Write ``model-00001-of-0000N.safetensors`` and so on, and ``model.safetensors.index.json``.

    With several `threads` the tensors of all shards are in memory at once.
    """
    names = [f"model-{number:05d}-of-{n_shards:05d}.safetensors" for number in range(1, n_shards + 1)]

    def write(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, str]]:
        return write_shard(folder / name, tensors), dict.fromkeys(tensors, name)

    weight_map: dict[str, str] = {}
    total_bytes = 0
    with ThreadPoolExecutor(threads) as pool:
        for nbytes, written in (pool.map if threads > 1 else map)(write, names, shards):
            total_bytes += nbytes
            weight_map |= written
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
