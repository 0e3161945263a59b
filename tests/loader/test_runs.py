"""Scales in runs: the same numbers in another order, in the same memory, and everybody who reads them knows it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatekeeper import read_facts
from loader import BuildError, MoELayer, Plan, VerificationError, Verifier, build, runs
from loader.checkpoint import Checkpoint
from loader.kernels.eager import eager
from loader.planner import runner_layers
from loader.rank import plan_of_rank
from loader.raw import Matrix, Reader
from loader.runs import by_rows, in_runs, lay_out
from loader.spots import compare_rows, spots_of
from tests.loader.fakes import shipped
from tests.loader.test_build import planned

WIDE = {"family": "kimi_k25", "hidden": 512, "width": 768, "experts": 8}
"""16 and 24 groups to a row."""
PACKED = ["int4_g32", "mxfp4"]


@given(
    slots=st.integers(0, 5),
    rows=st.integers(1, 9),
    groups=st.integers(1, 40),
    dtype=st.sampled_from([torch.uint8, torch.float8_e8m0fnu, torch.bfloat16]),
    piece=st.sampled_from([1, 100, 1 << 20]),
)
def test_scales_in_runs_are_the_same_numbers_in_the_same_memory(
    slots: int, rows: int, groups: int, dtype: torch.dtype, piece: int
) -> None:
    size = 2 if dtype == torch.bfloat16 else 1
    given_ = torch.randint(0, 120, (slots, rows, groups * size), dtype=torch.uint8).view(dtype)
    expected, address = given_.clone(), given_.data_ptr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "PIECE_BYTES", piece)
        found = lay_out(given_)
    assert tuple(found.shape) == in_runs((slots, rows, groups))
    assert found.is_contiguous() and found.data_ptr() == address
    assert torch.equal(by_rows(found).view(torch.uint8), expected.view(torch.uint8))
    if found.dim() == 4:
        for row in range(rows if slots else 0):
            last = expected[-1, row, -8:].contiguous()
            assert torch.equal(found[-1, groups // 8 - 1, row].view(torch.uint8), last.view(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((385, 4096, 224), (385, 28, 4096, 8)),
        ((385, 7168, 8), (385, 7168, 8)),  # one run is a row
        ((32, 5760, 90), (32, 5760, 90)),  # gpt-oss: no whole runs
        ((4, 10, 1), (4, 10, 1)),
    ],
)
def test_rows_without_whole_runs_stay_as_they_are(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert in_runs(shape) == expected


@pytest.fixture
def triton_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of the Triton kernels can be built here, and plain torch computes it."""
    module = sys.modules["loader.build"]
    chooser = module._chooser
    monkeypatch.setattr(module, "_chooser", lambda backend, *rest: chooser("eager", *rest))
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    monkeypatch.setattr(module, "KERNELS", {**module.KERNELS, "triton": eager})


def compared(folder: Path, plan: Plan, *, change: Callable[[MoELayer], None] | None = None) -> tuple[MoELayer, ...]:
    """Load and verify, with a change made to each layer before it is compared."""
    _, index = planned(folder)
    facts = read_facts(folder)
    family = shipped().families[str(facts.values["model.family"])]
    verifier = Verifier(plan, runner_layers(index, family, facts))

    def check(layer: MoELayer, layer_plan: object, checkpoint: object) -> Callable[[], None]:
        compare = verifier(layer, layer_plan, checkpoint)  # type: ignore[arg-type]

        def after() -> None:
            if change is not None:
                change(layer)
            compare()

        return after

    return build(plan, index, check=check)


