"""Bytes of the file into the rows of a slot: straight where both are contiguous, else through a small buffer.

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
from loader.accounts import Block
from loader.checkpoint import DTYPES, Checkpoint, bytes_of

PIECE_BYTES = 8 << 20
"""A piece on its way to a device: large enough for full PCIe bandwidth, small enough to overlap."""
SCRATCH_BYTES = 1 << 20
"""Rows of which only some columns are wanted, read whole: they stay in the core's cache until they are cut."""
LARGEST_SERIAL_COPY = 1 << 15
"""Elements up to which torch copies in the calling thread: ``at::internal::GRAIN_SIZE``. Here every core is busy."""
MOST_THREADS = 16


@dataclass(frozen=True, slots=True)
class Transfer:
    """One tensor, or a block of it, and its destination; dtype and shape were compared before this was made."""

    info: TensorInfo
    """Where the bytes are in the file."""
    block: Block | None
    """Rows and columns of the tensor; None: all of it."""
    into: Tensor
    """Contiguous, of the tensor's dtype and the block's shape, on the device."""


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
        self._scratch: Tensor | None = None
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._pieces: list[Tensor] = []
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def carry(self, transfer: Transfer, ready: torch.cuda.Event | None) -> None:
        into, info = transfer.into, transfer.info
        if not into.numel():
            return
        rows, columns = transfer.block or ((0, info.shape[0] if info.shape else 1), None)
        if into.device.type == "cpu" and not self._staged:
            self._read(info, rows, columns, into)
            return
        row_bytes = into.nbytes // (rows[1] - rows[0])
        step = max(1, PIECE_BYTES // row_bytes)
        if self._stream is not None and ready is not None:
            self._stream.wait_event(ready)
        flat = into.view(rows[1] - rows[0], -1)
        for first in range(0, len(flat), step):
            target = flat[first : first + step]
            piece = self._piece(target.nbytes).view(into.dtype).view(target.shape)
            self._read(info, (rows[0] + first, rows[0] + first + len(target)), columns, piece)
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

    def _read(self, info: TensorInfo, rows: tuple[int, int], columns: tuple[int, int] | None, target: Tensor) -> None:
        """Fill `target`, contiguous on the CPU, with a block of the tensor."""
        height = info.shape[0] if info.shape else 1
        row_bytes = info.nbytes // height
        if columns is None or columns == (0, info.shape[1]):
            self._checkpoint.read_into(info, rows[0] * row_bytes, bytes_of(target))
            return
        if self._scratch is None or len(self._scratch) < row_bytes:
            self._scratch = torch.empty(max(SCRATCH_BYTES, row_bytes), dtype=torch.uint8)
        step = max(1, min(len(self._scratch) // row_bytes, LARGEST_SERIAL_COPY // (columns[1] - columns[0])))
        dtype = DTYPES[info.dtype]
        for first in range(0, len(target), step):
            part = target[first : first + step]
            raw = self._scratch[: len(part) * row_bytes]
            self._checkpoint.read_into(info, (rows[0] + first) * row_bytes, bytes_of(raw))
            part.copy_(raw.view(dtype).view(len(part), -1)[:, columns[0] : columns[1]])
