"""Commands that time something on one device take turns: what runs beside the other would change what it reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from loader.bench.timing import settle
from loader.errors import BenchError

Left = Callable[[], AbstractContextManager[None]]
"""`Turn.left` of whose turn it is, or nothing like it: entered while nothing is timed."""


class Turn:
    """To be entered before the device is used; commands with the same folder of temporary files share one for it.

    They share its time alone: each keeps its memory while it waits.
    """

    def __init__(self, path: Path, say: Callable[[str], object] = lambda text: click.echo(text, err=True)) -> None:
        """`path`: of the device's file, which is made; `say`: how to tell, once, that another has the device."""
        self.path, self.say = path, say
        self._file: int | None = None
        self._said = False

    @classmethod
    def of_device(cls, **how: Any) -> Turn:
        """Of the current GPU."""
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return cls(Path(tempfile.gettempdir(), f"moe-loader-{uuid}.lock"), **how)

    def __enter__(self) -> Turn:
        self._file = _opened(self.path)
        try:
            self._take()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @contextmanager
    def left(self) -> Iterator[None]:
        """Others may have the device until the block ends, which then waits for it again; what fails in it does not."""
        import fcntl

        assert self._file is not None, "a turn is left by the one who has it"
        settle()
        torch.cuda.empty_cache()
        fcntl.flock(self._file, fcntl.LOCK_UN)
        try:
            yield
        except BaseException:
            self._end()
            raise
        self._take()

    def _take(self) -> None:
        import fcntl  # of Unix, as Triton is

        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not self._said:
                self.say("another command times something on this GPU: this one takes turns with it")
                self._said = True
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def _end(self) -> None:
        if self._file is not None:
            os.close(self._file)  # which lets go of it
            self._file = None


def _opened(path: Path) -> int:
    """For reading, which is enough to lock it: it may be another user's, and then may not be opened to be made."""
    how = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # whatever else may stand there
    try:
        try:
            return os.open(path, how)
        except FileNotFoundError:
            made = os.open(path, how | os.O_CREAT)
            os.fchmod(made, 0o444)  # for all users, whatever the umask is
            return made
    except OSError as error:
        raise BenchError(
            f"`{path}`, by which commands on one GPU take turns, can't be opened: {error.strerror}; delete it, or set "
            "TMPDIR to another folder"
        ) from None
