"""Bytes of the files into the rows of slots; what lies side by side in a file and is wanted whole is read as one.

Read straight to where it goes, on the CPU; to a GPU through pinned memory, a piece to a thread: while one waits for its
copy, others read. Rows of which only some columns are wanted go through a small buffer first.

Each call into torch gives the interpreter's lock away and has to win it back from all other threads, which costs more
than the call. So everything here is bytes and plain numbers, and a thread makes two such calls for a piece: copy, wait.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gatekeeper import TensorInfo
from loader.checkpoint import Checkpoint, bytes_of
from loader.pages import populate

PIECE_BYTES = 8 << 20
"""What is read as one: large enough that what Python does for it is nothing, small enough to stay in the cache."""
SCRATCH_BYTES = 1 << 22
"""Rows of which only some columns are wanted, read whole and then cut: large enough for few calls, small enough for the
cache that cores share."""
LARGEST_SERIAL_COPY = 1 << 15
"""Elements up to which torch copies in the calling thread: ``at::internal::GRAIN_SIZE``. Here every core is busy."""
MOST_CUTS = 16
"""Ways to cut a staged piece that are kept: all experts are stored alike, so that a checkpoint has a few."""
MOST_THREADS = 16


@dataclass(frozen=True, slots=True)
class Extent:
    """Which numbers of a tensor are wanted; worked out once for all tensors of which the same is."""

    source: Tensor
    """On the meta device, a view of the tensor's data: shape, strides and offset say which numbers."""
    nbytes: int
    """All of them."""
    offset: int
    """Bytes of the tensor before the first number."""
    whole: bool
    """Whether nothing lies between them."""

    @classmethod
    def of(cls, source: Tensor) -> Self:
        """What `source` shows."""
        size = source.element_size()
        return cls(source, source.numel() * size, int(source.storage_offset()) * size, source.is_contiguous())


class Transfer(NamedTuple):
    """What of a tensor goes where; dtype and shape were compared before this was made."""

    info: TensorInfo
    """Where the bytes are in the file."""
    cut: Extent
    into: Tensor
    """On the device, as bytes: as many as `cut` has."""


@dataclass(slots=True)
class Piece:
    """What is read as one: bytes that lie one right behind the other in a shard and are all wanted, or one `source`."""

    shard: str
    start: int
    """Where the first byte, or the first number of `source`, is in the file."""
    nbytes: int
    """How many are wanted: the sum of `sizes`."""
    sizes: list[int]
    """Bytes of each of `into`."""
    infos: list[TensorInfo]
    into: list[Tensor]
    """What takes the bytes, in this order."""
    source: Tensor | None = None
    """Numbers with others between them; None: all bytes are wanted."""


def default_threads(*, staged: bool = False) -> int:
    """As many as this process may use cores, at most 16; of eight one less where they wait for a device.

    They wait without sleeping then, and the thread that plans the next layer needs a core, too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(cores, MOST_THREADS)
    return most - most // 8 if staged else most


class Transfers:
    """Threads that carry out transfers, each in a lane of its own; leave the context before freeing a destination."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, *, threads: int | None = None, staged: bool = False
    ) -> None:
        """`threads`: None for `default_threads`; `staged`: through pieces even to the CPU, as it is done to a GPU."""
        self._checkpoint, self._device = checkpoint, device
        self._staged = staged or device.type != "cpu"
        self._mine = threading.local()
        self._lanes: list[_Lane] = []
        self._threads, self._over = threads or default_threads(staged=self._staged), False
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
        for lane in self._lanes:  # of a piece that failed, some may have been sent
            lane.finish()

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
                moved(piece.nbytes)

        futures = [self._pool.submit(carry) for _ in range(self._threads)]

        def finish() -> None:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()

        return finish

    def _open_lane(self) -> None:
        self._mine.lane = _Lane(self._checkpoint, self._device, self._staged)
        self._lanes.append(self._mine.lane)


def pieces(transfers: Iterable[Transfer]) -> Sequence[Piece]:
    """All that is to be read, in the order of the files, so that each shard is read once, from front to back."""
    found: list[Piece] = []
    shard, end, room = "", 0, 0
    for part in sorted((part for transfer in transfers for part in _split(transfer)), key=_in_order):
        if part.start == end and part.nbytes <= room and part.source is None and part.info.shard == shard:
            last = found[-1]
            last.nbytes += part.nbytes
            last.sizes.append(part.nbytes)
            last.infos.append(part.info)
            last.into.append(part.into)
        else:
            shard, room = part.info.shard, PIECE_BYTES
            found.append(Piece(shard, part.start, part.nbytes, [part.nbytes], [part.info], [part.into], part.source))
        end, room = part.start + part.nbytes, room - part.nbytes if part.source is None else 0
    return found


class _Part(NamedTuple):
    """What fits a piece, of one transfer; see `Piece`."""

    start: int
    nbytes: int
    info: TensorInfo
    into: Tensor
    source: Tensor | None


