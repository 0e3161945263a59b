"""Tensors of a checkpoint by name: where they are is gatekeeper's index, the bytes are read from there.

Read, not mapped: as fast by measurement (benchmarks/README.md), no page of the file counts as the process's memory, and
a file that is cut short meanwhile is an error where a mapping would end the process with SIGBUS.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from gatekeeper import CheckpointError, Index, TensorInfo
from loader.dtypes import NAMES

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({word: getattr(torch, name) for word, name in NAMES.items()})
"""safetensors' word for a dtype to torch's."""

MOST_MEMORIES_A_READ = 1024
"""Linux's ``IOV_MAX``."""


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, without a copy; keep the tensor alive while it is in use."""
    assert tensor.is_contiguous() and tensor.is_cpu
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class Checkpoint:
    """The tensors of one folder; shards are opened when first needed and closed together. Several threads may read.

    Each shard's header is compared with the index when it is opened, so that a file exchanged since is an error.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._stack = ExitStack()
        self._shards: dict[str, int] = {}
        self._indexed: dict[str, list[TensorInfo]] = defaultdict(list)
        for info in index.tensors.values():
            self._indexed[info.shard].append(info)
        self._opening = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._shards.clear()
        self._stack.close()

    def info(self, name: str) -> TensorInfo:
        """What the index says of the tensor `name`; raises `CheckpointError` where there is none."""
        try:
            return self.index.tensors[name]
        except KeyError:
            raise CheckpointError(f"`{self.index.folder}` has no tensor `{name}`") from None

    def fetch(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor `name`, or some of its rows, in new memory on the CPU; raises `CheckpointError` as `read_into`."""
        info = self.info(name)
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(f"{info.shard}: `{name}` is {info.dtype}, which this loader does not read")
        shape = info.shape if rows is None else (rows[1] - rows[0], *info.shape[1:])
        tensor = torch.empty(shape, dtype=dtype)
        row_bytes = info.nbytes // info.shape[0] if rows and info.shape[0] else 0
        self.read_into([info], info.start + (rows[0] * row_bytes if rows else 0), [bytes_of(tensor)])
        return tensor

    def read_into(self, infos: Sequence[TensorInfo], position: int, memories: Sequence[memoryview]) -> None:
        """Fill `memories`, one after the other, with the bytes of a shard from `position` on, which are of `infos`.

        Raises `CheckpointError` if the file can't be read, is not the one that was indexed, or has become too short.
        """
        left, wanted = [memory for memory in memories if memory], sum(map(len, memories))
        try:
            shard = self._shard(infos[0].shard)
            while wanted:
                count = os.preadv(shard, left[:MOST_MEMORIES_A_READ], position)
                if not count:
                    info = _at(infos, position)
                    raise CheckpointError(
                        f"{info.shard}: `{info.name}` ends at byte {info.end}, the file now at {position}; it was cut "
                        "short while loading: download the shard again"
                    )
                position, wanted = position + count, wanted - count
                if wanted:
                    left = _after(left, count)
        except OSError as error:
            info = _at(infos, position)
            raise CheckpointError(
                f"{info.shard}: `{info.name}` can't be read: {error.strerror}; download the shard again"
            ) from None

    def _shard(self, name: str) -> int:
        if name not in self._shards:  # whoever finds it there need not wait for anyone
            with self._opening:
                if name not in self._shards:
                    self._shards[name] = self._open(name)
        return self._shards[name]

    def _open(self, name: str) -> int:
        shard = os.open(self.index.folder / name, os.O_RDONLY)
        self._stack.callback(os.close, shard)
        self._require_same(name, shard)
        return shard

    def _require_same(self, name: str, shard: int) -> None:
        data_start = min(info.start for info in self._indexed[name])
        head = os.pread(shard, data_start, 0)
        if self.index.knows(name, head):
            return
        found = _header(head)
        for info in self._indexed[name]:
            offsets = [info.start - data_start, info.end - data_start]
            then = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
            if found.get(info.name) != then:
                raise CheckpointError(
                    f"{name}: `{info.name}` was {info.dtype} {list(info.shape)} and is now {_what(found, info.name)}; "
                    "the file was exchanged while loading"
                )


def _at(infos: Sequence[TensorInfo], position: int) -> TensorInfo:
    """The tensor whose bytes are at `position`, or the last one."""
    return next((info for info in infos if position < info.end), infos[-1])


def _after(memories: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is still to be filled once the first `count` bytes are."""
    for filled, memory in enumerate(memories):
        if count < len(memory):
            return [memory[count:], *memories[filled + 1 :]]
        count -= len(memory)
    return []


def _header(raw: bytes) -> Mapping[str, Any]:
    """The entries of a header, or nothing where it is none any more."""
    if int.from_bytes(raw[:8], "little") != len(raw) - 8:
        return {}
    try:
        found = json.loads(raw[8:])
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _what(found: Mapping[str, Any], name: str) -> str:
    entry = found.get(name)
    if not isinstance(entry, dict):
        return "not there"
    return f"{entry.get('dtype')} {entry.get('shape')} at {entry.get('data_offsets')}"
