"""Raw matrices are found where torch finds them, however experts are stacked, and verification compares with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gatekeeper import CheckpointError, Family, TensorInfo, View, read_facts, read_index
from loader import VerificationError, build, build_plan, verify
from loader.checkpoint import Checkpoint
from loader.planner import runner_layers
from loader.raw import Reader
from loader.shards import write_shards
from loader.spots import compare_rows, spots_of
from tests.loader.fakes import decided, shipped
from tests.loader.surgery import rewrite

E, F, D = 3, 6, 8
STACK = torch.arange(E * 2 * F * D, dtype=torch.int16).reshape(E, 2 * F, D)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    tensors = {"stack": STACK, "swapped": STACK.mT.contiguous(), "vector": STACK[0, 0].clone(), "one": STACK[0, 0, 1]}
    write_shards(tmp_path, [tensors], 1)
    index = read_index(tmp_path)
    assert index is not None
    with Checkpoint(index) as opened:
        yield opened


def viewed(checkpoint: Checkpoint, item: int, rows: range, swapped: bool) -> TensorInfo:
    view = View(item=item, rows=rows, transposed=swapped)
    return dataclasses.replace(checkpoint.info("swapped" if swapped else "stack"), shape=(len(rows), D), view=view)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("rows", [range(F), range(F, 2 * F), range(0, 2 * F, 2), range(1, 2 * F, 2)], ids=str)
def test_a_matrix_of_a_stack(checkpoint: Checkpoint, rows: range, swapped: bool) -> None:
    reader = Reader(checkpoint)
    matrices = [reader.matrix(viewed(checkpoint, item, rows, swapped)) for item in range(E)]
    expected = STACK[:, rows.start : rows.stop : rows.step]
    assert torch.equal(reader.read(matrices), expected)
    for top, bottom, left, right in ((2, 3, 0, D), (0, F, 5, 6), (1, 4, 2, 7), (3, 4, 1, 2)):
        found = reader.read([matrix.cut((top, bottom), (left, right)) for matrix in matrices])
        assert torch.equal(found, expected[:, top:bottom, left:right])
    assert all(matrix.is_by_rows is not swapped for matrix in matrices)


def test_a_vector_is_a_column(checkpoint: Checkpoint) -> None:
    reader = Reader(checkpoint)
    vector, one = (reader.matrix(checkpoint.info(name)) for name in ("vector", "one"))
    assert torch.equal(reader.read([vector, vector]), STACK[0, 0].reshape(1, D, 1).expand(2, D, 1))
    assert torch.equal(reader.read([one]), STACK[0, 0, 1].reshape(1, 1, 1))


def test_what_can_not_be_read(checkpoint: Checkpoint) -> None:
    reader = Reader(checkpoint)
    with pytest.raises(CheckpointError, match="`stack` is F4, which this loader does not read"):
        reader.read([reader.matrix(dataclasses.replace(checkpoint.info("stack"), dtype="F4"))])


# -- layers ---------------------------------------------------------------------------------------------------------


def stack(transposed: bool, interleaved: bool) -> Callable[[dict[str, Tensor]], None]:
    """Stacks each block's experts."""

    def change(tensors: dict[str, Tensor]) -> None:
        for block in sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name}):
            gate, up, down = (
                torch.stack([tensors.pop(f"{block}.experts.{e}.{projection}_proj.weight") for e in range(16)])
                for projection in ("gate", "up", "down")
            )
            both = torch.stack([gate, up], 2 if interleaved else 1).flatten(1, 2)
            for name, stacked in (("gate_up", both), ("down", down)):
                lying = stacked.mT.contiguous() if transposed else stacked
                tensors[f"{block}.experts.{name}_proj"] = lying

    return change


def stacking(family: Family, transposed: bool, interleaved: bool) -> Family:
    assert family.names.stacked is not None
    stacked = dataclasses.replace(family.names.stacked, transposed=transposed, interleaved=interleaved, usual=True)
    return dataclasses.replace(family, names=dataclasses.replace(family.names, stacked=stacked))


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "slot"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "turns"])
@pytest.mark.parametrize("transposed", [False, True], ids=["as it stands", "transposed"])
def test_stacked_experts_are_verified(
    copied: Callable[..., Path], transposed: bool, interleaved: bool, fused: bool
) -> None:
    folder = copied(family="deepseek_v3", experts=16, layers=2, width=256)
    family = stacking(shipped().families["deepseek_v3"], transposed, interleaved)
    facts = read_facts(folder)
    rewrite(folder, stack(transposed, interleaved))
    index = read_index(folder)
    assert index is not None
    plan = build_plan(index, family, facts, decided([1] if fused else []), shipped().formats)
    tensors = runner_layers(index, family, facts)
    layers = build(plan, index)
    for seed in range(3):
        (found,) = verify(layers, plan, index, tensors, seed=seed)
        assert 0 < found.figure <= found.tolerance and found.rows == 3 * 17
    with torch.no_grad():
        layers[0].experts.w13_weight[3] = layers[0].experts.w13_weight[3].roll(1, int(transposed))
    line = "column" if transposed else "row"  # which is a row of the file
    with Checkpoint(index) as checkpoint:
        spots = spots_of(layers[0], plan.layers[0], None, tensors[0], Reader(checkpoint), seed=0)
    with pytest.raises(VerificationError, match=rf"slot 3 of w13_weight does not hold `.*`: {line} \d+ of gate"):
        compare_rows(layers[0], spots)