@pytest.mark.usefixtures("triton_anywhere")
@pytest.mark.parametrize("on", [False, True], ids=["separate", "slot"])
@pytest.mark.parametrize("format_name", PACKED)
def test_a_layer_of_triton_kernels_has_its_scales_in_runs(
    made: Callable[..., Path], format_name: str, on: bool
) -> None:
    folder = made(format_name=format_name, shared_format=format_name, **WIDE)
    plain, index = planned(folder, on)
    plan, _ = planned(folder, on, backend="triton")
    expected, layers = build(plain, index), compared(folder, plan)
    for one, other in zip(expected, layers, strict=True):
        for name, scales in other.experts.named_parameters():
            rows = getattr(one.experts, name)
            assert scales.shape == ((8 + on, rows.shape[2] // 8, rows.shape[1], 8) if "scale" in name else rows.shape)
            assert torch.equal(by_rows(scales), rows) if "scale" in name else torch.equal(scales, rows)
        stacks = [(one.experts, other.experts)]
        if one.shared is not None and other.shared is not None:
            stacks.append((one.shared.experts, other.shared.experts))
            assert other.shared.experts.w2_weight_scale.dim() == 4
        for here, there in stacks:
            some = torch.arange(here.w13_weight_scale.shape[0])
            for a, b in zip(here.dequantize(some, torch.float32), there.dequantize(some, torch.float32), strict=True):
                assert torch.equal(a, b)
    for param in plan.layers[0].params:
        stack = param.name.split(".")[2]
        if stack == "experts":
            held = getattr(layers[0].experts, param.name.rpartition(".")[2])
            assert tuple(held.shape) == param.laid_out and held.nbytes == param.nbytes
    listed = {one["name"]: one["laid_out"] for one in plan.as_json()["layers"][0]["params"]}
    assert listed["layers.1.experts.w2_weight_scale"] == [8 + on, 3, 512, 8]
    assert listed["layers.1.experts.w13_weight_scale"] == [8 + on, 2, 1536, 8]


@pytest.mark.usefixtures("triton_anywhere")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.experts.w13_weight_scale.copy_(layer.experts.w13_weight_scale.flip(1).clone()),
        lambda layer: layer.experts.w2_weight_scale.copy_(layer.experts.w2_weight_scale.flip(3).clone()),
        lambda layer: layer.experts.w2_weight_scale.copy_(layer.experts.w2_weight_scale.roll(1, 2).clone()),
        lambda layer: layer.experts.w13_weight_scale[5].copy_(layer.experts.w13_weight_scale[4]),
    ],
    ids=["runs", "within", "rows", "slots"],
)
def test_a_wrong_order_is_found(made: Callable[..., Path], change: Callable[[MoELayer], None]) -> None:
    folder = made(format_name="mxfp4", shared_format="mxfp4", **WIDE)
    plan, _ = planned(folder, True, backend="triton")
    with pytest.raises(VerificationError, match="loaded wrongly"):
        compared(folder, plan, change=change)


