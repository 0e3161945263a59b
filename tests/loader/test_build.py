"""Building: what is copied is what the plan says, compared first, accounted for, and all or nothing."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from gatekeeper import CheckpointError, Index, read_facts, read_index
from loader import BuildError, LayerPlan, MoELayer, Plan, build, build_plan
from loader.checkpoint import DTYPES, Checkpoint
from loader.errors import TableError
from loader.filling import Filling
from loader.formats import FORMATS
from loader.kernels.tuned import Table
from tests.loader.fakes import decided, shipped
from tests.loader.surgery import rewrite

SMALL = {"experts": 16, "layers": 3}


def planned(folder: Path, on: bool = False, slots: int = 1, backend: str | None = None) -> tuple[Plan, Index]:
    index = read_index(folder)
    assert index is not None
    facts = read_facts(folder)
    decisions = decided([1, 2] if on else [], slots=slots, backend=backend)
    rules = shipped()
    family = rules.families[str(facts.values["model.family"])]
    return build_plan(index, family, facts, decisions, rules.formats), index


@pytest.mark.parametrize("format_name", FORMATS)
def test_weights_stay_packed_and_lie_where_the_plan_says(made: Callable[..., Path], format_name: str) -> None:
    plan, index = planned(made(format_name=format_name, shared_format=format_name, **SMALL), on=True)
    layers = build(plan, index)
    experts = layers[0].experts
    base = plan.layers[0].name
    with Checkpoint(index) as checkpoint:
        for part in experts.layout.parts:
            stacked = getattr(experts, f"w13_{part.name}")
            assert stacked.dtype == DTYPES[part.dtype] and stacked.shape[0] == 17
            for slot, module in ((0, "experts.0"), (15, "experts.15"), (16, "shared_experts")):
                stored = [checkpoint.fetch(f"{base}.{module}.{p}_proj.{part.suffix}") for p in ("gate", "up", "down")]
                gate, up, down = (t if t.dim() == 2 else t.reshape(-1, 1) for t in stored)
                as_bytes = lambda t: t.contiguous().view(torch.uint8)  # noqa: E731  # fp8 has no torch.equal of its own
                assert torch.equal(as_bytes(stacked[slot]), as_bytes(torch.cat([gate, up])))
                assert torch.equal(as_bytes(getattr(experts, f"w2_{part.name}")[slot]), as_bytes(down))
    assert sum(p.nbytes for layer in layers for p in layer.parameters()) == plan.nbytes


def test_two_slots_of_one_shared_mlp(made: Callable[..., Path]) -> None:
    plan, index = planned(made(family="deepseek_v2", **SMALL), on=True, slots=2)
    w2 = build(plan, index)[0].experts.w2_weight
    with Checkpoint(index) as checkpoint:
        down = checkpoint.fetch("model.layers.1.mlp.shared_experts.down_proj.weight")
    assert torch.equal(torch.cat([w2[16], w2[17]], dim=1), down)


def test_no_tensor_is_read_into_memory_of_its_own(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, index = planned(made(**SMALL))
    read, filled = Checkpoint.read_into, []

    def recording(self: Checkpoint, infos: object, position: int, memories: Sequence[memoryview]) -> None:
        for memory in memories:
            address = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
            filled.append((address, address + len(memory)))
        read(self, infos, position, memories)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read_into", recording)
    layers = build(plan, index)
    homes = [(p.data_ptr(), p.data_ptr() + p.nbytes) for layer in layers for p in layer.parameters()]
    assert len(filled) == len(list(plan.placements)), "each tensor goes to one place"
    assert all(any(low <= first and last <= high for low, high in homes) for first, last in filled)
    assert sum(last - first for first, last in filled) == plan.nbytes


def spoiled(plan: Plan, **changes: object) -> Plan:
    """The plan with its last placement of the last layer changed, or dropped if no change is given."""
    layer = plan.layers[-1]
    last = [dataclasses.replace(layer.placements[-1], **changes)] if changes else []
    layer = dataclasses.replace(layer, placements=(*layer.placements[:-1], *last))
    return dataclasses.replace(plan, layers=(*plan.layers[:-1], layer))


def test_a_plan_that_forgets_a_slot_is_caught(made: Callable[..., Path]) -> None:
    plan, index = planned(made(**SMALL))
    key = plan.layers[-1].placements[-1].key
    with pytest.raises(BuildError, match="never written") as caught:
        build(spoiled(plan), index)
    assert f"`{key}` is never used" in str(caught.value)


def test_a_plan_that_writes_a_slot_twice_is_caught(made: Callable[..., Path]) -> None:
    plan, index = planned(made(**SMALL))
    twice = plan.layers[-1].placements[-2]
    with pytest.raises(BuildError, match="is used 2 times"):
        build(spoiled(plan, **{f.name: getattr(twice, f.name) for f in dataclasses.fields(twice)}), index)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.float(), "is [64, 32] float32, its place"),
        (lambda t: t[:, :16].contiguous(), "is [64, 16] bfloat16, its place"),
        (lambda t: t[:1].contiguous(), "is [1, 32] bfloat16, its place"),  # copy_ would broadcast it
        (lambda t: t.to(torch.float8_e4m3fn), "is [64, 32] float8_e4m3fn, its place"),
    ],
)
def test_dtype_and_shape_are_compared_before_each_copy(
    copied: Callable[..., Path], change: Callable[[Tensor], Tensor], words: str
) -> None:
    folder = copied(**SMALL)
    plan, _ = planned(folder)
    key = "model.layers.2.mlp.shared_experts.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({key: change(tensors[key])}))
    index = read_index(folder)  # of the changed checkpoint, while the plan is of the old one
    assert index is not None
    with pytest.raises(BuildError) as caught:
        build(plan, index)
    assert words in str(caught.value) and key in str(caught.value)


def test_a_shape_note_that_lies(copied: Callable[..., Path]) -> None:
    folder = copied(family="kimi_k2", format_name="int4_g32", **SMALL)
    key = "model.layers.1.mlp.experts.3.up_proj.weight_shape"
    rewrite(folder, lambda tensors: tensors[key].copy_(torch.tensor([32, 128])))
    plan, index = planned(folder)
    with pytest.raises(BuildError, match=r"up_proj.weight_shape` says \[32, 128\], the weight is \[32, 64\]"):
        build(plan, index)


def test_a_failed_build_leaves_nothing_allocated(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, index = planned(made(**SMALL))
    built: list[MoELayer] = []
    module = sys.modules["loader.build"]  # the package's `build` is the function
    assemble = module.assemble

    def remembering(*arguments: object) -> object:
        skeleton = assemble(*arguments)  # type: ignore[arg-type]
        built.append(skeleton.layer)
        return skeleton

    monkeypatch.setattr(module, "assemble", remembering)
    with pytest.raises(BuildError):
        build(spoiled(plan), index)
    gc.collect()
    memory = [p.untyped_storage().nbytes() for layer in built for p in layer.parameters() if p.device.type != "meta"]
    assert memory and sum(memory) == 0, "the first layer was built and its memory given back"


def test_a_file_exchanged_while_loading(copied: Callable[..., Path]) -> None:
    folder = copied(**SMALL)
    plan, index = planned(folder)
    key = "model.layers.1.mlp.gate.weight"
    rewrite(folder, lambda tensors: tensors.update({key: tensors[key].float()}))
    (folder / "model-00001-of-00001.safetensors").rename(folder / index.tensors[key].shard)
    with pytest.raises(CheckpointError, match="exchanged while loading"), Checkpoint(index) as checkpoint:
        checkpoint.fetch(key)
    with pytest.raises(CheckpointError):
        build(plan, index)


def test_a_shard_that_is_gone(copied: Callable[..., Path]) -> None:
    folder = copied(**SMALL)
    plan, index = planned(folder)
    (folder / index.tensors["model.layers.2.mlp.gate.weight"].shard).unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        build(plan, index)


def test_a_file_cut_short_while_loading(copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(**SMALL)
    plan, index = planned(folder)
    last = max((t for t in index.tensors.values() if ".layers.2.mlp." in t.name), key=lambda t: t.start)
    opened = Checkpoint._require_same

    def cutting(self: Checkpoint, name: str, shard: int) -> None:
        opened(self, name, shard)
        if name == last.shard:
            os.truncate(folder / name, last.end - 1)

    monkeypatch.setattr(Checkpoint, "_require_same", cutting)
    with pytest.raises(CheckpointError, match="cut short while loading") as caught:
        build(plan, index)
    assert last.name in str(caught.value)


def test_a_check_expects_first_and_looks_once_a_layer_is_filled_and_its_error_ends_the_load(
    made: Callable[..., Path],
) -> None:
    plan, index = planned(made(**SMALL))
    seen = []

    def look(layer: MoELayer, planned: LayerPlan, checkpoint: Checkpoint) -> Callable[[], None]:
        assert checkpoint.index is index and not any(parameter.is_meta for parameter in layer.parameters())
        seen.append(("expects", layer.index, planned.index))

        def compare() -> None:
            assert layer(torch.ones(1, 64)).isfinite().all()
            seen.append(("compares", layer.index, planned.index))

        return compare

    build(plan, index, check=look)
    assert sorted(seen) == [(word, n, n) for word in ("compares", "expects") for n in (1, 2)]
    for n in (1, 2):
        assert seen.index(("expects", n, n)) < seen.index(("compares", n, n))

    def refuse(layer: MoELayer, planned: LayerPlan, checkpoint: Checkpoint) -> Callable[[], None]:
        raise ValueError(layer.index)

    def refuse_later(layer: MoELayer, planned: LayerPlan, checkpoint: Checkpoint) -> Callable[[], None]:
        return lambda: refuse(layer, planned, checkpoint)()

    for check in (refuse, refuse_later):
        with pytest.raises(ValueError, match="1"):
            build(plan, index, check=check)


def test_a_check_expects_while_its_layer_is_filled(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, index = planned(made(**SMALL))
    expected = {layer.index: threading.Event() for layer in plan.layers}
    account = Filling.account

    def accounting(filling: Filling) -> None:
        assert expected[filling._plan.index].wait(20)
        account(filling)

    def look(layer: MoELayer, planned: LayerPlan, checkpoint: Checkpoint) -> Callable[[], None]:
        expected[layer.index].set()
        return lambda: None

    monkeypatch.setattr(Filling, "account", accounting)
    build(plan, index, check=look)


def test_what_two_layers_are_expected_to_hold_is_kept_at_most(made: Callable[..., Path]) -> None:
    """Also where checks take longer than the load, and are all queued by its end."""
    plan, index = planned(made(**{**SMALL, "layers": 7}))
    read: list[weakref.ref[Tensor]] = []
    kept = []

    def look(layer: MoELayer, planned: LayerPlan, checkpoint: Checkpoint) -> Callable[[], None]:
        expected = torch.zeros(1)
        read.append(weakref.ref(expected))

        def compare() -> None:
            time.sleep(0.02)
            kept.append(sum(each() is not None for each in read) + int(expected.sum()))

        return compare

    build(plan, index, check=look)
    assert len(kept) == 6
    assert max(kept) <= 2


def test_a_load_that_fails_starts_no_more_checks(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, index = planned(made(**SMALL))
    begun, failed, seen = threading.Event(), threading.Event(), []

    def failing(filling: Filling) -> None:
        assert begun.wait(20)
        failed.set()
        raise BuildError("does not add up")

    def look(layer: MoELayer, planned: LayerPlan, checkpoint: Checkpoint) -> Callable[[], None]:
        seen.append(layer.index)
        begun.set()
        assert failed.wait(20)
        time.sleep(0.2)  # while the load that failed tells the others
        return lambda: None

    monkeypatch.setattr(Filling, "account", failing)
    with pytest.raises(BuildError, match="does not add up"):
        build(plan, index, check=look)
    assert seen == [1]


def test_every_byte_is_counted(made: Callable[..., Path]) -> None:
    plan, index = planned(made(format_name="int4_g32", family="kimi_k2", **SMALL))
    moved: list[int] = []
    with capture_logs() as events:
        build(plan, index, threads=3, moved=moved.append)
    notes = sum(16 * len(layer.notes) for layer in plan.layers)
    assert sum(moved) == plan.nbytes + notes and notes
    (event,) = [e for e in events if e["event"] == "load.finished"]
    assert event["bytes"] == plan.nbytes and event["layers"] == 2 and event["gb_per_second"] > 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_interpreter_is_left_as_it_was(made: Callable[..., Path], fails: bool) -> None:
    plan, index = planned(made(**SMALL))
    before = sys.getswitchinterval()
    during: list[tuple[bool, float]] = []
    try:
        build(
            spoiled(plan) if fails else plan,
            index,
            moved=lambda _: during.append((gc.isenabled(), sys.getswitchinterval())),
        )
    except BuildError:
        assert fails
    assert gc.isenabled() and sys.getswitchinterval() == before
    assert not any(collects for collects, _ in during) and all(interval < before for _, interval in during)


def test_devices_and_backends_that_are_not_here(made: Callable[..., Path]) -> None:
    plan, index = planned(made(**SMALL))
    with pytest.raises(BuildError, match="device `nonsense` can't be used here"):
        build(plan, index, "nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(BuildError, match="device `cuda` can't be used here"):
            build(plan, index, "cuda")
    other, _ = planned(made(**SMALL), backend="deep_gemm")
    with pytest.raises(BuildError, match="no backend `deep_gemm` in this loader"):
        build(other, index)


def test_a_backend_whose_library_is_missing(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a byte is read, and not at the first token."""
    plan, index = planned(made(**SMALL), backend="triton")
    monkeypatch.setattr(sys.modules["loader.build"], "find_spec", lambda name: None)
    with pytest.raises(BuildError, match=r"backend `triton` needs Triton, .*; install it .*, or try"):
        build(plan, index)


