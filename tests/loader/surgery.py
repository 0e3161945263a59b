"""Change the tensors of a checkpoint on disk, and its index with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from loader.shards import write_shards


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Let `change` edit all tensors by name, in place; the index follows."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping
        shard.unlink()
    change(tensors)
    write_shards(folder, [tensors], 1)


def delete(folder: Path, *names: str) -> None:
    """Delete tensors, from shard and index alike."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    rewrite(folder, change)