@pytest.mark.usefixtures("triton_anywhere")
def test_a_layer_that_was_left_by_rows_is_found(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(format_name="int4_g32", shared_format="int4_g32", **WIDE)
    plan, _ = planned(folder, True, backend="triton")
    monkeypatch.setattr(sys.modules["loader.moe"], "lay_out", lambda scales: scales.view(in_runs(tuple(scales.shape))))
    with pytest.raises(VerificationError, match="loaded wrongly"):
        compared(folder, plan)


@pytest.mark.usefixtures("triton_anywhere")
@pytest.mark.parametrize("by_rows_", [True, False], ids=["rows", "columns"])
def test_every_row_or_column_of_a_slot_is_looked_for_where_it_lies(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, by_rows_: bool
) -> None:
    """Columns where a tensor is saved transposed."""
    folder = made(format_name="mxfp4", shared_format="mxfp4", **WIDE)
    plan, index = planned(folder, True, backend="triton")
    monkeypatch.setattr(Matrix, "is_by_rows", property(lambda self: by_rows_))
    layer = compared(folder, plan)[0]
    tensors = runner_layers(index, shipped().families["kimi_k25"], read_facts(folder))[0]
    with Checkpoint(index) as checkpoint:
        spots = spots_of(layer, plan.layers[0], None, tensors, Reader(checkpoint), 0)
    assert compare_rows(layer, spots) == 9 * 3 * 2
    what = "row" if by_rows_ else "column"
    for slot in range(9):
        before = layer.experts.w2_weight_scale[slot].clone()
        layer.experts.w2_weight_scale[slot] = 0
        says = rf"slot {slot} of w2_weight_scale does not hold `.*down_proj.weight_scale`: {what} \d+ of down differs"
        with pytest.raises(VerificationError, match=says):
            compare_rows(layer, spots)
        layer.experts.w2_weight_scale[slot] = before


@pytest.mark.usefixtures("triton_anywhere")
@pytest.mark.parametrize("tp_size", [2, 3])
def test_a_rank_has_runs_where_its_share_has_some(made: Callable[..., Path], tp_size: int) -> None:
    folder = made(format_name="mxfp4", shared_format="mxfp4", **WIDE)
    plan, index = planned(folder, True, backend="triton")
    plain, _ = planned(folder, True)
    for rank in range(tp_size):
        mine = plan_of_rank(plan, rank, tp_size, 1)
        layer = compared(folder, mine)[0]
        other = build(plan_of_rank(plain, rank, tp_size, 1), index)[0]
        assert layer.experts.w2_weight_scale.dim() == 3  # 12 and 8 groups
        assert layer.experts.w13_weight_scale.dim() == 4
        for name, rows in other.experts.named_parameters():
            held = getattr(layer.experts, name)
            assert torch.equal(by_rows(held) if "scale" in name else held, rows)


@pytest.mark.usefixtures("triton_anywhere")
@pytest.mark.parametrize("format_name", ["bf16", "fp8_block"])
def test_formats_without_groups_have_no_runs(made: Callable[..., Path], format_name: str) -> None:
    plan, _ = planned(made(format_name=format_name, shared_format=format_name, **WIDE), backend="triton")
    assert all(param.laid_out == param.shape for layer in plan.layers for param in layer.params)


def test_other_backends_have_their_scales_by_rows(made: Callable[..., Path]) -> None:
    for backend in ("eager", "grouped_mm"):
        plan, _ = planned(made(format_name="mxfp4", shared_format="mxfp4", **WIDE), backend=backend)
        assert all(param.laid_out == param.shape for layer in plan.layers for param in layer.params)


@pytest.mark.usefixtures("triton_anywhere")
def test_nothing_is_laid_out_of_what_does_not_add_up(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out: list[torch.Tensor] = []
    monkeypatch.setattr(sys.modules["loader.moe"], "lay_out", laid_out.append)
    folder = made(format_name="mxfp4", shared_format="mxfp4", **WIDE)
    plan, index = planned(folder, True, backend="triton")
    first = plan.layers[0]
    cut = dataclasses.replace(plan, layers=(dataclasses.replace(first, placements=first.placements[1:]),))
    with pytest.raises(BuildError, match="does not add up"):
        build(cut, index)
    assert not laid_out


@pytest.mark.usefixtures("triton_anywhere")
def test_no_memory_to_lay_out_is_an_error_that_leaves_nothing(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, index = planned(made(format_name="mxfp4", shared_format="mxfp4", **WIDE), True, backend="triton")
    held: list[torch.Tensor] = []

    def lay_out_one(scales: torch.Tensor) -> torch.Tensor:
        held.append(scales)
        if len(held) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 MiB.\nmore")
        return lay_out(scales)

    monkeypatch.setattr(sys.modules["loader.moe"], "lay_out", lay_out_one)
    with pytest.raises(
        BuildError, match=r"^no memory to put the scales of layer 1 in order on cpu: CUDA out of .* MiB\.$"
    ):
        build(plan, index)
    assert [scales.untyped_storage().nbytes() for scales in held] == [0, 0]
