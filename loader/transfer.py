"""Bytes of the file into the rows of a slot: straight where they are contiguous there, else through a small buffer.

On a GPU the buffers are pinned, two to a thread, so that reading the next piece overlaps the copy of the last one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from gatekeeper import TensorInfo
from loader.checkpoint import Checkpoint, bytes_of

PIECE_BYTES = 8 << 20
"""A piece on its way to a device: large enough for full PCIe bandwidth, small enough to overlap."""
SCRATCH_BYTES = 1 << 20
"""Rows of which only some columns are wanted, read whole: they stay in the core's cache until they are cut."""
LARGEST_SERIAL_COPY = 1 << 15
"""Elements up to which torch copies in the calling thread: ``at::internal::GRAIN_SIZE``. Here every core is busy."""
MOST_THREADS = 16


@dataclass(frozen=True, slots=True)
class Transfer:
    """What of a tensor goes where; dtype and shape were compared before this was made."""

    info: TensorInfo
    """Where the bytes are in the file."""
    source: Tensor
    """On the meta device, a view of the tensor's data: shape, strides and offset say which numbers."""
    into: Tensor
    """Contiguous, of the same dtype and shape, on the device."""


def default_threads() -> int:
    """As many as this process may use cores, at most 16."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_THREADS)


class Transfers:
    """Threads that carry out transfers, each in a lane of its own; leave the context before freeing a destination."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, *, threads: int | None = None, staged: bool = False
    ) -> None:
        """`threads`: None for one a core; `staged`: through pieces even to the CPU, as it is done to a GPU."""
        self._checkpoint, self._device, self._staged = checkpoint, device, staged
        self._mine = threading.local()
        self._lanes: list[_Lane] = []
        self._pool = ThreadPoolExecutor(threads or default_threads(), "load", initializer=self._open_lane)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # INVARIANT: nobody writes to a destination after this, so that it may be freed.
        self._pool.shutdown(cancel_futures=True)
        self._arrive()

    def start(self, transfers: Iterable[Transfer], moved: Callable[[int], None]) -> Callable[[], None]:
        """Start all of `transfers` and give a function that waits for the last byte and raises the first error.

        `moved` is told the bytes of each, from the thread that carried it.
        """
        # Destinations may be memory that work already queued on the device still reads.
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None

        def carry(transfer: Transfer) -> None:
            self._mine.lane.carry(transfer, ready)
            moved(transfer.into.nbytes)

        # In the order of the files, so that each shard is read once, from front to back.
        ordered = sorted(transfers, key=lambda t: (t.info.shard, t.info.start))
        futures = [self._pool.submit(carry, transfer) for transfer in ordered]

        def finish() -> None:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            self._arrive()

        return finish

    def _arrive(self) -> None:
        for lane in self._lanes:
            lane.finish()

    def _open_lane(self) -> None:
        self._mine.lane = _Lane(self._checkpoint, self._device, self._staged)
        self._lanes.append(self._mine.lane)


class _Lane:
    """One thread's buffers and its stream; pieces alternate between two buffers."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, staged: bool) -> None:
        self._checkpoint, self._staged = checkpoint, staged
        self._scratch = Scratch()
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._pieces: list[Tensor] = []
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def carry(self, transfer: Transfer, ready: torch.cuda.Event | None) -> None:
        source, into, info = transfer.source, transfer.into, transfer.info
        if not into.numel():
            return
        if into.device.type == "cpu" and not self._staged:
            read_strided(self._checkpoint, info, source, into, self._scratch)
            return
        if self._stream is not None and ready is not None:
            self._stream.wait_event(ready)
        if not into.dim():
            source, into = source.reshape(1), into.reshape(1)
        step = max(1, PIECE_BYTES * len(into) // into.nbytes) if _is_by_rows(source) else len(into)
        for first in range(0, len(into), step):
            target = into[first : first + step]
            piece = self._piece(target.nbytes).view(into.dtype).view(target.shape)
            read_strided(self._checkpoint, info, source[first : first + step], piece, self._scratch)
            self._send(piece, target)

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        if self._stream is not None:
            self._stream.synchronize()

    def _piece(self, nbytes: int) -> Tensor:
        """The buffer that was sent longer ago, once it has arrived."""
        if not self._pieces or len(self._pieces[0]) < nbytes:
            self.finish()
            size = max(nbytes, PIECE_BYTES)
            self._pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        self._turn = 1 - self._turn
        sent = self._copied[self._turn]
        if sent is not None:
            sent.synchronize()
        return self._pieces[self._turn][:nbytes]

    def _send(self, piece: Tensor, target: Tensor) -> None:
        if self._stream is None:
            target.copy_(piece)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(piece, non_blocking=True)
            self._copied[self._turn] = self._stream.record_event()


class Scratch:
    """Memory of one thread for what is read and then cut; it grows with the largest piece."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def of(self, nbytes: int) -> Tensor:
        """So many bytes, whose content is whatever it was."""
        if self._memory is None or len(self._memory) < nbytes:
            self._memory = torch.empty(max(SCRATCH_BYTES, nbytes), dtype=torch.uint8)
        return self._memory[:nbytes]


def read_strided(
    checkpoint: Checkpoint, info: TensorInfo, source: Tensor, target: Tensor, scratch: Scratch | None = None
) -> None:
    """Fill `target`, contiguous on the CPU, with the numbers that `source`, a meta view of the tensor's data, shows."""
    size = source.element_size()
    if source.is_contiguous():
        checkpoint.read_into(info, int(source.storage_offset()) * size, bytes_of(target))
        return
    scratch = scratch or Scratch()
    for first in range(0, len(target), step := _rows_at_once(source)):
        part, some = target[first : first + step], source[first : first + step]
        raw = scratch.of(_extent(some) * size)
        checkpoint.read_into(info, int(some.storage_offset()) * size, bytes_of(raw))
        part.copy_(raw.view(source.dtype).as_strided(some.shape, some.stride()))


def _rows_at_once(source: Tensor) -> int:
    """Rows to read in one go, with what lies between them; all, where rows run across each other."""
    if not _is_by_rows(source):
        return len(source)
    columns = source.numel() // len(source)
    return max(1, min(SCRATCH_BYTES // (source.stride(0) * source.element_size()), LARGEST_SERIAL_COPY // columns))


def _is_by_rows(source: Tensor) -> bool:
    return source.dim() < 2 or source.stride(0) >= source.stride(1)


def _extent(source: Tensor) -> int:
    """Elements from the first to the last one shown."""
    return 1 + sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True))
