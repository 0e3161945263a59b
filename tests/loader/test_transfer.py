"""Whole tensors, rows and columns, through every way that bytes can take."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import loader.checkpoint
import loader.transfer
from gatekeeper import CheckpointError, TensorInfo, read_index
from loader.checkpoint import DTYPES, Checkpoint
from loader.shards import write_shards
from loader.transfer import Extent, Transfer, Transfers, pieces

CPU = torch.device("cpu")
MATRIX = torch.arange(37 * 24, dtype=torch.int32).reshape(37, 24)
TENSORS = {"matrix": MATRIX, "line": torch.arange(5.0), "one": torch.tensor(7.0), "nothing": torch.zeros(0, 4)}
Chooser = Callable[[Tensor], Tensor]
CUTS: dict[str, Chooser] = {
    "all": lambda matrix: matrix,
    "rows": lambda matrix: matrix[3:20],
    "columns": lambda matrix: matrix[:, 8:11],
    "one": lambda matrix: matrix[36:37, 23:24],
    "block": lambda matrix: matrix[5:36, 1:24],
    "every other row": lambda matrix: matrix[1::2],
    "some of every third": lambda matrix: matrix[::3, 4:9],
    "transposed": lambda matrix: matrix.T,
    "some of it transposed": lambda matrix: matrix.T[2:20:2, 7:30],
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    write_shards(tmp_path, [TENSORS], 1)
    index = read_index(tmp_path)
    assert index is not None
    return Checkpoint(index)


def view(name: str, cut: Chooser = CUTS["all"]) -> Tensor:
    """What `cut` makes of a tensor, where nothing is in it."""
    return cut(torch.empty(TENSORS[name].shape, dtype=TENSORS[name].dtype, device="meta"))


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


def to(info: TensorInfo, source: Tensor, into: Tensor) -> Transfer:
    """What `source` shows goes into a tensor like it."""
    return Transfer(info, Extent.of(source), as_bytes(into))


def moved(checkpoint: Checkpoint, name: str, cut: Chooser, *, staged: bool) -> Tensor:
    source = view(name, cut)
    into = torch.full(source.shape, -1, dtype=source.dtype)
    with checkpoint, Transfers(checkpoint, CPU, threads=2, staged=staged) as transfers:
        transfers.start([to(checkpoint.info(name), source, into)], lambda _: None)()
    return into


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
@pytest.mark.parametrize(("piece", "scratch"), [(8 << 20, 1 << 20), (200, 100), (1, 1)], ids=["large", "small", "tiny"])
def test_anything_cut_out_arrives_by_any_way(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, staged: bool, piece: int, scratch: int
) -> None:
    monkeypatch.setattr(loader.transfer, "PIECE_BYTES", piece)
    monkeypatch.setattr(loader.transfer, "SCRATCH_BYTES", scratch)
    for name, cut in CUTS.items():
        assert torch.equal(moved(checkpoint, "matrix", cut, staged=staged), cut(MATRIX)), name
    for name in ("line", "one", "nothing"):
        assert torch.equal(moved(checkpoint, name, CUTS["all"], staged=staged), TENSORS[name])


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
@pytest.mark.parametrize("cut", ["all", "columns"])
def test_pages_of_what_is_read_into_are_made_before(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, cut: str, staged: bool
) -> None:
    """All that a load writes on the CPU is new memory; what is staged is written by a copy."""
    made: list[Tensor] = []
    monkeypatch.setattr(loader.transfer, "populate", made.append)
    found = moved(checkpoint, "matrix", CUTS[cut], staged=staged)
    assert [each.nbytes for each in made] == ([] if staged else [found.nbytes])


def test_the_first_error_is_raised_and_nothing_is_written_after_that(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, begun = Checkpoint.read_into, threading.Event()

    def failing(self: Checkpoint, *what: object) -> None:
        if begun.is_set():
            read(self, *what)  # type: ignore[arg-type]
        begun.set()
        raise CheckpointError("torn")

    monkeypatch.setattr(Checkpoint, "read_into", failing)
    into = [torch.zeros_like(MATRIX) for _ in range(200)]
    with checkpoint, Transfers(checkpoint, CPU, threads=2) as transfers:
        finish = transfers.start([to(checkpoint.info("matrix"), view("matrix"), each) for each in into], lambda _: None)
        with pytest.raises(CheckpointError, match="torn"):
            finish()
    now = [each.clone() for each in into]
    assert all(map(torch.equal, now, into))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


def test_after_an_error_no_thread_takes_another_piece(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, over = [], threading.Event()

    def failing(self: Checkpoint, *what: object) -> None:
        reads.append(what)
        if len(reads) == 1:
            raise CheckpointError("torn")
        over.wait()

    monkeypatch.setattr(Checkpoint, "read_into", failing)
    exit_, waits = Transfers.__exit__, [to(checkpoint.info("matrix"), view("matrix"), MATRIX) for _ in range(9)]

    def released(self: Transfers, *error: object) -> None:
        threading.Timer(0.1, over.set).start()
        exit_(self, *error)  # type: ignore[arg-type]

    monkeypatch.setattr(Transfers, "__exit__", released)
    with pytest.raises(CheckpointError, match="torn"), Transfers(checkpoint, CPU, threads=2) as transfers:
        transfers.start(waits, lambda _: None)()
    assert len(reads) <= 2, "the one that failed, and one that was under way"


@pytest.mark.skipif(sys.platform != "linux", reason="the figure is read from /proc")
def test_several_threads_share_one_opened_shard(checkpoint: Checkpoint) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with checkpoint, Transfers(checkpoint, CPU, threads=4) as transfers:
        wanted = [to(checkpoint.info("matrix"), view("matrix"), torch.empty_like(MATRIX)) for _ in range(50)]
        transfers.start(wanted, lambda _: None)()
        assert all(torch.equal(each.into, as_bytes(MATRIX)) for each in wanted)
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# -- neighbours -----------------------------------------------------------------------------------------------------


@pytest.fixture
def neighbours(tmp_path: Path) -> Checkpoint:
    """Tensors of 1 to 40 elements and of several item sizes, so that some lie where no item of theirs is aligned."""
    dtypes = (torch.uint8, torch.int32, torch.bfloat16, torch.int64, torch.float8_e4m3fn)
    draw = torch.Generator().manual_seed(0)
    shapes = [(1 + i % 5, 1 + i % 8) for i in range(60)]
    numbers = [torch.randint(0, 100, shape, generator=draw) for shape in shapes]
    tensors = {f"t{i:02d}": each.to(dtypes[i % 5]) for i, each in enumerate(numbers)}
    write_shards(tmp_path, [dict(list(tensors.items())[first : first + 20]) for first in (0, 20, 40)], 3)
    index = read_index(tmp_path)
    assert index is not None
    return Checkpoint(index)


@st.composite
def wishes(draw: st.DrawFn) -> list[tuple[str, Chooser]]:
    """Some of the tensors in any order, some of them twice, most of them whole: what is not named is a gap."""
    cuts = st.sampled_from(
        [*[CUTS["all"]] * 4, *(CUTS[n] for n in ("every other row", "transposed")), lambda t: t[:, 1:]]
    )
    return draw(st.lists(st.tuples(st.integers(0, 59).map("t{:02d}".format), cuts), max_size=80))


@given(
    wishes(),
    st.sampled_from([1, 64, 200, 8 << 20]),
    st.sampled_from([1, 50, 1 << 20]),
    st.booleans(),
    st.integers(1, 3),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_wanted_arrives_as_if_it_were_fetched(
    neighbours: Checkpoint, wanted: list[tuple[str, Chooser]], piece: int, scratch: int, staged: bool, threads: int
) -> None:
    transfers, expected = [], []
    for name, cut in wanted:
        info = neighbours.info(name)
        source = cut(torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta"))
        transfers.append(to(info, source, torch.zeros(source.shape, dtype=source.dtype)))
        expected.append(cut(neighbours.fetch(name)))
    counted: list[int] = []
    with (
        pytest.MonkeyPatch.context() as patch,
        Transfers(neighbours, CPU, threads=threads, staged=staged) as carried,
    ):
        patch.setattr(loader.transfer, "PIECE_BYTES", piece)
        patch.setattr(loader.transfer, "SCRATCH_BYTES", scratch)
        carried.start(transfers, counted.append)()
    for transfer, there in zip(transfers, expected, strict=True):
        assert torch.equal(transfer.into, as_bytes(there.contiguous()))
    assert sum(counted) == sum(there.nbytes for there in expected)


def whole(checkpoint: Checkpoint, *names: str) -> list[Transfer]:
    infos = [checkpoint.info(name) for name in names]
    empties = [torch.empty(info.shape, dtype=DTYPES[info.dtype]) for info in infos]
    return [to(info, each.to("meta"), each) for info, each in zip(infos, empties, strict=True)]


def test_what_lies_side_by_side_is_one_piece(neighbours: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(*names: str) -> list[list[str]]:
        return [[info.name for info in piece.infos] for piece in pieces(whole(neighbours, *names))]

    assert joined("t02", "t00", "t01") == [["t00", "t01", "t02"]], "in the order of the file"
    assert joined("t00", "t02") == [["t00"], ["t02"]], "there is something else between them"
    assert joined("t19", "t20") == [["t19"], ["t20"]], "a shard ends there"
    assert joined("t07", "t07", "t08") == [["t07"], ["t07", "t08"]], "one that is wanted twice is read twice"
    monkeypatch.setattr(loader.transfer, "PIECE_BYTES", 17)
    assert joined("t00", "t01", "t02") == [["t00", "t01"], ["t02"], ["t02"]], "it is full, and what is larger is cut"


class Calls(TorchDispatchMode):
    """What is called of torch in this thread."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_of_pieces_alike_only_the_first_are_worked_out(neighbours: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    carry, names = loader.transfer._Lane.carry, list[str]()

    def counted(self: Any, piece: Any) -> None:
        with Calls(names):
            carry(self, piece)

    monkeypatch.setattr(loader.transfer._Lane, "carry", counted)
    monkeypatch.setattr(loader.transfer, "PIECE_BYTES", 35)
    wanted = [each for _ in range(50) for each in whole(neighbours, "t00", "t01", "t02")]
    with neighbours, Transfers(neighbours, CPU, threads=1, staged=True) as transfers:
        transfers.start(wanted, lambda _: None)()
        n_pieces = len(pieces(wanted))
        assert all(torch.equal(each.into, as_bytes(neighbours.fetch(each.info.name))) for each in wanted)
    copies = names.count("aten._foreach_copy_.default")
    assert copies == n_pieces > 100
    kinds = {tuple(piece.sizes) for piece in pieces(wanted)}
    cuts = 2 * len(kinds)
    assert len(names) - copies <= cuts, "a call into torch for each piece is what made loading slow"


