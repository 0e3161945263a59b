"""How a search is shown to a person at a terminal: which point it is at, and how many settings were timed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import click


class Shown:
    """What `loader.bench.tuning.tune` tells of its search; without a terminal only its lines appear."""

    def __init__(self, bar: Any = None, task: Any = None) -> None:
        self._bar, self._task = bar, task

    def point(self, text: str) -> None:
        """A point is searched for now."""
        if self._bar is not None:
            self._bar.update(self._task, description=text, tried=0)

    def tried(self) -> None:
        """One more setting of it was timed."""
        if self._bar is not None:
            self._bar.update(self._task, tried=self._bar.tasks[0].fields["tried"] + 1)

    def found(self) -> None:
        """That point is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def say(self, text: str) -> None:
        """A line on stdout, with the bar out of its way."""
        with _away(self._bar) if self._bar is not None else nullcontext():
            click.echo(text)


@contextmanager
def shown(points: int) -> Iterator[Shown]:
    """A bar on stderr over so many points, if that is a terminal."""
    if not sys.stderr.isatty():
        yield Shown()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tried]} settings timed"),
        TimeElapsedColumn(),
    )
    # Lines go to stdout as they are, which rich would take for itself.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
    with bar:
        yield Shown(bar, bar.add_task("tuning", total=points, tried=0))


@contextmanager
def _away(bar: Any) -> Iterator[None]:
    bar.stop()
    try:
        yield
    finally:
        bar.start()
