"""Bytes of the files into the rows of slots; what lies side by side in a file and is wanted whole is read as one.

Read straight to where it goes, on the CPU; to a GPU through pinned memory, two pieces to a thread, so that reading the
next one overlaps the copy of the last. Rows of which only some columns are wanted go through a small buffer first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from gatekeeper import TensorInfo
from loader.checkpoint import Checkpoint, bytes_of

PIECE_BYTES = 4 << 20
"""What is read as one: large enough for full PCIe bandwidth, small enough for two a thread to stay in the cache."""
SCRATCH_BYTES = 1 << 20
"""Rows of which only some columns are wanted, read whole: they stay in the core's cache until they are cut."""
LARGEST_SERIAL_COPY = 1 << 15
"""Elements up to which torch copies in the calling thread: ``at::internal::GRAIN_SIZE``. Here every core is busy."""
ALIGNMENT = 64
"""Of what lies in a piece, in bytes: a line of the cache, and a multiple of every item."""
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

    @property
    def start(self) -> int:
        """Where the first of the numbers is in the file."""
        return self.info.start + int(self.source.storage_offset()) * self.source.element_size()


Piece = Sequence[Transfer]
"""One transfer, or several that lie one right behind the other in a shard and are wanted whole."""


def default_threads() -> int:
    """As many as this process may use cores, at most 16."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_THREADS)


class Transfers:
    """Threads that carry out transfers, each in a lane of its own; leave the context before freeing a destination."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, *, threads: int | None = None, staged: bool = False
    ) -> None:
        """`threads`: None for one a core; `staged`: through pieces even to the CPU, as it is done to a GPU."""
        self._checkpoint, self._device = checkpoint, device
        self._staged = staged or device.type != "cpu"
        self._mine = threading.local()
        self._lanes: list[_Lane] = []
        self._threads, self._over = threads or default_threads(), False
        self._pool = ThreadPoolExecutor(self._threads, "load", initializer=self._open_lane)

    def __enter__(self) -> Self:
        if self._staged:  # pinning memory takes a while, in which the first layer is worked out
            for _ in range(self._threads):
                self._pool.submit(lambda: self._mine.lane.reserve(PIECE_BYTES))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # INVARIANT: nobody writes to a destination after this, so that it may be freed.
        self._over = True
        self._pool.shutdown(cancel_futures=True)
        self._arrive()

    def start(self, transfers: Iterable[Transfer], moved: Callable[[int], None]) -> Callable[[], None]:
        """Start all of `transfers` and give a function that waits for the last byte and raises the first error.

        `moved` is told the bytes of each piece, from the thread that carried it.
        """
        # Destinations may be memory that work already queued on the device still reads.
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        left = iter(pieces(transfers))  # whoever is done takes the next: no future, and no lock, for each

        def carry() -> None:
            lane = self._mine.lane
            lane.wait_for(ready)
            for piece in left:
                if self._over:
                    return
                lane.carry(piece)
                moved(sum(transfer.into.nbytes for transfer in piece))

        futures = [self._pool.submit(carry) for _ in range(self._threads)]

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


def pieces(transfers: Iterable[Transfer]) -> Sequence[Piece]:
    """All that is to be read, in the order of the files, so that each shard is read once, from front to back."""
    found: list[list[Transfer]] = []
    shard, end, room = "", -1, 0
    ordered = sorted(transfers, key=lambda transfer: (transfer.info.shard, transfer.start))
    for part in (part for transfer in ordered for part in _split(transfer)):
        start, nbytes, whole = part.start, part.into.nbytes, part.source.is_contiguous()
        if not (whole and start == end and part.info.shard == shard and nbytes <= room):
            found.append([])
            room = PIECE_BYTES
        found[-1].append(part)
        shard, end = part.info.shard, start + nbytes if whole else -1
        room -= _padded(nbytes)
    return found


