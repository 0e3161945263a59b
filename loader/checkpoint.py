"""Tensors of a checkpoint by name: the index is gatekeeper's, the bytes come through the safetensors library."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
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


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


class Checkpoint:
    """The tensors of one folder, read one at a time; shards are opened when first needed and closed together.

    Every tensor is compared with what the index said of it, so that a file exchanged since is an error.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._stack = ExitStack()
        self._shards: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._shards.clear()
        self._stack.close()

    def fetch(self, name: str) -> Tensor:
        """The whole tensor `name`, on the CPU; raises `CheckpointError` if it is not what the index says."""
        try:
            info = self.index.tensors[name]
        except KeyError:
            raise CheckpointError(f"`{self.index.folder}` has no tensor `{name}`") from None
        try:
            tensor: Tensor = self._shard(info).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.shard}: `{name}` can't be read: {error}; download the shard again") from None
        if tensor.shape != info.shape or tensor.dtype != DTYPES.get(info.dtype):
            raise CheckpointError(
                f"{info.shard}: `{name}` was {info.dtype} {list(info.shape)} and is now {dtype_name(tensor.dtype)} "
                f"{list(tensor.shape)}; the file was exchanged while loading"
            )
        return tensor

    def _shard(self, info: TensorInfo) -> Any:
        if info.shard not in self._shards:
            path = self.index.folder / info.shard
            self._shards[info.shard] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        return self._shards[info.shard]
