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
from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from gatekeeper import CheckpointError, Index, TensorInfo

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
    }
)
"""safetensors' word for a dtype to torch's; https://github.com/huggingface/safetensors, ``tensor.rs``."""

MOST_BYTES_A_READ = 1 << 30
"""Linux reads at most 2**31 - 4096 bytes in one call."""


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, without a copy; keep the tensor alive while it is in use."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
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
        self.read_into(info, rows[0] * row_bytes if rows else 0, bytes_of(tensor))
        return tensor

    def read_into(self, info: TensorInfo, first_byte: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes of a tensor from `first_byte` of its data on.

        Raises `CheckpointError` if the file can't be read, is not the one that was indexed, or has become too short.
        """
        position, end = info.start + first_byte, info.start + first_byte + len(memory)
        assert end <= info.end
        try:
            shard = self._shard(info.shard)
            while memory:
                count = os.preadv(shard, [memory[:MOST_BYTES_A_READ]], position)
                if not count:
                    raise CheckpointError(
                        f"{info.shard}: `{info.name}` ends at byte {info.end}, the file now at {position}; it was cut "
                        "short while loading: download the shard again"
                    )
                memory, position = memory[count:], position + count
        except OSError as error:
            raise CheckpointError(
                f"{info.shard}: `{info.name}` can't be read: {error.strerror}; download the shard again"
            ) from None

    def _shard(self, name: str) -> int:
        with self._opening:
            if name not in self._shards:
                shard = os.open(self.index.folder / name, os.O_RDONLY)
                self._stack.callback(os.close, shard)
                self._require_same(name, shard)
                self._shards[name] = shard
            return self._shards[name]

    def _require_same(self, name: str, shard: int) -> None:
        data_start = min(info.start for info in self._indexed[name])
        found = _header(os.pread(shard, data_start, 0))
        for info in self._indexed[name]:
            offsets = [info.start - data_start, info.end - data_start]
            then = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
            if found.get(info.name) != then:
                raise CheckpointError(
                    f"{name}: `{info.name}` was {info.dtype} {list(info.shape)} and is now {_what(found, info.name)}; "
                    "the file was exchanged while loading"
                )


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
