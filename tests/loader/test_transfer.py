"""Whole tensors, rows and columns, through every way that bytes can take."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loader.transfer
from gatekeeper import CheckpointError, read_index
from loader.accounts import Block
from loader.checkpoint import Checkpoint
from loader.shards import write_shards
from loader.transfer import Transfer, Transfers

CPU = torch.device("cpu")
MATRIX = torch.arange(37 * 24, dtype=torch.int32).reshape(37, 24)
TENSORS = {"matrix": MATRIX, "line": torch.arange(5.0), "one": torch.tensor(7.0), "nothing": torch.zeros(0, 4)}
BLOCKS: list[Block | None] = [
    None,
    ((0, 37), (0, 24)),
    ((3, 20), (0, 24)),
    ((0, 37), (8, 11)),
    ((36, 37), (23, 24)),
    ((5, 36), (1, 24)),
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    write_shards(tmp_path, [TENSORS], 1)
    index = read_index(tmp_path)
    assert index is not None
    return Checkpoint(index)


def moved(checkpoint: Checkpoint, name: str, block: Block | None, *, staged: bool) -> Tensor:
    tensor = TENSORS[name]
    shape = tensor.shape if block is None else [last - first for first, last in block]
    into = torch.full(tuple(shape), -1, dtype=tensor.dtype)
    with checkpoint, Transfers(checkpoint, CPU, threads=2, staged=staged) as transfers:
        transfers.start([Transfer(checkpoint.info(name), block, into)], lambda _: None)()
    return into


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
@pytest.mark.parametrize(("piece", "scratch"), [(8 << 20, 1 << 20), (200, 100), (1, 1)], ids=["large", "small", "tiny"])
def test_any_block_arrives_by_any_way(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, staged: bool, piece: int, scratch: int
) -> None:
    monkeypatch.setattr(loader.transfer, "PIECE_BYTES", piece)
    monkeypatch.setattr(loader.transfer, "SCRATCH_BYTES", scratch)
    for block in BLOCKS:
        (top, bottom), (left, right) = block or ((0, 37), (0, 24))
        assert torch.equal(moved(checkpoint, "matrix", block, staged=staged), MATRIX[top:bottom, left:right])
    for name in ("line", "one", "nothing"):
        assert torch.equal(moved(checkpoint, name, None, staged=staged), TENSORS[name])


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
        finish = transfers.start([Transfer(checkpoint.info("matrix"), None, each) for each in into], lambda _: None)
        with pytest.raises(CheckpointError, match="torn"):
            finish()
    now = [each.clone() for each in into]
    assert all(map(torch.equal, now, into))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


@pytest.mark.skipif(sys.platform != "linux", reason="the figure is read from /proc")
def test_several_threads_share_one_opened_shard(checkpoint: Checkpoint) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with checkpoint, Transfers(checkpoint, CPU, threads=4) as transfers:
        wanted = [Transfer(checkpoint.info("matrix"), None, torch.empty_like(MATRIX)) for _ in range(50)]
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
        block = ((0, 37), (8, 11))
        transfers.start([Transfer(checkpoint.info("matrix"), block, each) for each in into], lambda _: None)()
        assert all(torch.equal(each.cpu(), MATRIX[:, 8:11]) for each in into)
