"""Whole tensors, rows and columns, through every way that bytes can take."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loader.transfer
from gatekeeper import CheckpointError, read_index
from loader.checkpoint import Checkpoint
from loader.shards import write_shards
from loader.transfer import Transfer, Transfers

CPU = torch.device("cpu")
MATRIX = torch.arange(37 * 24, dtype=torch.int32).reshape(37, 24)
TENSORS = {"matrix": MATRIX, "line": torch.arange(5.0), "one": torch.tensor(7.0), "nothing": torch.zeros(0, 4)}
Cut = Callable[[Tensor], Tensor]
CUTS: dict[str, Cut] = {
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


def view(name: str, cut: Cut = CUTS["all"]) -> Tensor:
    """What `cut` makes of a tensor, where nothing is in it."""
    return cut(torch.empty(TENSORS[name].shape, dtype=TENSORS[name].dtype, device="meta"))


def moved(checkpoint: Checkpoint, name: str, cut: Cut, *, staged: bool) -> Tensor:
    source = view(name, cut)
    into = torch.full(source.shape, -1, dtype=source.dtype)
    with checkpoint, Transfers(checkpoint, CPU, threads=2, staged=staged) as transfers:
        transfers.start([Transfer(checkpoint.info(name), source, into)], lambda _: None)()
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


def test_the_first_error_is_raised_and_nothing_is_written_after_that(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, begun = Checkpoint.read_into, threading.Event()

    def failing(self: Checkpoint, info: object, first_byte: int, memory: memoryview) -> None:
        if begun.is_set():
            read(self, info, first_byte, memory)  # type: ignore[arg-type]
        begun.set()
        raise CheckpointError("torn")

    monkeypatch.setattr(Checkpoint, "read_into", failing)
    into = [torch.zeros_like(MATRIX) for _ in range(200)]
    with checkpoint, Transfers(checkpoint, CPU, threads=2) as transfers:
        finish = transfers.start(
            [Transfer(checkpoint.info("matrix"), view("matrix"), each) for each in into], lambda _: None
        )
        with pytest.raises(CheckpointError, match="torn"):
            finish()
    now = [each.clone() for each in into]
    assert all(map(torch.equal, now, into))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


@pytest.mark.skipif(sys.platform != "linux", reason="the figure is read from /proc")
def test_several_threads_share_one_opened_shard(checkpoint: Checkpoint) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with checkpoint, Transfers(checkpoint, CPU, threads=4) as transfers:
        wanted = [Transfer(checkpoint.info("matrix"), view("matrix"), torch.empty_like(MATRIX)) for _ in range(50)]
        transfers.start(wanted, lambda _: None)()
        assert all(torch.equal(each.into, MATRIX) for each in wanted)
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.gpu
def test_pinned_pieces_to_a_gpu(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    monkeypatch.setattr(loader.transfer, "PIECE_BYTES", 200)
    into = [torch.empty(37, 3, dtype=torch.int32, device="cuda") for _ in range(100)]
    with checkpoint, Transfers(checkpoint, torch.device("cuda"), threads=4) as transfers:
        source = view("matrix", CUTS["columns"])
        transfers.start([Transfer(checkpoint.info("matrix"), source, each) for each in into], lambda _: None)()
        assert all(torch.equal(each.cpu(), MATRIX[:, 8:11]) for each in into)
