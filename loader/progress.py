"""How a long load is shown: a bar with GB/s to a person at a terminal, events to everyone else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BAR_AFTER_SECONDS = 1.0
EVENT_EVERY_SECONDS = 10.0


@contextmanager
def progress(total_bytes: int, what: str) -> Iterator[Callable[[int], None]]:
    """Give a function to be told of bytes that have arrived, from any thread.

    On a terminal a bar appears on stderr after a second; elsewhere ``load.progress`` is logged every ten, with
    ``bytes``, ``total_bytes`` and ``gb_per_second`` (10**9 bytes).
    """
    meter = _Bar(total_bytes, what) if sys.stderr.isatty() else _Events(total_bytes, what)
    try:
        yield meter
    finally:
        meter.close()


class _Meter:
    def __init__(self, total_bytes: int, what: str, pause_seconds: float) -> None:
        self.total_bytes, self.what, self.pause_seconds = total_bytes, what, pause_seconds
        self.moved_bytes = 0
        self.started = time.monotonic()
        self._next = self.started + pause_seconds
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self.moved_bytes += nbytes
            now = time.monotonic()
            if now >= self._next:
                self._next = now + self.pause_seconds
                self.show(self.moved_bytes / 1e9 / (now - self.started))

    def show(self, gb_per_second: float) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more will come."""


class _Events(_Meter):
    def __init__(self, total_bytes: int, what: str) -> None:
        super().__init__(total_bytes, what, EVENT_EVERY_SECONDS)

    def show(self, gb_per_second: float) -> None:
        import structlog

        structlog.get_logger("loader").info(
            "load.progress",
            runner=self.what,
            bytes=self.moved_bytes,
            total_bytes=self.total_bytes,
            gb_per_second=round(gb_per_second, 3),
        )


class _Bar(_Meter):
    def __init__(self, total_bytes: int, what: str) -> None:
        super().__init__(total_bytes, what, BAR_AFTER_SECONDS)
        self._bar: Any = None

    def show(self, gb_per_second: float) -> None:
        if self._bar is None:
            self._open()
        self._bar.update(self._task, completed=self.moved_bytes, rate=f"{gb_per_second:.1f} GB/s")

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.pause_seconds = 0.2
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(f"loading {self.what}", total=self.total_bytes, rate="")
        self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
