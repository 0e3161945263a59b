"""No file can crash the reader, hang it, or lead it outside its folder; and the safetensors library agrees with it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors
from hypothesis import given, note, settings
from hypothesis import strategies as st

from gatekeeper import CheckpointError, FactError
from gatekeeper.checkpoint import TensorInfo, read_header, read_index
from gatekeeper.files import Unreadable
from tests.hostile import corpus, fuzz
from tests.shipped import read
from tests.tiny import write_shards

STRICTER = (
    "is there twice",  # the library takes the last of two entries in silence
    "needs exactly dtype, shape and data_offsets",  # it passes over other keys, and takes lists for entries
    "`__metadata__` is not a mapping of strings",  # it takes null, and then there is none
    "no short list of sizes",  # it has no limit of dimensions, and counts to 2**64
    "no pair of byte positions",
    "beyond 64 bits",  # it multiplies the sizes first, so that a zero saves it
)
"""What we refuse and the library does not, by a part of the message."""


def headers_are_read_as_the_library_reads_them(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    ours: dict[str, TensorInfo] | str
    try:
        ours = read_header(path, path.name)
    except Unreadable as bad:
        ours = str(bad)
    try:
        theirs = {name: (one["dtype"], tuple(one["shape"])) for name, one in safetensors.deserialize(raw)}
    except safetensors.SafetensorError as error:
        note(f"{raw!r}: {error}")
        assert isinstance(ours, str), "the library refuses it"
        assert ours.strip()
        return
    note(f"{raw!r}: {ours}")
    if isinstance(ours, str):
        assert any(reason in ours for reason in STRICTER)
        return
    assert {name: (info.dtype, info.shape) for name, info in ours.items()} == theirs
    for info in ours.values():
        assert 8 <= info.start <= info.end <= len(raw)


class Watch:
    """Notes every file that this process opens; an audit hook can't be taken off again, so there is one for all."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        "".encode("unicode_escape")  # Python opens files of its own when it first needs a codec
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.opened is not None and not isinstance(arguments[0], int):
            self.opened.append(os.fsdecode(arguments[0]))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A sound folder with ways out of it."""
    with tempfile.TemporaryDirectory() as out:
        home = Path(out).resolve() / "folder"
        write_shards(home, {f"{name}.safetensors": {name: ("U8", (2,))} for name in "ab"})
        write_shards(home.parent, {"out.safetensors": {"a": ("U8", (2,))}}, index=False)
        (home / "link.safetensors").symlink_to("../out.safetensors")
        (home / "circle.safetensors").symlink_to("circle.safetensors")
        (home / "sub.safetensors").mkdir()
        (home / "sub").mkdir()
        (home / "sub" / "link").symlink_to("../..")
        os.mkfifo(home / "pipe.safetensors")
        yield home


def indexes_stay_in_the_folder(folder: Path, watch: Watch, raw: bytes) -> None:
    (folder / corpus.INDEX).write_bytes(raw)
    watch.opened = []
    faults: tuple[str, ...] = ()
    try:
        found = read_index(folder)
        assert found is not None
        assert {info.shard for info in found.tensors.values()} <= {"a.safetensors", "b.safetensors", "./a.safetensors"}
    except CheckpointError as error:
        faults = error.faults
    finally:
        opened, watch.opened = watch.opened, None
    assert all(fault.isprintable() for fault in faults)
    assert opened
    for path in opened:
        assert Path(path).resolve().is_relative_to(folder), path


def configs_are_read_or_refused(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    message = ""
    try:
        read(path)
    except (CheckpointError, FactError) as error:
        message = str(error)
    assert message.isprintable()


SEEDS = st.integers(0, 2**64 - 1)
Check = Callable[[int], None]


@pytest.fixture
def checks(folder: Path, watch: Watch) -> Mapping[str, Check]:
    """What is made of a number, read, and compared with what must be."""
    out = folder.parent

    def header(seed: int) -> None:
        headers_are_read_as_the_library_reads_them(out / "one.safetensors", fuzz.shards(Random(seed)))

    def index(seed: int) -> None:
        indexes_stay_in_the_folder(folder, watch, fuzz.indexes(Random(seed), str(out / "out.safetensors")))

    def config(seed: int) -> None:
        configs_are_read_or_refused(out / "config.json", fuzz.configs(Random(seed)))

    return {"header": header, "index": index, "config": config}


@pytest.mark.parametrize("kind", ["header", "index", "config"])
def test_some(checks: Mapping[str, Check], kind: str) -> None:
    settings(max_examples=300)(given(seed=SEEDS)(checks[kind]))()


@pytest.mark.fuzz
@pytest.mark.parametrize(("kind", "cases"), [("header", 100_000), ("index", 100_000), ("config", 10_000)])
def test_many(checks: Mapping[str, Check], kind: str, cases: int) -> None:
    settings(max_examples=cases)(given(seed=SEEDS)(checks[kind]))()