def _split(transfer: Transfer) -> Iterator[Transfer]:
    """By rows into what fits a piece; all of it where rows run across each other, nothing of what is empty."""
    source, into = transfer.source, transfer.into
    if into.nbytes <= PIECE_BYTES or not into.dim() or not _is_by_rows(source):
        if into.nbytes:
            yield transfer
        return
    step = max(1, PIECE_BYTES * len(into) // into.nbytes)
    for first in range(0, len(into), step):
        yield Transfer(transfer.info, source[first : first + step], into[first : first + step])


class _Lane:
    """What one thread has: a small buffer, and where bytes are staged two pieces, which take turns, and a stream."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, staged: bool) -> None:
        self._checkpoint, self._staged = checkpoint, staged
        self._scratch = Scratch()
        self._on_gpu = device.type == "cuda"
        self._pieces: Sequence[Tensor] = ()
        self._copied: list[torch.cuda.Event] = []
        self._turn = 0
        if self._on_gpu:
            self._stream = torch.cuda.Stream(device)
            torch.cuda.set_stream(self._stream)  # of this thread alone
            self._copied = [torch.cuda.Event(), torch.cuda.Event()]

    def wait_for(self, ready: torch.cuda.Event | None) -> None:
        """Send nothing before `ready`."""
        if ready is not None:
            self._stream.wait_event(ready)

    def carry(self, piece: Piece) -> None:
        """Read a piece; it has arrived once the lane is finished."""
        into = [transfer.into for transfer in piece]
        if not self._staged:
            read_piece(self._checkpoint, piece, into, self._scratch)
            return
        here = self._twins(into)
        read_piece(self._checkpoint, piece, here, self._scratch)
        torch._foreach_copy_(into, here, non_blocking=self._on_gpu)  # one call for all: the lock is taken once
        if self._on_gpu:
            self._copied[self._turn].record(self._stream)

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        if self._on_gpu:
            self._stream.synchronize()

    def reserve(self, nbytes: int) -> None:
        """Have pieces of at least so many bytes."""
        if not self._pieces or len(self._pieces[0]) < nbytes:
            self.finish()
            size = max(nbytes, PIECE_BYTES)
            self._pieces = torch.empty((2, size), dtype=torch.uint8, pin_memory=self._on_gpu).unbind()

    def _twins(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like these in the piece that was sent longer ago, once that has arrived."""
        *places, nbytes = accumulate((_padded(tensor.nbytes) for tensor in tensors), initial=0)
        self.reserve(nbytes)
        self._turn = 1 - self._turn
        if self._on_gpu:
            self._copied[self._turn].synchronize()
        piece = self._pieces[self._turn]
        return [
            piece[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for place, tensor in zip(places, tensors, strict=True)
        ]


class Scratch:
    """Memory of one thread for what is read and then cut; it grows with the largest piece."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def of(self, nbytes: int) -> Tensor:
        """So many bytes, whose content is whatever it was."""
        if self._memory is None or len(self._memory) < nbytes:
            self._memory = torch.empty(max(SCRATCH_BYTES, nbytes), dtype=torch.uint8)
        return self._memory[:nbytes]


def read_piece(checkpoint: Checkpoint, piece: Piece, targets: Sequence[Tensor], scratch: Scratch | None = None) -> None:
    """Fill `targets`, contiguous on the CPU, with the numbers that the sources of `piece` show."""
    first = piece[0]
    if first.source.is_contiguous():
        infos = [transfer.info for transfer in piece]
        checkpoint.read_into(infos, first.start, [bytes_of(target) for target in targets])
    else:
        _read_strided(checkpoint, first, targets[0], scratch or Scratch())


def _read_strided(checkpoint: Checkpoint, transfer: Transfer, target: Tensor, scratch: Scratch) -> None:
    source, strides = transfer.source, transfer.source.stride()
    size = source.element_size()
    for first in range(0, len(target), step := _rows_at_once(source)):
        part = target[first : first + step]
        extent = 1 + sum((count - 1) * stride for count, stride in zip(part.shape, strides, strict=True))
        raw = scratch.of(extent * size)
        checkpoint.read_into([transfer.info], transfer.start + first * strides[0] * size, [bytes_of(raw)])
        part.copy_(raw.view(source.dtype).as_strided(part.shape, strides))


def _rows_at_once(source: Tensor) -> int:
    """Rows to read in one go, with what lies between them; all, where rows run across each other."""
    if not _is_by_rows(source):
        return len(source)
    columns = source.numel() // len(source)
    return max(1, min(SCRATCH_BYTES // (source.stride(0) * source.element_size()), LARGEST_SERIAL_COPY // columns))


def _is_by_rows(source: Tensor) -> bool:
    return source.dim() < 2 or source.stride(0) >= source.stride(1)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