def test_more_neighbours_than_one_call_takes(neighbours: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.checkpoint, "MOST_MEMORIES_A_READ", 3)
    wanted = whole(neighbours, *(f"t{i:02d}" for i in range(20)))
    with neighbours, Transfers(neighbours, CPU, threads=1) as transfers:
        transfers.start(wanted, lambda _: None)()
        assert all(torch.equal(each.into, as_bytes(neighbours.fetch(each.info.name))) for each in wanted)


def test_reads_that_come_short_go_on(neighbours: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def short(file: int, memories: list[memoryview], position: int) -> int:
        most = 7  # bytes, as a file system on a network may do
        return preadv(file, [memory[:most] for memory in memories[:1]], position)

    monkeypatch.setattr(os, "preadv", short)
    wanted = whole(neighbours, *(f"t{i:02d}" for i in range(20)))
    with neighbours, Transfers(neighbours, CPU, threads=1) as transfers:
        transfers.start(wanted, lambda _: None)()
        assert all(torch.equal(each.into, as_bytes(neighbours.fetch(each.info.name))) for each in wanted)


def test_of_neighbours_the_one_that_was_cut_is_named(neighbours: Checkpoint) -> None:
    wanted = whole(neighbours, "t03", "t04", "t05")
    with neighbours, Transfers(neighbours, CPU, threads=1) as transfers:
        neighbours.fetch("t03")
        os.truncate(neighbours.index.folder / wanted[1].info.shard, wanted[1].info.end - 1)
        with pytest.raises(CheckpointError, match=r"`t04` ends at byte .* cut short while loading"):
            transfers.start(wanted, lambda _: None)()


@pytest.mark.gpu
def test_pinned_pieces_to_a_gpu(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    monkeypatch.setattr(loader.transfer, "PIECE_BYTES", 200)
    into = [torch.empty(37, 3, dtype=torch.int32, device="cuda") for _ in range(100)]
    with checkpoint, Transfers(checkpoint, torch.device("cuda"), threads=4) as transfers:
        source = view("matrix", CUTS["columns"])
        transfers.start([to(checkpoint.info("matrix"), source, each) for each in into], lambda _: None)()
        assert all(torch.equal(each.cpu(), MATRIX[:, 8:11]) for each in into)


@pytest.mark.gpu
def test_neighbours_of_which_some_stay_on_the_cpu(neighbours: Checkpoint) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    wanted = [
        Transfer(each.info, each.cut, each.into if i % 3 == 0 else each.into.cuda())
        for i, each in enumerate(whole(neighbours, *(f"t{i:02d}" for i in range(60))))
    ]
    with neighbours, Transfers(neighbours, torch.device("cuda"), threads=3) as transfers:
        transfers.start(wanted, lambda _: None)()
        assert all(torch.equal(each.into.cpu(), as_bytes(neighbours.fetch(each.info.name))) for each in wanted)