@pytest.mark.parametrize("backend", ["triton", "triton_untuned"])
def test_a_table_of_the_device_is_for_the_backend_that_uses_it(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    plan, _ = planned(made(**SMALL), backend=backend)
    module, table = sys.modules["loader.build"], Table(device="NVIDIA H200", versions={})
    monkeypatch.setattr(module, "find_table", lambda device, folder: table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: table.device)
    skeletons = [module.assemble(layer, plan.router, plan.experts) for layer in plan.layers]
    module._tune(skeletons, torch.device("cuda"), None)
    assert all(s.layer.experts.table is (table if backend == "triton" else None) for s in skeletons)


def test_a_table_that_can_not_be_read_ends_the_load(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, index = planned(made(**SMALL))
    module, built = sys.modules["loader.build"], []

    def torn(skeletons: list[Any], device: torch.device, tables: Path | None) -> None:
        built.extend(skeletons)
        assert any(p.device.type != "meta" for p in skeletons[0].layer.parameters())  # it is under way
        raise TableError("torn")

    monkeypatch.setattr(module, "_tune", torn)
    with pytest.raises(TableError, match="torn"):
        build(plan, index)
    memory = [p.untyped_storage().nbytes() for s in built for p in s.layer.parameters() if p.device.type != "meta"]
    assert memory and sum(memory) == 0


def test_a_failed_build_keeps_nothing_of_its_checks(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while the error, and with it the frames it came through, is still looked at."""
    plan, index = planned(made(**SMALL))
    read: list[weakref.ref[Tensor]] = []
    seen = threading.Event()

    def look(layer: MoELayer, planned: LayerPlan, checkpoint: Checkpoint) -> Callable[[], None]:
        expected = torch.zeros(1)
        read.append(weakref.ref(expected))
        seen.set()
        return lambda: expected.add_(1) and None

    def failing(filling: Filling) -> None:
        assert seen.wait(20)
        raise BuildError("does not add up")

    monkeypatch.setattr(Filling, "account", failing)
    with pytest.raises(BuildError) as caught:
        build(plan, index, check=look)
    assert caught.tb and read and not any(each() is not None for each in read)


def test_an_account_is_never_empty(made: Callable[..., Path]) -> None:
    """Nothing was written: also if nobody reckoned before."""
    plan, index = planned(made(**SMALL))
    layer = dataclasses.replace(plan.layers[0], placements=plan.layers[0].placements[1:])
    module = sys.modules["loader.build"]
    skeleton = module.assemble(layer, plan.router, plan.experts)
    module._allocate(skeleton, torch.device("cpu"))
    with pytest.raises(BuildError, match="does not add up"):
        Filling(layer, skeleton.slots(), index, skeleton.parameter).account()


def test_a_load_does_not_wait_for_triton(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, index = planned(made(**SMALL), backend="triton")
    monkeypatch.setattr(sys.modules["loader.build"], "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", None)  # to import it is an error
    (layer, *_) = build(plan, index)
    assert type(layer.router).__name__ == "TritonRouter"


@pytest.mark.gpu
def test_layers_on_the_gpu_compute_what_they_compute_on_the_cpu(made: Callable[..., Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    plan, index = planned(made(format_name="int4_g32", shared_format="int4_g32", **SMALL), on=True)
    x_TD = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    for here, there in zip(build(plan, index), build(plan, index, "cuda"), strict=True):
        torch.testing.assert_close(there(x_TD.cuda()).cpu(), here(x_TD), rtol=1e-4, atol=1e-5)
