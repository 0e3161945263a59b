"""A bar to a person, events to everyone else; from any thread."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from structlog.testing import capture_logs

import loader.progress
from loader.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_events_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.progress, "EVENT_EVERY_SECONDS", 0.0)
    with capture_logs() as events, progress(400, "target") as moved, ThreadPoolExecutor(4) as pool:
        list(pool.map(moved, [100] * 4))
    assert [event["bytes"] for event in events] == [100, 200, 300, 400]
    assert all(event["event"] == "load.progress" and event["total_bytes"] == 400 for event in events)
    assert all(event["gb_per_second"] >= 0 and event["runner"] == "target" for event in events)


def test_a_short_load_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    for stderr in (terminal, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        with capture_logs() as events, progress(400, "target") as moved:
            moved(400)
        assert events == [] and stderr.getvalue() == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(loader.progress, "BAR_AFTER_SECONDS", 0.0)
    with capture_logs() as events, progress(4_000_000_000, "draft") as moved:
        moved(2_000_000_000)
    assert "loading draft" in terminal.getvalue() and "GB/s" in terminal.getvalue() and events == []
