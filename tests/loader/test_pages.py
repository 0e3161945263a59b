"""Memory whose pages are made before it is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loader import pages

NBYTES = 64 << 20


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    pages._madvise.cache_clear()
    yield
    pages._madvise.cache_clear()


def resident() -> int:
    """Anonymous bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(sys.platform != "linux", reason="MADV_POPULATE_WRITE is Linux's")
def test_all_pages_are_there_and_keep_what_they_have() -> None:
    if pages._madvise() is None:
        pytest.skip("this kernel has no MADV_POPULATE_WRITE (Linux 5.14)")
    memory = torch.empty(NBYTES, dtype=torch.uint8)
    part = memory[4097 : NBYTES // 2]  # begins and ends within pages
    memory[4000:5000] = 7
    before = resident()
    pages.populate(part)
    slack = 4 << 20  # a huge page may have been there already
    assert NBYTES // 2 - slack <= resident() - before <= NBYTES // 2 + slack
    assert bool((memory[4000:5000] == 7).all())
    assert not memory[5000 : NBYTES // 2].any()


def test_little_memory_is_not_worth_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *call: calls.append(call))
    for nbytes in (0, pages.LEAST_BYTES - 1, pages.LEAST_BYTES):
        pages.populate(torch.empty(nbytes, dtype=torch.uint8))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["POPULATE_WRITE", "platform"])
def test_a_system_that_does_not_know_it_goes_on_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "platform":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(pages, "POPULATE_WRITE", 9999)
    assert pages._madvise() is None
    memory = torch.ones(NBYTES, dtype=torch.uint8)
    pages.populate(memory)
    assert bool(memory.all())