def _in_order(part: _Part) -> tuple[str, int]:
    return part.info.shard, part.start


def _split(transfer: Transfer) -> Iterable[_Part]:
    """What fits a piece: so many bytes, or rows, or all of it where rows run across each other; nothing of nothing."""
    info, cut, into = transfer
    start, nbytes, whole, source = info.start + cut.offset, cut.nbytes, cut.whole, cut.source
    if nbytes <= PIECE_BYTES or not (whole or _is_by_rows(source)):
        return (_Part(start, nbytes, info, into, None if whole else source),) if nbytes else ()
    row_bytes = 1 if whole else nbytes // len(source)
    step = max(1, PIECE_BYTES // row_bytes) * row_bytes
    sizes = [min(step, nbytes - first) for first in range(0, nbytes, step)]
    found = []
    for first, size, part in zip(range(0, nbytes, step), sizes, into.split_with_sizes(sizes), strict=True):
        if whole:
            found.append(_Part(start + first, size, info, part, None))
        else:
            rows = Extent.of(source[first // row_bytes : (first + size) // row_bytes])
            found.append(_Part(info.start + rows.offset, size, info, part, rows.source))
    return found


class _Lane:
    """What one thread has: a small buffer, and where bytes are staged room for a piece, and a stream."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, staged: bool) -> None:
        self._checkpoint, self._staged = checkpoint, staged
        self._scratch = Scratch()
        self._memory = memoryview(b"")
        self._cut: Callable[[tuple[int, ...]], tuple[Tensor, ...]] = lambda _: ()
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._stream = torch.cuda.Stream(device)
            torch.cuda.set_stream(self._stream)  # of this thread alone

    def wait_for(self, ready: torch.cuda.Event | None) -> None:
        """Send nothing before `ready`."""
        if ready is not None:
            self._stream.wait_event(ready)

    def carry(self, piece: Piece) -> None:
        """Read a piece and send it; while this thread waits for that, others read."""
        if not self._staged:
            for part in piece.into:
                populate(part)
            self._read(piece, [bytes_of(part) for part in piece.into])
            return
        self.reserve(piece.nbytes)
        self._read(piece, [self._memory[: piece.nbytes]])
        torch._foreach_copy_(piece.into, self._cut(tuple(piece.sizes)), non_blocking=self._on_gpu)
        self.finish()

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        if self._on_gpu:
            self._stream.synchronize()

    def reserve(self, nbytes: int) -> None:
        """Have room for a piece of so many bytes."""
        if nbytes > len(self._memory):
            room = torch.empty(max(nbytes, PIECE_BYTES), dtype=torch.uint8, pin_memory=self._on_gpu)
            self._memory, self._cut = bytes_of(room), lru_cache(MOST_CUTS)(partial(_cut, room))

    def _read(self, piece: Piece, memories: Sequence[memoryview]) -> None:
        """Fill `memories`, one after the other, with what is wanted."""
        if piece.source is None:
            self._checkpoint.read_into(piece.infos, piece.start, memories)
        else:
            _read_strided(self._checkpoint, piece, piece.source, memories[0], self._scratch)


def _cut(memory: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Tensors of these bytes, side by side."""
    return tuple(memory[: sum(sizes)].split_with_sizes(sizes))


class Scratch:
    """Memory of one thread for what is read and then cut; it grows with the largest piece."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def of(self, nbytes: int) -> Tensor:
        """So many bytes, whose content is whatever it was."""
        if self._memory is None or len(self._memory) < nbytes:
            self._memory = torch.empty(max(SCRATCH_BYTES, nbytes), dtype=torch.uint8)
        return self._memory[:nbytes]


def _read_strided(checkpoint: Checkpoint, piece: Piece, source: Tensor, memory: memoryview, scratch: Scratch) -> None:
    target, strides = torch.frombuffer(memory, dtype=source.dtype).view(source.shape), source.stride()
    size = source.element_size()
    for first in range(0, len(target), step := _rows_at_once(source)):
        part = target[first : first + step]
        extent = 1 + sum((count - 1) * stride for count, stride in zip(part.shape, strides, strict=True))
        raw = scratch.of(extent * size)
        checkpoint.read_into(piece.infos, piece.start + first * strides[0] * size, [bytes_of(raw)])
        cut = raw.view(source.dtype).as_strided(part.shape, strides)
        # One call of torch, but a copy for each of these: it would share out a larger one between threads.
        rows = max(1, LARGEST_SERIAL_COPY // (part.numel() // len(part)))
        torch._foreach_copy_(part.split(rows), cut.split(rows))


def _rows_at_once(source: Tensor) -> int:
    """Rows to read in one go, with what lies between them; all, where rows run across each other."""
    if not _is_by_rows(source):
        return len(source)
    return max(1, SCRATCH_BYTES // (source.stride(0) * source.element_size()))


def _is_by_rows(source: Tensor) -> bool:
    return source.dim() < 2 or source.stride(0) >= source.stride(1)
