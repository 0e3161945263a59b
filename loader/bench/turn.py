"""Commands that time something on one device take turns: what runs beside the other would change what it reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import click

from loader.bench.timing import settle

Left = Callable[[], AbstractContextManager[None]]
"""`Turn.left` of whose turn it is, or nothing like it: entered while nothing is timed."""


class Turn:
    """To be entered before the device is used; the commands of one machine that time something on it share a file."""

    def __init__(self, path: Path, say: Callable[[str], object] = lambda text: click.echo(text, err=True)) -> None:
        """`path`: of the device's file, which is made; `say`: how to tell that another command has the device."""
        self.path, self.say = path, say
        self._file: int | None = None

    @classmethod
    def of_device(cls) -> Turn:
        """Of the current GPU."""
        import torch

        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return cls(Path(tempfile.gettempdir(), f"moe-loader-{uuid}.lock"))

    def __enter__(self) -> Turn:
        self._file = _opened(self.path)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)  # which lets go of it
            self._file = None

    @contextmanager
    def left(self) -> Iterator[None]:
        """Others may have the device until the block ends, which then waits for it again."""
        import fcntl

        assert self._file is not None, "a turn is left by the one who has it"
        settle()
        fcntl.flock(self._file, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def _take(self) -> None:
        import fcntl  # of Unix, as Triton is

        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.say("another command times something on this GPU: this one takes turns with it")
            fcntl.flock(self._file, fcntl.LOCK_EX)


def _opened(path: Path) -> int:
    """For reading, which is enough to lock it: it may be another user's, and then may not be opened to be made."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
